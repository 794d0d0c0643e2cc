from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.informativeness.selectors import selector_for
from lemo_trainer.layers.segments import choose_segments
from lemo_trainer.measure import ActivationBytes

from .tiny import CASES, KINDS, assert_same_step, batch, checkpointing, lora, loss_and_gradients, tiny_model

CONFIG = LemoConfig(mode="segments", segment_tokens=16, keep_ratio=1.0, loss_segment=16)


def cut_attention(module, query, key, value, mask, **options):
    """Attention whose queries meet the keys and values of earlier segments as constants."""
    heads = []
    for start in range(0, query.shape[2], 16):
        rows = slice(start, min(start + 16, query.shape[2]))
        keys, values = (torch.cat([x[:, :, :start].detach(), x[:, :, start:]], 2) for x in (key, value))
        allowed = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril()[None, None]
        allowed = (allowed if mask is None else mask)[:, :, rows]
        heads.append(sdpa_attention_forward(module, query[:, :, rows], keys, values, allowed, **options)[0])
    return torch.cat(heads, 1), None


AttentionInterface.register("cut_attention", cut_attention)


@pytest.mark.parametrize(("model_type", "kind"), [case for case in CASES if case[1] != "packed"])
def test_one_segment_is_the_unpatched_step(model_type, kind):
    model = tiny_model(model_type)
    inputs = batch(kind)
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, dataclasses.replace(CONFIG, segment_tokens=64))
    assert_same_step(loss_and_gradients(model, inputs), wanted)


@pytest.mark.parametrize("model_type", KINDS)
def test_the_loss_is_exact(model_type):
    model = tiny_model(model_type)
    inputs = batch("left")
    with torch.no_grad():
        wanted = model(**inputs).loss
    apply_lemo(model, CONFIG)
    torch.testing.assert_close(model(**inputs).loss, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "left", "right"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "phi3"])
def test_gradients_equal_those_of_a_cut_attention(model_type, kind):
    model = tiny_model(model_type)
    inputs = batch(kind)
    model.config._attn_implementation = "sdpa"
    apply_lemo(model, CONFIG)
    got = loss_and_gradients(model, inputs)
    remove_lemo(model)
    mask = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
    tokens = mask.shape[1]
    allowed = torch.ones(tokens, tokens, dtype=torch.bool).tril() & mask[:, None, None, :]
    allowed |= torch.eye(tokens, dtype=torch.bool)
    model.config._attn_implementation = "cut_attention"
    assert_same_step(
        got, loss_and_gradients(model, {**inputs, "attention_mask": allowed}), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("loss_segment", [0, 16])
@pytest.mark.parametrize("how", ["selective", "plain", "reentrant", "not reentrant"])
def test_recomputation_and_the_loss_change_nothing(how, loss_segment):
    model = lora(tiny_model(), lora_dropout=0.0)
    inputs = {**batch("left"), "num_items_in_batch": torch.tensor(31)}
    config = dataclasses.replace(
        CONFIG, selective_checkpointing=how == "selective", loss_segment=loss_segment
    )
    apply_lemo(model, CONFIG)
    wanted = loss_and_gradients(model, inputs)
    remove_lemo(model)
    apply_lemo(model, config)
    if "reentrant" in how:
        model.enable_input_require_grads()
        checkpointing(model.get_base_model(), reentrant=how == "reentrant")
    assert_same_step(loss_and_gradients(model, inputs), wanted)


def test_a_scaled_loss_scales_its_gradients():
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, CONFIG)
    _, wanted = loss_and_gradients(model, inputs)
    model.zero_grad()
    (model(**inputs).loss / 4).backward()
    (model(**inputs).loss / 4).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name] / 2)


def test_segments_without_gradient_count_in_the_loss_only():
    model, inputs = tiny_model(), batch("plain")
    wanted = model(**inputs).loss
    report = apply_lemo(model, dataclasses.replace(CONFIG, keep_ratio=0.4, selector="recency"))
    loss, got = loss_and_gradients(model, inputs)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert (report.seq_len, report.kept_tokens) == (45, 13)
    remove_lemo(model)
    labels = inputs["labels"].clone()
    labels[:, :33] = -100  # position 32 predicts the label of 33
    apply_lemo(model, CONFIG)
    count = (inputs["labels"][:, 1:] != -100).sum()
    _, later = loss_and_gradients(model, {**inputs, "labels": labels, "num_items_in_batch": count})
    assert_same_step((loss, got), (loss, later))


@pytest.mark.parametrize(("keep", "wanted"), [(1.0, 5), (0.5, 3), (0.01, 1)])
@pytest.mark.parametrize("selector", ["random", "recency"])
def test_choice_of_segments(selector, keep, wanted):
    config = dataclasses.replace(CONFIG, selector=selector, keep_ratio=keep)
    chosen = choose_segments(75, selector_for(config), keep)
    assert (len(chosen), sum(chosen)) == (5, wanted)
    assert selector == "random" or chosen == sorted(chosen)


def test_memory_falls_with_the_segments():
    inputs = batch("plain", seq_len=64)
    saved = {}
    for tokens in (64, 8):
        model = lora(tiny_model())
        apply_lemo(model, dataclasses.replace(CONFIG, segment_tokens=tokens))
        with ActivationBytes() as activations:
            model(**inputs).loss.backward()
        saved[tokens] = activations.saved_bytes
    assert saved[8] < 0.5 * saved[64]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"position_ids": torch.tensor([[*range(20), *range(25)]] * 2)}, "packed documents"),
        ({"attention_mask": torch.ones(2, 1, 45, 45, dtype=torch.bool)}, "attention masks"),
        ({"labels": torch.zeros(2, 44, dtype=torch.long)}, "shape of the input"),
        ({"input_ids": None, "inputs_embeds": torch.zeros(2, 45, 32, requires_grad=True)}, "prompt tuning"),
    ],
)
def test_what_cannot_be_cut_is_refused(change, message):
    model = tiny_model()
    apply_lemo(model, CONFIG)
    with pytest.raises(ValueError, match=message):
        model(**{**batch("plain"), **change})


def test_what_cannot_be_cut_is_refused_in_the_warm_up_already():
    model = tiny_model()
    apply_lemo(model, dataclasses.replace(CONFIG, warmup_steps=10)).at_step(0)
    with pytest.raises(ValueError, match="packed documents"):
        model(**batch("packed"))


def test_a_balancing_loss_of_experts_is_refused():
    model = tiny_model("mixtral", output_router_logits=True)
    apply_lemo(model, CONFIG)
    with pytest.raises(ValueError, match="output_router_logits"):
        model(**batch("left"))
    model.config.output_router_logits = False
    with pytest.raises(ValueError, match="output_router_logits"):
        model(**batch("left"), output_router_logits=True)


def test_a_tuple_is_returned_where_one_is_asked_for():
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, CONFIG)
    loss, logits = model(**inputs, return_dict=False)
    output = model(**inputs)
    assert loss == output.loss
    assert torch.equal(logits, output.logits)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_segments_of_padding_alone_change_nothing(implementation):
    model, inputs = tiny_model(implementation=implementation), batch("left")
    inputs["attention_mask"][:, :20] = 0
    inputs["labels"][:, :21] = -100
    with torch.no_grad():
        wanted = model(**inputs).loss
    apply_lemo(model, dataclasses.replace(CONFIG, segment_tokens=8))
    loss, gradients = loss_and_gradients(model, inputs)
    torch.testing.assert_close(loss, wanted, rtol=1e-5, atol=1e-5)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_float16_autocast_is_refused():
    model = tiny_model()
    apply_lemo(model, CONFIG)
    with torch.autocast("cpu", torch.float16), pytest.raises(ValueError, match="loss scaler"):
        model(**batch("plain"))


def test_a_model_without_keys_and_values_is_refused():
    with pytest.raises(ValueError, match="two pieces"):
        apply_lemo(tiny_model("mamba", implementation="eager"), CONFIG)


def test_a_loss_of_its_own_is_refused():
    model = tiny_model()
    model.loss_function = lambda **kwargs: None
    with pytest.raises(ValueError, match="ForCausalLMLoss"):
        apply_lemo(model, dataclasses.replace(CONFIG, loss_segment=0))


def test_hooks_on_a_parameter_run_once():
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, CONFIG)
    _, wanted = loss_and_gradients(model, inputs)
    name = "model.layers.1.mlp.up_proj.weight"
    weight, calls = model.get_parameter(name), []
    weight.register_hook(lambda grad: grad * 3)
    weight.register_post_accumulate_grad_hook(calls.append)
    _, got = loss_and_gradients(model, inputs)
    torch.testing.assert_close(got[name], 3 * wanted[name])
    assert len(calls) == 1


def test_a_graph_that_is_retained_goes_backward_twice():
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, CONFIG)
    _, wanted = loss_and_gradients(model, inputs)
    model.zero_grad()
    loss = model(**inputs).loss
    (loss * 3).backward(retain_graph=True)
    (loss * 2).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name] * 5)


@pytest.mark.parametrize("how", ["argument", "config"])
@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_of_layers_are_refused(name, how):
    model, inputs = tiny_model(implementation="eager"), batch("plain")
    apply_lemo(model, CONFIG)
    if how == "config":
        setattr(model.config, name, True)
    with pytest.raises(ValueError, match=f"{name}=True"):
        model(**inputs, **({name: True} if how == "argument" else {}))


def test_hooks_on_the_embeddings_are_refused_but_those_of_gradients():
    from transformers.integrations.neftune import neftune_post_forward_hook

    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, CONFIG)
    wanted = loss_and_gradients(model, inputs)
    model.enable_input_require_grads()
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5.0
    embeddings.register_forward_hook(neftune_post_forward_hook)
    with pytest.raises(ValueError, match="neftune_post_forward_hook"):
        model(**inputs)


def test_alora_is_refused_by_name():
    model = lora(tiny_model(), alora_invocation_tokens=[5, 6], target_modules=["q_proj"])
    inputs = batch("plain")
    inputs["input_ids"][:, 20:22] = torch.tensor([5, 6])
    apply_lemo(model, CONFIG)
    with pytest.raises(ValueError, match="aLoRA"):
        model(**inputs)


def test_a_training_pass_without_labels_is_refused():
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, CONFIG)
    with pytest.raises(ValueError, match=r'must have `labels`, got none .*mode="exact"'):
        model(**{**inputs, "labels": None})
