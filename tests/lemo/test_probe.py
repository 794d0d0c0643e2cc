from __future__ import annotations

import pytest
import torch

from lemo_trainer import apply_lemo, remove_lemo
from lemo_trainer.model.architectures import ARCHITECTURES

from .tiny import (
    EXPERTS,
    MODES,
    assert_same_step,
    batch,
    checkpointing,
    leaving_out,
    loss_and_gradients,
    tiny_model,
)

PROBED = {
    "stablelm": {"use_parallel_residual": True},
    "glm4": {},
    "biogpt": {"hidden_dropout_prob": 0.3},
    "bitnet": {},
    "modernbert-decoder": {},
    "granitemoe": {**EXPERTS, "residual_multiplier": 0.5, "logits_scaling": 3.0},
    "ernie4_5_moe": EXPERTS,
    "lfm2": {"layer_types": ["conv", "full_attention", "full_attention"]},
}


@pytest.mark.parametrize("model_type", PROBED)
def test_an_unknown_layer_is_watched_and_its_forward_stays_exact(model_type):
    model = tiny_model(model_type, **PROBED[model_type])
    assert model_type not in ARCHITECTURES
    inputs = batch("left")
    report = apply_lemo(model, leaving_out(keep_ratio=1.0))
    remove_lemo(model)
    assert report.wiring.probed
    assert "found by a probe" in str(report)
    if model_type == "biogpt":  # dropout was there to be found
        assert report.wiring.architecture.after_mlp == "dropout"
        return
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, leaving_out(keep_ratio=1.0))
    assert_same_step(loss_and_gradients(model, inputs), wanted)
    remove_lemo(model)
    for mode in MODES:
        apply_lemo(model, leaving_out(mode))
        got = loss_and_gradients(model, inputs)
        if mode == "detach":
            torch.testing.assert_close(got[0], wanted[0])
        remove_lemo(model)


def test_layers_that_are_no_attention_stay_dense_and_are_named(caplog):
    model = tiny_model("lfm2", **PROBED["lfm2"])
    conv = model.model.layers[0]
    report = apply_lemo(model, leaving_out())
    assert report.patched_layers == (1, 2)
    assert "layers 0 stay dense (Lfm2DecoderLayer, none of whose parts " in str(report)
    assert "conv (Lfm2ShortConv)" in caplog.text
    assert conv._lemo_forward is None
    remove_lemo(model)
    with pytest.raises(ValueError, match=r"`layers` must name a layer that can .*got \(0,\).*Lfm2ShortConv"):
        apply_lemo(model, leaving_out(layers=(0,)))


def test_a_probe_leaves_no_trace():
    model = tiny_model("stablelm", hidden_dropout=0.3)
    model.model.layers[1].mlp.eval()
    checkpointing(model, reentrant=False)

    def state():
        return [
            (name, type(part), part.training, dict(vars(part)), len(part._forward_hooks))
            for name, part in model.named_modules()
        ]

    before, generator = state(), torch.get_rng_state()
    apply_lemo(model, leaving_out())
    assert torch.equal(torch.get_rng_state(), generator)
    remove_lemo(model)
    assert [each[:3] for each in state()] == [each[:3] for each in before]
    assert all(a[3].keys() == b[3].keys() for a, b in zip(state(), before, strict=True))
    assert all(a[3].get("config") is b[3].get("config") for a, b in zip(state(), before, strict=True))
    assert all(a[4] == b[4] for a, b in zip(state(), before, strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
