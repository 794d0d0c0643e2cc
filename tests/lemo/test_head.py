from __future__ import annotations

import copy

import pytest
import torch
from accelerate.utils import convert_outputs_to_fp32, convert_to_fp32
from torch import nn
from torch.utils._pytree import tree_flatten, tree_map

from lemo_trainer import apply_lemo, remove_lemo

from .tiny import (
    EVERY_MODE,
    MODES,
    assert_same_step,
    batch,
    every_mode,
    leaving_out,
    lora,
    loss_and_gradients,
    tiny_model,
)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "olmoe"])
def test_router_losses_come_from_all_tokens(kind, mode):
    model = tiny_model(kind, output_router_logits=True, router_aux_loss_coef=3.0)
    inputs = batch("left")
    wanted = loss_and_gradients(model, inputs)
    report = apply_lemo(model, leaving_out(keep_ratio=1.0))
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    remove_lemo(model)
    report = apply_lemo(model, leaving_out(mode))
    assert report.wiring.dense_mlps == ((0, 2) if kind == "qwen2_moe" else (0, 1, 2))
    assert "works on all tokens (mixture of experts)" in str(report)
    output = model(**inputs)
    assert all(len(logits) == 2 * 45 for logits in output.router_logits)
    if mode == "detach":
        torch.testing.assert_close(output.loss, wanted[0])


def test_a_head_that_does_more_than_scaling_and_capping_is_refused():
    model = tiny_model("recurrent_gemma", attention_window_size=16)
    with pytest.raises(ValueError, match=r"must equal that of RecurrentGemmaForCausalLM.*set loss_segment=0"):
        apply_lemo(model, leaving_out())
    assert apply_lemo(model, leaving_out(loss_segment=0)).patched_layers == (2,)


def hooked(kind, hook):
    def change(model):
        getattr(model.lm_head, f"register_{kind}")(hook)
        return model

    return change


def with_another_head(model):
    model.set_output_embeddings(nn.Sequential(model.lm_head, nn.Tanh()))
    return model


def with_more_tokens(model):
    torch.manual_seed(0)
    model.resize_token_embeddings(105, mean_resizing=False)
    return model


def with_weight_norm(model):
    nn.utils.parametrizations.weight_norm(model.lm_head)
    return model


def with_weight_norm_by_a_hook(model):
    nn.utils.weight_norm(model.lm_head)
    return model


def with_a_wrapped_forward(model):
    own = model.lm_head.forward
    model.lm_head.forward = lambda x: own(x) / 2
    return model


def with_another_loss(model):
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.float().square().mean()
    return model


def with_lora(model):
    torch.manual_seed(0)
    return lora(model, target_modules=["q_proj", "lm_head"])


HOOKS = {
    "forward hook": hooked("forward_hook", lambda _, args, output: output / 2),
    "forward pre-hook": hooked("forward_pre_hook", lambda _, args: (args[0] / 2,)),
    "backward hook": hooked("full_backward_hook", lambda _, inputs, outputs: (inputs[0] / 2,)),
    "backward pre-hook": hooked("full_backward_pre_hook", lambda _, outputs: (outputs[0] / 2,)),
    "weight norm, old": with_weight_norm_by_a_hook,
}
CHANGES = HOOKS | {
    "another head": with_another_head,
    "more tokens": with_more_tokens,
    "weight norm": with_weight_norm,
    "a wrapped forward": with_a_wrapped_forward,
    "another loss": with_another_loss,
    "LoRA": with_lora,
}


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("change", "mode"),
    [
        *((change, "exact") for change in CHANGES),
        *(("forward hook", mode) for mode in ("auto", "segments", "detach")),
        ("another loss", "segments"),
        ("LoRA", "segments"),
    ],
)
def test_a_head_or_a_loss_that_was_changed_after_apply(change, mode):
    inputs = batch("plain")
    wanted = loss_and_gradients(CHANGES[change](tiny_model()), inputs)
    model = tiny_model()
    report = apply_lemo(model, every_mode()[mode])
    model = CHANGES[change](model)
    if mode == "segments" and (change in HOOKS or change == "another loss"):
        with pytest.raises(ValueError, match=r"piece by piece, and the (output head has the hook|loss func)"):
            model(**inputs)
        return
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    assert report.logits_made == (change != "more tokens")


@pytest.mark.parametrize("change", ["forward pre-hook", "backward hook"])
def test_hooks_on_the_head_from_before_run_in_training_only(change):
    """The checks that LeMo makes when it is applied do not call them."""
    inputs, model = batch("plain"), HOOKS[change](tiny_model())
    wanted, calls = loss_and_gradients(model, inputs), []
    model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    apply_lemo(model, every_mode()["exact"])
    assert not calls
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    assert len(calls) == 1


@pytest.mark.parametrize("mode", ["segments", "exact"])
@pytest.mark.parametrize("part", ["embed_tokens", "norm", ""])
def test_hooks_outside_the_layers_see_a_whole_sample(part, mode):
    def step(model):
        seen = []
        model.model.get_submodule(part).register_forward_hook(lambda *_: seen.append(1))
        return (*loss_and_gradients(model, batch("plain")), len(seen))

    wanted, model = step(tiny_model()), tiny_model()
    apply_lemo(model, every_mode()[mode])
    if mode == "segments":
        with pytest.raises(ValueError, match=r"a hook on the .*, the last norm or the decoder"):
            step(model)
    else:
        got = step(model)
        assert_same_step(got[:2], wanted[:2])
        assert got[2] == wanted[2] == 1


def test_another_ignored_label():
    inputs = batch("plain")
    inputs["labels"] = inputs["labels"].where(inputs["labels"] != -100, 5)
    inputs["ignore_index"] = 5
    wanted = loss_and_gradients(tiny_model(), inputs)
    for mode in ("exact", "segments"):
        model = tiny_model()
        apply_lemo(model, every_mode()[mode])
        if mode == "segments":
            with pytest.raises(ValueError, match=r"the call has ignore_index=5; use mode=\"exact\""):
                model(**inputs)
        else:
            assert_same_step(loss_and_gradients(model, inputs), wanted)


READING = {
    "by name": lambda output: output.logits,
    "by key": lambda output: output["logits"],
    "by get": lambda output: output.get("logits"),
    "by index": lambda output: output[1],
    "by slice": lambda output: output[:2][1],
    "as a tuple": lambda output: output.to_tuple()[1],
    "as a dict": lambda output: dict(output)["logits"],
    "unpacked": lambda output: {**output}["logits"],
    "copied": lambda output: copy.copy(output).logits,
    "on demand": lambda output: list(output.values())[1](),
    "out of a tree": lambda output: tree_map(lambda leaf: leaf, output).logits,
    "out of accelerate": lambda output: convert_to_fp32(output).logits,
}


@pytest.mark.parametrize("mode", EVERY_MODE)
def test_every_way_to_read_logits_in_training(mode):
    inputs, model = batch("plain"), tiny_model()
    wanted = model(**inputs).logits
    apply_lemo(model, every_mode()[mode])
    for name in READING if mode == "exact" else ("by index", "by slice"):
        output = model(**inputs)
        assert list(output)[:2] == ["loss", "logits"]
        torch.testing.assert_close(READING[name](output), wanted)
    loss, logits = model(**inputs, return_dict=False)[:2]
    torch.testing.assert_close(logits, wanted)
    loss.backward()


def test_passing_an_output_on_makes_no_logits(caplog):
    model = tiny_model()
    apply_lemo(model, every_mode()["exact"])
    output = model(**batch("plain"))
    assert output[0] is output.loss
    leaves, _ = tree_flatten(convert_to_fp32(output))
    assert not any(torch.is_tensor(leaf) and leaf.ndim == 3 for leaf in leaves)
    with pytest.raises(AttributeError, match=r"read `outputs\.logits`, or call what"):
        next(reversed(output.values())).argmax(-1)
    assert "logits" not in caplog.text
    assert output.logits.shape == (2, 45, 97)
    assert "34.92 kB in this batch" in caplog.text


def test_a_metric_under_no_grad_leaves_the_logits_their_gradient():
    model, inputs = tiny_model(), batch("plain")
    wanted = torch.autograd.grad(model(**inputs).logits.square().sum(), model.lm_head.weight)[0]
    apply_lemo(model, every_mode()["exact"])
    output = model(**inputs)
    with torch.no_grad():
        assert output.logits.argmax(-1).shape == (2, 45)
    got = torch.autograd.grad(output.logits.square().sum(), model.lm_head.weight)[0]
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["exact", "segments"])
def test_logits_are_not_made_after_an_optimizer_step(mode):
    model = tiny_model()
    apply_lemo(model, every_mode()[mode])
    read, unread = model(**batch("plain")), model(**batch("plain"))
    read.loss.backward()
    before = read.logits.clone()
    torch.optim.AdamW(model.parameters(), fused=True).step()
    torch.testing.assert_close(read.logits, before)
    with pytest.raises(RuntimeError, match="must be read before the output head changes"):
        _ = unread.logits


@pytest.mark.parametrize("casting", ["outputs as they are", "before LeMo", "after LeMo"])
def test_logits_have_the_dtype_of_autocast_or_of_accelerate(casting):
    """accelerate wraps the model's forward: it runs under autocast, and its outputs become float32."""

    def prepared(model):
        model.forward = convert_outputs_to_fp32(torch.autocast("cpu", torch.bfloat16)(model.forward))

    model, plain, inputs = tiny_model(), tiny_model(), batch("plain")
    if casting == "before LeMo":
        prepared(model)
    apply_lemo(model, every_mode()["exact"])
    if casting == "after LeMo":
        prepared(model)
    if casting != "outputs as they are":
        prepared(plain)
        got, wanted = model(**inputs).logits, plain(**inputs).logits
    else:
        with torch.autocast("cpu", torch.bfloat16):
            got, wanted = model(**inputs), plain(**inputs)
        got, wanted = got.logits, wanted.logits
    torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-1)
