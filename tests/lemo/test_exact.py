from __future__ import annotations

import dataclasses

import pytest
import torch

from lemo_trainer import apply_lemo
from lemo_trainer.exact import masks, mode
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


@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")  # transformers' own call
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
def test_flex_attention(kind, scheme):
    inputs = batch(kind)
    wanted = loss_and_gradients(tiny_model("gemma3_text"), inputs)
    model = tiny_model("gemma3_text", implementation="flex_attention")
    apply_lemo(model, SCHEMES[scheme])
    with torch.compiler.set_stance("force_eager"):  # or the mask is compiled
        assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["plain", "left", "packed"])
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
def test_large_masks_are_made_segment_by_segment(model_type, kind, implementation, scheme, monkeypatch):
    inputs = batch(kind)
    wanted = loss_and_gradients(tiny_model(model_type), inputs)
    model = tiny_model(model_type, implementation=implementation)
    made = []

    class Noted(masks.LazyMask):
        def __init__(self, rows):
            super().__init__(lambda start, stop: made.append((start, stop)) or rows(start, stop))

    monkeypatch.setattr(masks, "LazyMask", Noted)
    monkeypatch.setattr(masks, "LARGE", 0)
    apply_lemo(model, SCHEMES[scheme])
    made.clear()
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5
    plain = model_type == "llama" and kind == "plain" and implementation == "sdpa"
    assert set(made) == (set() if plain else {(0, 16), (16, 32), (32, 45)})


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_part_in_evaluation_mode_runs_its_own_code(scheme):
    model, inputs = tiny_model(implementation="eager"), batch("left")
    wanted = loss_and_gradients(model, inputs)
    apply_lemo(model, SCHEMES["layers"])
    model.model.layers[1].eval()
    assert relative_error(loss_and_gradients(model, inputs), wanted) < 1e-5
