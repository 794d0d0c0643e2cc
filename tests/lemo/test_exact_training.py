from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch.nn import functional as F

from lemo_trainer import apply_lemo, remove_lemo
from lemo_trainer.exact import mode
from lemo_trainer.exact.walk import walk_through
from lemo_trainer.measure import ActivationBytes

from .exact import LAYERS, SCHEMES, SEGMENTS, relative_error
from .tiny import EXPERTS, batch, checkpointing, lora, loss_and_gradients, tiny_model

schemes = pytest.mark.parametrize("scheme", SCHEMES)


@pytest.fixture(autouse=True)
def walks(monkeypatch):
    """The walks that were begun: without one, a step was dense."""
    begun = []

    def noting(walk, x_BSD):
        begun.append(walk)
        return walk_through(walk, x_BSD)

    monkeypatch.setattr(mode, "walk_through", noting)
    return begun


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def smoothed(model, inputs):
    logits = model(**{**inputs, "labels": None}).logits[:, :-1]
    return F.cross_entropy(logits.flatten(0, 1), inputs["labels"][:, 1:].flatten(), label_smoothing=0.1)


def preference(model, inputs):
    """As DPO: a nonlinear function of the difference between two samples' log-probabilities."""
    logits = model(**{**inputs, "labels": None}).logits[:, :-1].log_softmax(-1)
    chosen, rejected = logits.gather(2, inputs["input_ids"][:, 1:, None]).sum((1, 2))
    return -F.logsigmoid(0.01 * (chosen - rejected))


def scaled(model, inputs):
    return model(**inputs).loss * 65536


def two_forwards(model, inputs):
    return model(**inputs).loss + model(**{**inputs, "input_ids": inputs["input_ids"].flip(1)}).loss


@schemes
@pytest.mark.parametrize("loss", [smoothed, preference, scaled, two_forwards])
def test_any_loss_outside_the_model(loss, scheme, walks):
    model, inputs = tiny_model(), batch("left")
    wanted = gradients(model, loss(model, inputs))
    apply_lemo(model, SCHEMES[scheme])
    assert relative_error(gradients(model, loss(model, inputs)), wanted) < 1e-5
    assert walks


@schemes
@pytest.mark.parametrize("how", ["none", "reentrant", "not reentrant"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen3_moe"])
def test_lora_and_gradient_checkpointing(kind, how, scheme, walks):
    model = lora(tiny_model(kind), fan_in_fan_out=kind == "gpt2")
    inputs = {**batch("left"), "num_items_in_batch": torch.tensor(31)}
    wanted = loss_and_gradients(model, inputs)
    model.enable_input_require_grads()
    if how != "none":
        checkpointing(model.get_base_model(), reentrant=how == "reentrant")
    apply_lemo(model, SCHEMES[scheme])
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5
    assert len(walks) == (3 if scheme == "layers" else 1)


@schemes
@pytest.mark.parametrize("frozen", ["first layers", "last layers", "all but a norm"])
def test_frozen_parts(frozen, scheme):
    model, inputs = tiny_model(), batch("plain")
    for name, parameter in model.named_parameters():
        first = "embed" in name or "layers.0" in name or "layers.1" in name
        trained = {"first layers": not first, "last layers": first}
        parameter.requires_grad_(trained.get(frozen, "layers.1.input_layernorm" in name))
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, SCHEMES[scheme])
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5


@schemes
def test_hooks_on_a_parameter_run_once(scheme):
    model, inputs = tiny_model(), batch("plain")
    _, wanted = loss_and_gradients(model, inputs)
    name = "model.layers.1.mlp.up_proj.weight"
    weight, calls = model.get_parameter(name), []
    weight.register_hook(lambda grad: grad * 3)
    weight.register_post_accumulate_grad_hook(calls.append)
    apply_lemo(model, SCHEMES[scheme])
    _, got = loss_and_gradients(model, inputs)
    torch.testing.assert_close(got[name], 3 * wanted[name])
    assert len(calls) == 1


@schemes
@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe", "gpt_oss"])
@pytest.mark.parametrize("padding", ["plain", "left"])
def test_router_losses(kind, padding, scheme):
    model = tiny_model(kind, output_router_logits=True, router_aux_loss_coef=1.0)
    inputs = batch(padding)
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, SCHEMES[scheme])
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5
    balanced = gradients(model, model(**inputs).aux_loss)
    remove_lemo(model)
    assert relative_error(balanced, gradients(model, model(**inputs).aux_loss)) < 1e-5


@schemes
def test_the_same_dropout_masks_when_run_again(scheme):
    options = {"attention_dropout": 0.2, "resid_pdrop": 0.3, "attn_pdrop": 0.2, "embd_pdrop": 0.1}
    model = lora(tiny_model("gpt2", **options), lora_dropout=0.3, fan_in_fan_out=True).double()
    inputs = batch("left")
    apply_lemo(model, SCHEMES[scheme])
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss():
        torch.manual_seed(3)
        return smoothed(model, inputs)

    loss().backward()
    after = torch.get_rng_state()
    directions = [torch.randn_like(p) for p in trained]
    slope = sum((p.grad * d).sum() for p, d in zip(trained, directions, strict=True))
    values = []
    for step in (1e-5, -2e-5):
        with torch.no_grad():
            torch._foreach_add_(trained, directions, alpha=step)
        values.append(loss().detach())
    torch.testing.assert_close((values[0] - values[1]) / 2e-5, slope, rtol=1e-5, atol=0)
    torch.manual_seed(3)
    model(**inputs)
    assert torch.equal(torch.get_rng_state(), after)  # running again draws nothing anew


def test_dropout_of_one_segment_is_that_of_the_dense_step():
    model, inputs = tiny_model("gpt2", resid_pdrop=0.3, embd_pdrop=0.1), batch("plain")
    steps = []
    for config in (None, dataclasses.replace(LAYERS, segment_tokens=64)):
        if config:
            apply_lemo(model, config)
        torch.manual_seed(3)
        steps.append(loss_and_gradients(model, inputs))
    assert relative_error(steps[1], steps[0]) < 1e-5


@schemes
@pytest.mark.parametrize("kind", ["left", "plain"])  # with a mask and by a kernel that needs none
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype, kind, scheme):
    """As close to the gradient in float32 as the dense step under autocast is."""
    model, inputs = tiny_model(), {**batch(kind), "use_cache": False}
    exact = loss_and_gradients(model, inputs)

    def step():
        with torch.autocast("cpu", dtype):
            loss = model(**inputs).loss * 1024
        loss, grads = gradients(model, loss)
        return loss / 1024, {name: grad / 1024 for name, grad in grads.items()}

    dense = relative_error(step(), exact)
    apply_lemo(model, SCHEMES[scheme])
    assert relative_error(step(), exact) < 1.5 * dense


@schemes
def test_half_precision(scheme):
    model, inputs = tiny_model(), batch("left")
    exact = loss_and_gradients(model.bfloat16().float(), inputs)
    model.bfloat16()

    def step():
        loss, grads = loss_and_gradients(model, inputs)
        return loss, {name: grad.float() for name, grad in grads.items()}

    dense = relative_error(step(), exact)
    apply_lemo(model, SCHEMES[scheme])
    assert relative_error(step(), exact) < 1.5 * dense


@schemes
def test_a_graph_that_is_retained_goes_backward_twice(scheme):
    model, inputs = tiny_model(), batch("left")
    _, wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, SCHEMES[scheme])
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward(retain_graph=True)
    loss.backward()
    twice = {name: p.grad / 2 for name, p in model.named_parameters()}
    assert relative_error((loss.detach(), twice), (loss.detach(), wanted)) < 1e-5
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


@schemes
def test_second_gradients_are_refused(scheme):
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, dataclasses.replace(SCHEMES[scheme], loss_segment=0))
    with pytest.raises(RuntimeError, match="first gradients only"):
        torch.autograd.grad(model(**inputs).loss, model.model.layers[0].mlp.up_proj.weight, create_graph=True)


@schemes
def test_a_step_between_forward_and_backward_is_refused(scheme):
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, SCHEMES[scheme])
    loss = model(**inputs).loss
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(2)
    with pytest.raises(RuntimeError, match="changed in place"):
        loss.backward()


@schemes
def test_only_training_passes_with_gradients_and_without_a_cache_walk(scheme, walks):
    model, inputs = tiny_model(), batch("left")
    prompt = inputs["input_ids"][:, :8]
    words = model.generate(prompt, max_new_tokens=4, do_sample=False)
    with torch.no_grad():
        wanted = model(**inputs).logits
    apply_lemo(model, SCHEMES[scheme])
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, wanted)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), words)
    assert model(**inputs, use_cache=True).past_key_values.get_seq_length() == 45
    assert torch.equal(model.eval()(**inputs).logits, wanted)
    assert not walks
    model.train()(**inputs).loss.backward()
    assert walks


@schemes
def test_copies_and_pickles_are_models_of_their_own(scheme, walks):
    model, inputs = lora(tiny_model()), batch("left")
    loss = model(**inputs).loss
    apply_lemo(model, SCHEMES[scheme])
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(buffer, weights_only=False)]
    for parameter in model.parameters():
        parameter.data.zero_()
    for other in copies:
        assert torch.equal(other(**inputs).loss, loss)
        assert type(other.get_base_model().model.layers[0]).__reduce_ex__ is object.__reduce_ex__
        assert not [name for part in other.modules() for name in vars(part) if "lemo" in name]
    assert not walks


@schemes
def test_everything_is_restored(scheme):
    model = tiny_model()
    before = [(type(part), sorted(vars(part))) for part in model.modules()]
    apply_lemo(model, SCHEMES[scheme])
    remove_lemo(model)
    assert [(type(part), sorted(vars(part))) for part in model.modules()] == before


@schemes
def test_an_exception_in_a_backward_pass_leaves_the_model_as_it_was(scheme):
    model, inputs = tiny_model(), batch("left")
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, SCHEMES[scheme])

    def fail(*_):
        if torch.is_grad_enabled():  # in the second run, which is that of the backward pass
            raise KeyboardInterrupt

    hook = model.model.layers[1].mlp.register_forward_hook(fail)
    loss = model(**inputs).loss
    with pytest.raises(KeyboardInterrupt):
        loss.backward()
    hook.remove()
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5


@schemes
def test_hidden_states_are_given_or_refused(scheme):
    model, inputs = tiny_model(), batch("left")
    wanted = model(**inputs, output_hidden_states=True).hidden_states
    apply_lemo(model, SCHEMES[scheme])
    if scheme == "segments":
        with pytest.raises(ValueError, match="`output_hidden_states`"):
            model(**inputs, output_hidden_states=True)
    else:
        torch.testing.assert_close(model(**inputs, output_hidden_states=True).hidden_states, wanted)


@schemes
def test_hooks_of_a_forward_pass_act_when_it_runs_again(scheme):
    """As PEFT's, which hand its layers arguments and are removed when the forward pass ends."""
    model, inputs = tiny_model(), batch("left")

    def step():
        part = model.model.layers[1].mlp.up_proj
        hook = part.register_forward_hook(lambda module, args, output: 2 * output)
        loss = model(**inputs).loss
        hook.remove()
        part.register_forward_hook(lambda *_: 1 / 0).remove()
        return gradients(model, loss)

    wanted = step()
    apply_lemo(model, SCHEMES[scheme])
    assert relative_error(step(), wanted) < 1e-5


def test_alora_counts_tokens_over_the_whole_sample():
    model, inputs = lora(tiny_model(), alora_invocation_tokens=[3, 4]), batch("plain")
    inputs["input_ids"][:, 20:22] = torch.tensor([3, 4])
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, LAYERS)
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5
    remove_lemo(model)
    apply_lemo(model, SEGMENTS)
    with pytest.raises(ValueError, match="aLoRA"):
        model(**inputs)


@schemes
def test_hooks_on_layers_see_hidden_states_or_are_refused(scheme):
    model, inputs, seen = tiny_model(), batch("left"), []
    model.model.layers[1].register_forward_hook(lambda module, args, output: seen.append(output))
    model(**inputs)
    apply_lemo(model, SCHEMES[scheme])
    if scheme == "segments":
        with pytest.raises(ValueError, match=r"the hook .*lambda.* on layer 1"):
            model(**inputs)
    else:
        model(**inputs)
        torch.testing.assert_close(seen[-1], seen[0])


@schemes
def test_attention_weights_are_refused(scheme):
    model = tiny_model(implementation="eager")
    apply_lemo(model, SCHEMES[scheme])
    with pytest.raises(ValueError, match="attention weights"):
        model(**batch("left"), output_attentions=True)


@pytest.mark.parametrize("kind", ["mamba", "minimax", "lfm2"])
def test_layers_with_another_state_run_over_the_whole_sample(kind):
    linear = ["linear_attention", "full_attention", "linear_attention"]
    options = {
        "mamba": {},
        "minimax": {**EXPERTS, "layer_types": linear},
        "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    }
    model = tiny_model(kind, implementation="eager", **options[kind])
    inputs = batch("plain")
    wanted = loss_and_gradients(model, inputs)
    report = apply_lemo(model, LAYERS)
    assert ("layers 0, 1, 2 run" if kind == "mamba" else "layers 0, 2 run") in str(report)
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5
    remove_lemo(model)
    with pytest.raises(ValueError, match='use scheme="layers"'):
        apply_lemo(model, SEGMENTS)


def test_memory_falls_with_the_segments():
    inputs = batch("plain", seq_len=128)
    saved, peak = {}, {}
    for name, config in {"dense": None, **SCHEMES}.items():
        model = lora(tiny_model(layers=6))
        if config:
            apply_lemo(model, config)
        with ActivationBytes() as activations:
            model(**inputs).loss.backward()
        saved[name], peak[name] = activations.saved_bytes, activations.peak_bytes
    assert saved["layers"] < 0.12 * saved["dense"]
    assert peak["layers"] < 0.16 * peak["dense"]
    assert saved["segments"] < 0.12 * saved["dense"]
    assert peak["segments"] < 0.25 * peak["dense"]
