from __future__ import annotations

import dataclasses

import pytest
import torch

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.offline.budget import Budget
from lemo_trainer.offline.thresholds import search_thresholds

from .tiny import assert_same_step, batch, loss_and_gradients, tiny_model

CONFIG = LemoConfig(mode="eliminate", block_size=4, layers="all", selector="norm", sink_blocks=0)


def sparse_loss(model, inputs, thresholds):
    apply_lemo(
        model,
        LemoConfig(mode="eliminate", block_size=4, selector="norm", sink_blocks=0, thresholds=thresholds),
    )
    loss = model(**inputs).loss.item()
    remove_lemo(model)
    return loss


def test_the_guard_keeps_the_loss_within_its_budget():
    model, inputs = tiny_model(layers=4), batch("plain")
    dense = model(**inputs).loss.item()
    found = search_thresholds(model, [inputs], CONFIG, max_increase=-0.05)
    assert found.dense_loss == pytest.approx(dense, rel=1e-5)
    assert [row.layer for row in found.layers] == [0, 1, 2, 3]
    assert {row.layer for row in found.layers if row.used} == found.thresholds.keys()
    assert found.loss == pytest.approx(sparse_loss(model, inputs, found.thresholds), rel=1e-5)
    assert found.loss - dense <= -0.05
    for row in found.layers:
        alone = sparse_loss(model, inputs, {row.layer: row.threshold})
        assert row.loss_increase == pytest.approx(alone - dense, abs=1e-4)


def test_a_budget_below_all_costs_leaves_the_model_dense():
    model, inputs = tiny_model(), batch("plain")
    found = search_thresholds(model, [inputs], CONFIG, max_increase=-1.0, rounds=0)
    assert found.thresholds == {}
    assert found.loss == found.dense_loss
    assert [row.threshold for row in found.layers] == [1.0, 1.0, 1.0]


def test_the_model_is_left_as_it_was():
    model, inputs = tiny_model(), batch("plain")
    model.eval()
    classes = [type(layer) for layer in model.model.layers]
    search_thresholds(model, [inputs], CONFIG, rounds=0)
    assert not model.training
    assert [type(layer) for layer in model.model.layers] == classes
    assert "forward" not in vars(model)


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
@pytest.mark.parametrize("kind", ["llama", "mixtral", "phi"])
def test_thresholds_that_every_token_meets_leave_the_step_dense(mode, kind):
    model, inputs = tiny_model(kind), batch("plain")
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, LemoConfig(mode=mode, block_size=4, thresholds={1: 1e-9}, loss_segment=16))
    assert_same_step(loss_and_gradients(model, inputs), wanted)


def test_dropout_is_off():
    inputs = batch("plain")
    losses = [
        search_thresholds(
            tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5), [inputs], CONFIG, rounds=0
        ).loss
        for _ in range(2)
    ]
    assert losses[0] == losses[1]


def test_the_kept_share_is_that_of_all_batches():
    inputs = [batch("plain"), batch("plain", seq_len=64)]
    shares = [
        search_thresholds(tiny_model(), batches, CONFIG, max_increase=10.0, rounds=0).layers[0].kept_share
        for batches in (inputs[:1], inputs[1:], inputs)
    ]
    assert shares[0] != shares[1]
    assert shares[2] == pytest.approx((shares[0] + shares[1]) / 2)


def test_a_share_is_reached_by_a_threshold():
    """Of 11 blocks and a tail of one token, both sub-layers keep the share of blocks that is asked for."""
    model, inputs = tiny_model(), batch("plain", size=1)
    config = dataclasses.replace(CONFIG, recent_blocks=0)
    found = search_thresholds(model, [inputs], config, rounds=0, shares=(0.75, 0.25))
    for layer in range(3):
        shares = [row.kept_share for row in found.layers if row.layer == layer]
        assert shares[1:] == pytest.approx([0.75, 0.25], abs=1 / 11)


def test_a_budget_is_met_and_its_loss_is_measured():
    model, inputs = tiny_model(layers=4), batch("plain")
    found = search_thresholds(
        model, [inputs], CONFIG, rounds=0, shares=(0.75, 0.5, 0.25), budget=Budget.of_shares(0.6, 4)
    )
    used = [row for row in found.layers if row.used]
    assert len({row.layer for row in used}) == len(used) > 0
    assert sum(found.kept_shares) / 4 <= 0.6
    assert found.loss == pytest.approx(sparse_loss(model, inputs, found.thresholds), rel=1e-5)
    assert found.predicted_loss == pytest.approx(found.dense_loss + sum(row.loss_increase for row in used))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    ("place", "message"),
    [
        ("embed_tokens", "The loss of LlamaForCausalLM on a few tokens must be finite, got nan"),
        ("layers.1.mlp.gate_proj", "Layer 2: Block scores must be finite"),
    ],
)
def test_weights_that_are_no_numbers_are_said(place, message, value):
    model = tiny_model()
    model.model.get_submodule(place).weight.data[:, 0] = value
    with pytest.raises(ValueError, match=message):
        search_thresholds(model, [batch("plain")], CONFIG, rounds=0)
    assert "forward" not in vars(model)


def test_a_batch_without_labels_is_said():
    model, inputs = tiny_model(), batch("plain")
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    with pytest.raises(ValueError, match="held-out loss must be a finite number, got nan"):
        search_thresholds(model, [inputs], CONFIG, rounds=0)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("options", "batches", "max_increase", "message"),
    [
        ({"mode": "detach"}, 1, 0.05, "eliminate"),
        ({"selector": "random"}, 1, 0.05, "`selector` must be .* got 'random'"),
        ({}, 1, float("nan"), "`max_increase` must be .* got nan"),
        ({}, 0, 0.05, r"got batches of \[\]"),
        ({"block_size": 64}, 1, 0.05, r"one block of 64 tokens, got batches of \[45\]"),
    ],
)
def test_what_no_search_can_use_is_refused_before_the_model_is_touched(
    options, batches, max_increase, message
):
    model = tiny_model()
    with pytest.raises(ValueError, match=message):
        search_thresholds(
            model,
            [batch("plain")] * batches,
            dataclasses.replace(CONFIG, **options),
            max_increase=max_increase,
        )
    assert "forward" not in vars(model)
