from __future__ import annotations

import dataclasses

import pytest
import torch

from lemo_trainer import LemoConfig, apply_lemo
from lemo_trainer.session import session_of

from .tiny import batch, loss_and_gradients, tiny_model

CONFIG = LemoConfig(mode="detach", keep_ratio=0.4, block_size=4, layers="all", loss_segment=16)


def test_the_kept_share_falls_over_the_ramp():
    model = tiny_model()
    report = apply_lemo(model, dataclasses.replace(CONFIG, warmup_steps=2, ramp_steps=2))
    shares = []
    for step in range(6):
        report.at_step(step)
        plan = session_of(model).plan(0, 400)
        shares.append(1.0 if plan is None else plan.kept_tokens / 400)
    assert shares == [1.0, 1.0, 0.8, 0.6, 0.4, 0.4]


def test_thresholds_say_how_much_each_layer_keeps():
    model, inputs = tiny_model(), batch("plain", seq_len=64)
    report = apply_lemo(model, dataclasses.replace(CONFIG, mode="eliminate", thresholds="0:0,2:1.2"))
    model(**inputs)
    assert report.patched_layers == (0, 2)
    shares = report.layer_shares
    assert shares[0] == 1.0
    assert 0.1 < shares[2] < 0.9


def test_a_last_layer_that_keeps_everything_counts_all_labels():
    config = dataclasses.replace(CONFIG, mode="eliminate", label_weights="kept")
    for thresholds, counted in (("0:1.2", False), ("0:1.2,2:0", True)):
        model, inputs = tiny_model(), batch("plain", seq_len=64)
        apply_lemo(model, dataclasses.replace(config, thresholds=thresholds))
        model(**inputs)
        assert (session_of(model).label_weights() is None) == counted


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_label_weights_follow_the_choices(mode):
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, dataclasses.replace(CONFIG, mode=mode, label_weights="share"))
    choices = 3 if mode == "detach" else 6
    model(**inputs)
    share = session_of(model).label_weights()
    assert share.shape == (2, 45)
    assert torch.equal((share * choices).round(), share * choices)
    assert share.mean() == pytest.approx(17 / 45)


def test_labels_of_tokens_that_were_left_out_give_no_gradient():
    config = dataclasses.replace(CONFIG, shared_blocks=True, selector="recency")
    model, inputs = tiny_model(), batch("plain")
    apply_lemo(model, config)
    loss, everything = loss_and_gradients(model, inputs)
    model = tiny_model()
    apply_lemo(model, dataclasses.replace(config, label_weights="kept"))
    same, kept = loss_and_gradients(model, inputs)
    torch.testing.assert_close(same, loss)
    left_out = session_of(model).label_weights()[0] == 0
    labels = inputs["labels"].clone()
    labels[:, 1:][:, left_out[:-1]] = -100
    model = tiny_model()
    apply_lemo(model, config)
    count = (inputs["labels"][:, 1:] != -100).sum()
    _, wanted = loss_and_gradients(model, {**inputs, "labels": labels, "num_items_in_batch": count})
    torch.testing.assert_close(kept, wanted, rtol=1e-5, atol=1e-5)
    # What the labels of left-out tokens gave the layers all came through the residual connection: nothing.
    for name in kept:
        if "layers" in name:
            torch.testing.assert_close(kept[name], everything[name], rtol=1e-4, atol=1e-5)


def test_blocks_with_labels_are_protected():
    model, inputs = tiny_model(), batch("plain")
    inputs["labels"][:, :28] = -100
    apply_lemo(
        model, dataclasses.replace(CONFIG, protect_labels=True, label_weights="kept", selector="random")
    )
    model(**inputs)
    kept = session_of(model).label_weights()
    assert kept[:, 32:].sum() >= 2 * 9
    assert kept[:, 4:28].sum() == 0
