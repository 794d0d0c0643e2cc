from __future__ import annotations

import dataclasses

import pytest
import torch

from lemo_trainer import apply_lemo
from lemo_trainer.exact import mode
from lemo_trainer.exact.walk import walk_through

from .exact import SCHEMES, relative_error
from .tiny import CASES, KINDS, batch, loss_and_gradients, tiny_model

@pytest.fixture
def in_double(monkeypatch):
    """Parts of models that compute in float32 whatever they get compute in float64."""

    def widened(function):
        def call(*args, **kwargs):
            args = [torch.float64 if value is torch.float32 else value for value in args]
            if kwargs.get("dtype") is torch.float32:
                kwargs["dtype"] = torch.float64
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(torch.Tensor, "to", widened(torch.Tensor.to))
    monkeypatch.setattr(torch.nn.functional, "softmax", widened(torch.nn.functional.softmax))
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


@pytest.fixture(autouse=True)
def walks(monkeypatch):
    """The walks that were begun: without one, a step was dense."""
    begun = []

    def noting(walk, x_BSD):
        begun.append(walk)
        return walk_through(walk, x_BSD)

    monkeypatch.setattr(mode, "walk_through", noting)
    return begun


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("model_type", "kind"), CASES)
def test_gradients_are_those_of_the_dense_step_in_float64(model_type, kind, scheme, in_double, walks):
    model, inputs = tiny_model(model_type).double(), batch(kind)
    model.set_experts_implementation("eager")  # the fast ones know no float64
    wanted = loss_and_gradients(model, inputs)
    report = apply_lemo(model, dataclasses.replace(SCHEMES[scheme], loss_segment=0))
    assert not report.notes
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-10
    assert [len(walk.segments) for walk in walks] == ([3, 3, 3] if scheme == "layers" else [3])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("model_type", KINDS)
def test_gradients_are_those_of_the_dense_step_in_float32(model_type, scheme):
    model, inputs = tiny_model(model_type), batch("right")
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, SCHEMES[scheme])
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5
