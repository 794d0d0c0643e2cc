from __future__ import annotations

import dataclasses

import pytest
import torch

from lemo_trainer import LemoConfig, apply_lemo

from .tiny import BATCHES, CASES, KINDS, batch, loss_and_gradients, tiny_model

LAYERS = LemoConfig(mode="exact", scheme="layers", segment_tokens=16, loss_segment=16)
SEGMENTS = dataclasses.replace(LAYERS, scheme="segments")
SCHEMES = {"layers": LAYERS, "segments": SEGMENTS}


def assert_equal_gradients(got, wanted, tolerance):
    """Loss and every gradient, relative to the largest entry of the one wanted."""
    torch.testing.assert_close(got[0], wanted[0], rtol=tolerance, atol=0)
    assert got[1].keys() == wanted[1].keys()
    for name, gradient in wanted[1].items():
        difference = (got[1][name] - gradient).abs().max()
        assert difference <= tolerance * gradient.abs().max(), f"{name}: {difference / gradient.abs().max():.1e}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_gradients_are_those_of_the_dense_step(model_type, kind, scheme):
    model = tiny_model(model_type).double()
    inputs = batch(kind)
    config = dataclasses.replace(SCHEMES[scheme], loss_segment=0)
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, config)
    assert_equal_gradients(loss_and_gradients(model, inputs), wanted, 1e-10)
