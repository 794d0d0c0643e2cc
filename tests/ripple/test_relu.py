"""ReLU families as they are used: neurons that are exactly zero are not read, and nothing changes."""

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.activations import ACT2FN

from ripple_loader import reorder
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.activations import has_exact_zeros
from tests.ripple.conftest import CALIBRATION, SMALL, load, make_model, relative_error, token_ids
from tests.ripple.families import tiny_model

THRESHOLDED = {"threshold": 0.3, "value": 0.0}


class ShiftedReLU(nn.Module):
    """The ReLU of x - 0.3."""

    def forward(self, x):
        return (x - 0.3).relu()


@pytest.fixture(autouse=True)
def thresholded(monkeypatch):
    monkeypatch.setitem(ACT2FN, "thresholded", (nn.Threshold, THRESHOLDED))
    monkeypatch.setitem(ACT2FN, "shifted", ShiftedReLU)


def check(directory, out):
    """Streams fewer neurons than all, and the logits are the dense model's."""
    reorder(directory, out, CALIBRATION, SMALL)
    assert Sidecar(out).header.exact_zeros
    model, stock = load(out), AutoModelForCausalLM.from_pretrained(directory)
    with torch.no_grad():
        for ids in (token_ids(1), token_ids(3), token_ids(8, 2)):
            assert relative_error(model(ids).logits, stock(ids).logits) < 1e-5
            if ids.numel() == 1:
                report = model.ripple_report
                assert 0 < report.active < 0.8 * report.layers * report.neurons


@pytest.mark.parametrize("activation", ["relu", "relu2", "relu6", "thresholded", "shifted"])
@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_gated_model_with_a_relu_is_streamed_by_its_active_neurons(name, activation, tmp_path):
    make_model(name, hidden_act=activation).save_pretrained(tmp_path / "model")
    check(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize("model_type", ["nanochat", "jais2"])
def test_a_probed_model_with_a_squared_relu_is_streamed_by_its_active_neurons(model_type, tmp_path):
    tiny_model(model_type).save_pretrained(tmp_path / "model")
    check(tmp_path / "model", tmp_path / "out")


@pytest.mark.parametrize(
    ("activation", "exact"),
    [
        *((ACT2FN[name], True) for name in ("relu", "relu2", "relu6")),
        *((ACT2FN[name], False) for name in ("silu", "gelu", "gelu_new", "quick_gelu", "mish", "leaky_relu")),
        *((ACT2FN[name], False) for name in ("sigmoid", "tanh", "linear", "gelu_10", "laplace")),
        (nn.Threshold(**THRESHOLDED), True),
        (ShiftedReLU(), True),
        (nn.Threshold(-0.3, 0.0), False),
        (nn.Hardswish(), False),
        (nn.Softshrink(), False),
        (nn.Hardtanh(0.0, 1.0), True),
        (nn.ELU(), False),
        (nn.PReLU(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_activations_with_exact_zeros_are_known(activation, exact):
    assert has_exact_zeros(activation) == exact
