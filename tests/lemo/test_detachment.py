from __future__ import annotations

import dataclasses
import functools
import types

import pytest
import torch

from lemo_trainer import LemoConfig, apply_lemo, detachment, remove_lemo
from lemo_trainer.architectures import ARCHITECTURES
from lemo_trainer.measure import ActivationBytes, FlopCounter
from lemo_trainer.selection import select_tokens

from .tiny import assert_same_step, batch, checkpointing, lora, loss_and_gradients, tiny_model

CONFIG = LemoConfig(mode="detach", keep_ratio=0.4, block_size=4, layers="all", loss_segment=16)


def reference_forward(architecture, chosen):
    """The dense layer, with the gradient of the other tokens' keys, values and updates cut."""

    def cut(x, keep):
        return torch.where(keep, x, x.detach())

    def forward(self, hidden_states, attention_mask=None, position_embeddings=None, **kwargs):
        keep = chosen.pop(0)[..., None]
        x = hidden_states
        normed = cut(x, keep)  # what enters norm, projections and attention
        update = architecture.attention_branch(
            self, normed, attention_mask=attention_mask, position_embeddings=position_embeddings
        )
        x = x + cut(update, keep)
        return x + cut(architecture.mlp_branch(self, x), keep)

    return forward


def cut_rows(keep, module, args, output):
    return torch.where(keep.view(2, 45, *[1] * (output.ndim - 2)), output, output.detach())


def spy_on_selection(monkeypatch, chosen):
    def spy(*args):
        index = select_tokens(*args)
        chosen.append(torch.zeros(2, 45, dtype=torch.bool).scatter_(1, index, True))
        return index

    monkeypatch.setattr(detachment, "select_tokens", spy)


@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_the_forward_is_exact(model_type, kind):
    model = tiny_model(model_type)
    inputs = batch(kind)
    with torch.no_grad():
        wanted = model(**inputs).loss
    report = apply_lemo(model, CONFIG)
    torch.testing.assert_close(model(**inputs).loss, wanted, rtol=1e-5, atol=1e-5)
    assert report.kept_tokens == 17


@pytest.mark.parametrize("rows", [4, 256])
@pytest.mark.parametrize("kind", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma2", "granite", "phi3", "olmo2"])
def test_gradients_equal_those_of_a_cut_reference(monkeypatch, model_type, kind, rows):
    monkeypatch.setattr(detachment, "QUERY_ROWS", rows)
    model = tiny_model(model_type)
    inputs = batch(kind)
    chosen: list[torch.Tensor] = []
    spy_on_selection(monkeypatch, chosen)
    apply_lemo(model, CONFIG)
    got = loss_and_gradients(model, inputs)
    remove_lemo(model)
    assert len(chosen) == 3
    masks = [mask.clone() for mask in chosen]
    for layer, mask in zip(model.model.layers, masks, strict=True):
        layer.forward = types.MethodType(reference_forward(ARCHITECTURES[model_type], chosen), layer)
        for name, projection in layer.named_modules():
            # Keys and values of the other tokens meet the chosen queries: cut them behind their projections.
            if name.rpartition(".")[2] in ("k_proj", "v_proj", "qkv_proj", "k_norm"):
                projection.register_forward_hook(functools.partial(cut_rows, mask))
    assert_same_step(got, loss_and_gradients(model, inputs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selector", ["informativeness", "random"])
@pytest.mark.parametrize("shared_blocks", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_step(reentrant, shared_blocks, selector):
    model = lora(tiny_model(), lora_dropout=0.0)
    inputs = batch("left")
    apply_lemo(model, dataclasses.replace(CONFIG, shared_blocks=shared_blocks, selector=selector))
    model.enable_input_require_grads()
    torch.manual_seed(5)
    wanted = loss_and_gradients(model, inputs)
    checkpointing(model.get_base_model(), reentrant=reentrant)
    torch.manual_seed(5)
    assert_same_step(loss_and_gradients(model, inputs), wanted)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_trained_weights_get_their_gradient_under_autocast(mode, checkpointed):
    model = lora(tiny_model(), lora_dropout=0.0)
    inputs = batch("left")
    apply_lemo(model, dataclasses.replace(CONFIG, mode=mode, selector="recency"))
    if checkpointed:
        checkpointing(model.get_base_model(), reentrant=False)
    _, wanted = loss_and_gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        _, got = loss_and_gradients(model, inputs)
    assert got.keys() == wanted.keys()
    assert all(gradient.any() for gradient in got.values())


def test_the_first_layer_chooses_for_all(monkeypatch):
    chosen: list[torch.Tensor] = []
    spy_on_selection(monkeypatch, chosen)
    model = tiny_model()
    apply_lemo(model, dataclasses.replace(CONFIG, shared_blocks=True, selector="random"))
    loss_and_gradients(model, batch("plain"))
    assert len(chosen) == 1


def test_saved_bytes_and_operations_fall_with_the_kept_share(monkeypatch):
    monkeypatch.setattr("lemo_trainer.checkpointing.NARROW", 4)
    inputs = batch("plain", seq_len=40)
    costs = {}
    for checkpointed in (False, True):
        for keep in (1.0, 0.25):
            model = lora(tiny_model())
            if checkpointed:
                checkpointing(model.get_base_model(), reentrant=False)
            apply_lemo(model, dataclasses.replace(CONFIG, keep_ratio=keep, selector="recency"))
            with FlopCounter() as counter, ActivationBytes() as saved:
                loss = model(**inputs).loss
                stored = saved.bytes
                loss.backward()
            costs[checkpointed, keep] = stored, counter.flops
    assert costs[False, 0.25][0] < 0.45 * costs[False, 1.0][0]
    assert costs[False, 0.25][1] < 0.85 * costs[False, 1.0][1]
    assert costs[True, 0.25][1] < 0.75 * costs[True, 1.0][1]
