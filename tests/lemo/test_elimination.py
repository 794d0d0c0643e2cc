from __future__ import annotations

import dataclasses
import types

import pytest
import torch

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.informativeness.selection import select_tokens
from lemo_trainer.layers import elimination
from lemo_trainer.model.architectures import find_causal_lm
from lemo_trainer.model.calls import layer_arguments, split_arguments

from .tiny import CASES, assert_same_step, batch, checkpointing, lora, loss_and_gradients, tiny_model

CONFIG = LemoConfig(
    mode="eliminate", keep_ratio=0.4, block_size=4, layers="all", loss_segment=16, mlp_score_tokens=2
)


def reference_forward(architecture, chosen):
    """A layer that computes every token and masks what was not chosen; slow, and plain to see."""

    def forward(self, *args, **kwargs):
        x, arguments = layer_arguments(type(self).forward, args, kwargs)
        attention_mask, positions, _ = split_arguments(arguments)
        keep = chosen.pop(0)  # bool [B, S]
        batch_size, seq_len = keep.shape
        allowed = torch.ones(seq_len, seq_len, dtype=torch.bool).tril()[None, None]
        if attention_mask is not None:
            allowed = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
        allowed = allowed & keep[:, None, None, :]
        mask = torch.zeros(batch_size, 1, seq_len, seq_len).masked_fill(
            ~allowed, torch.finfo(torch.float32).min
        )
        update = architecture.attention_branch(self, x, attention_mask=mask, **positions)
        y = x + update * keep[..., None]
        update = architecture.mlp_branch(self, x if architecture.is_parallel(self) else y)
        return y + update * (1 if architecture.has_dense_mlp(self) else chosen.pop(0)[..., None])

    return forward


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_gradients_equal_those_of_a_mask_based_reference(monkeypatch, kind, name):
    model = tiny_model(kind)
    inputs = batch(name)
    chosen: list[torch.Tensor] = []

    def spy(*args, **kwargs):
        index = select_tokens(*args, **kwargs)
        keep = torch.zeros(2, 45, dtype=torch.bool)
        chosen.append(keep.scatter_(1, index, True))
        return index

    monkeypatch.setattr(elimination, "select_tokens", spy)
    report = apply_lemo(model, CONFIG)
    got = loss_and_gradients(model, inputs)
    remove_lemo(model)
    parts = find_causal_lm(model)
    assert len(chosen) == 6 - len(report.wiring.dense_mlps)
    assert all(keep.sum(1).tolist() == [report.kept_tokens] * 2 for keep in chosen)

    for layer in parts.layers:
        layer.forward = types.MethodType(reference_forward(report.wiring.architecture, chosen), layer)
    assert_same_step(got, loss_and_gradients(model, inputs), rtol=1e-4, atol=1e-5)
    assert not chosen


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_samples_of_a_batch_choose_for_themselves(implementation):
    model = tiny_model(implementation=implementation)
    apply_lemo(model, CONFIG)
    inputs = batch("plain", size=3)
    together = model(**inputs, num_items_in_batch=1).loss
    alone = sum(
        model(**{k: v[b : b + 1] for k, v in inputs.items()}, num_items_in_batch=1).loss for b in range(3)
    )
    torch.testing.assert_close(together, alone)


@pytest.mark.parametrize("selector", ["informativeness", "norm", "random", "recency"])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["plain", "left"])
def test_checkpointing_gives_the_same_step(reentrant, kind, selector):
    model = tiny_model()
    inputs = batch(kind)
    apply_lemo(model, dataclasses.replace(CONFIG, selector=selector))
    torch.manual_seed(5)
    wanted = loss_and_gradients(model, inputs)
    checkpointing(model, reentrant=reentrant)
    torch.manual_seed(5)
    assert_same_step(loss_and_gradients(model, inputs), wanted)


def test_checkpointing_chooses_once(monkeypatch):
    calls = []
    monkeypatch.setattr(elimination, "select_tokens", lambda *a: calls.append(1) or select_tokens(*a))
    model = lora(tiny_model())
    layer = model.get_base_model().model.layers[0]
    apply_lemo(model, CONFIG)
    checkpointing(model.get_base_model(), reentrant=False)
    assert not layer.gradient_checkpointing
    loss_and_gradients(model, batch("plain"))
    assert len(calls) == 2 * 3
    remove_lemo(model)
    assert layer.gradient_checkpointing
