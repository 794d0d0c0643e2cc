from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from transformers import AttentionInterface

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.compat import attention_function
from lemo_trainer.informativeness.selection import select_tokens
from lemo_trainer.layers import attention_of_rows, detachment
from lemo_trainer.measure import ActivationBytes, FlopCounter
from lemo_trainer.model.architectures import find_causal_lm
from lemo_trainer.model.calls import layer_arguments, split_arguments
from lemo_trainer.model.capture import dispatching_to

from .tiny import CASES, assert_same_step, batch, checkpointing, lora, loss_and_gradients, tiny_model

CONFIG = LemoConfig(
    mode="detach", shared_blocks=False, keep_ratio=0.4, block_size=4, layers="all", loss_segment=16
)


def cut(x, keep):
    return torch.where(keep, x, x.detach())


def reference_forward(architecture, chosen):
    """The dense layer, with the gradient of the other tokens' keys, values and updates cut."""

    def forward(self, *args, **kwargs):
        x, arguments = layer_arguments(type(self).forward, args, kwargs)
        mask, positions, _ = split_arguments(arguments)
        keep = chosen.pop(0)[..., None]
        attention = architecture.attention_of(self)
        own = attention_function(attention, attention.config._attn_implementation)
        with dispatching_to(attention, "cut"):
            update = architecture.attention_branch(
                self, cut(x, keep), attention_mask=mask, keep=keep, own=own, **positions
            )
        y = x + cut(update, keep)
        update = architecture.mlp_branch(self, x if architecture.is_parallel(self) else y)
        return y + (update if architecture.has_dense_mlp(self) else cut(update, keep))

    return forward


def cut_attention(module, query, key, value, mask, *, keep, own, **options):
    """The model's attention, with keys and values of the other tokens as constants."""
    return own(module, query, cut(key, keep[:, None]), cut(value, keep[:, None]), mask, **options)


AttentionInterface.register("cut", cut_attention)


def spy_on_selection(monkeypatch, chosen):
    def spy(*args):
        index = select_tokens(*args)
        chosen.append(torch.zeros(2, 45, dtype=torch.bool).scatter_(1, index, True))
        return index

    monkeypatch.setattr(detachment, "select_tokens", spy)


@pytest.mark.parametrize(
    ("kind", "name", "rows"),
    [*((kind, name, 4) for kind, name in CASES), ("llama", "left", 256), ("gemma3_text", "packed", 256)],
)
def test_the_forward_is_exact_and_gradients_equal_those_of_a_cut_reference(monkeypatch, kind, name, rows):
    monkeypatch.setattr(attention_of_rows, "QUERIES_OF_A_PIECE", rows)
    model = tiny_model(kind)
    inputs = batch(name)
    with torch.no_grad():
        exact = model(**inputs).loss
    chosen: list[torch.Tensor] = []
    report = apply_lemo(model, CONFIG)
    spy_on_selection(monkeypatch, chosen)
    got = loss_and_gradients(model, inputs)
    torch.testing.assert_close(got[0], exact, rtol=1e-5, atol=1e-5)
    remove_lemo(model)
    assert len(chosen) == 3
    assert all(mask.sum(1).tolist() == [17, 17] for mask in chosen)
    for layer in find_causal_lm(model).layers:
        layer.forward = types.MethodType(reference_forward(report.wiring.architecture, chosen), layer)
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
    for shared_blocks, choices in ((None, 1), (True, 1), (False, 3)):
        apply_lemo(model, dataclasses.replace(CONFIG, shared_blocks=shared_blocks, selector="random"))
        loss_and_gradients(model, batch("plain"))
        remove_lemo(model)
        assert len(chosen) == choices
        chosen.clear()


def test_saved_bytes_and_operations_fall_with_the_kept_share(monkeypatch):
    monkeypatch.setattr("lemo_trainer.layers.checkpointing.NARROW", 4)
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
