"""Where tensors lie: with another default device, on a GPU that is only imagined, and on a real one."""

import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensorMode
from transformers import AutoModelForCausalLM

from ripple_loader import RippleConfig, attach, reorder
from ripple_loader.checkpoint.source import open_source
from ripple_loader.offline.active_sets import unpack
from ripple_loader.offline.calibration import calibration_sequences, cut_sequences
from ripple_loader.offline.trace import trace_source
from ripple_loader.online.scratch import staging
from ripple_loader.online.selection import Selection
from ripple_loader.online.selector import Selector
from ripple_loader.report import RippleReport

from .conftest import CALIBRATION, SMALL, load, relative_error, token_ids

NAMES = ["llama", "opt", "mixtral"]


def first_layer(name, model):
    return model.model.decoder.layers[0].activation_fn if name == "opt" else model.model.layers[0].mlp


@torch.no_grad()
@pytest.mark.parametrize("keep", [1.0, 0.5])
@pytest.mark.parametrize("name", NAMES)
def test_another_default_device_changes_nothing(name, keep, reordered):
    layer = first_layer(name, load(reordered(name), dram_budget="200KiB", buffer=1 << 14, keep=keep))
    x = torch.randn(1, 5, 32)
    expected = layer(x)
    with torch.device("meta"):  # as `torch.set_default_device("cuda")` does with a GPU
        torch.testing.assert_close(layer(x), expected)


def test_neurons_are_copied_from_pageable_memory_where_none_is_pinned(monkeypatch):
    empty = torch.empty

    def refused(*size, pin_memory=False, **named):
        if pin_memory:
            raise RuntimeError("pin_memory is beyond the limit of locked memory")
        return empty(*size, **named)

    monkeypatch.setattr(torch, "empty", refused)
    report = RippleReport(directory="", layers=1, neurons=1, budget=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert staging(16, report).shape == (16,)
    assert not report.fallbacks
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.warns(UserWarning, match="copied to the GPU from pageable memory: pin_memory"):
        memory = staging(16, report)
    assert memory.shape == (16,)
    assert not memory.is_pinned()
    assert len(report.fallbacks) == 1


@pytest.mark.gpu
def test_gathered_neurons_lie_in_pinned_memory_beside_a_gpu():
    report = RippleReport(directory="", layers=1, neurons=1, budget=0)
    assert staging(16, report).is_pinned()
    assert not report.fallbacks


def test_calibration_may_lie_anywhere():
    with torch.device("meta"):
        (ids,) = calibration_sequences([[5, 6], {"input_ids": [7]}], lambda: None, 3, 8)
    assert ids.tolist() == [[5, 6, 7]]


@torch.no_grad()
@pytest.mark.parametrize("selected", [False, True])
@pytest.mark.parametrize("name", ["llama", "opt"])
def test_all_that_meets_the_input_is_brought_to_its_device(name, selected, reordered, monkeypatch):
    """Fake tensors stand for a GPU's; an operation on tensors of two devices is an error, as it is there."""
    layer = first_layer(name, load(reordered(name), dram_budget="200KiB", buffer=1 << 14))
    places = np.arange(0, 40, 2) if selected else np.arange(96)

    def select(self, layer, x_TH, activation, low_rank):
        return Selection(places, torch.ones(len(x_TH), 96, dtype=torch.bool) if selected else None)

    monkeypatch.setattr(Selector, "select", select)
    with FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(5, 32, device="cuda")
        assert layer(x).device == x.device


@torch.no_grad()
def test_a_compiled_model(reordered):
    model, ids = load(reordered("llama")), token_ids()
    assert relative_error(torch.compile(model, backend="eager")(ids).logits, model(ids).logits) < 1e-5


CUDA = pytest.mark.gpu


@CUDA
@torch.no_grad()
@pytest.mark.parametrize("device_map", ["cuda", "auto"])
@pytest.mark.parametrize("name", [*NAMES, "gpt2", "qwen3_moe"])
def test_full_keep_on_a_gpu_equals_the_stock_model_there(name, device_map, saved, reordered):
    stock = AutoModelForCausalLM.from_pretrained(saved(name), device_map="cuda")
    config, ids = RippleConfig(dram_budget="200KiB", buffer=1 << 14), token_ids(batch=2).cuda()
    model = AutoModelForCausalLM.from_pretrained(
        reordered(name), quantization_config=config, device_map=device_map
    )
    assert model.device.type == "cuda"
    assert relative_error(model(ids).logits, stock(ids).logits) < 1e-4
    options = {"max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids, **options), stock.generate(ids, **options))


@CUDA
@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.float32) for name in NAMES), ("llama", torch.bfloat16)]
)
def test_keep_on_a_gpu_equals_keep_on_a_cpu(name, dtype, reordered):
    model, ids = load(reordered(name, dtype), keep=0.5), token_ids()
    expected = model(ids).logits
    got = model.to("cuda")(ids.cuda()).logits.cpu()
    assert (
        got - expected
    ).float().norm() < 0.1 * expected.float().norm()  # neurons at the threshold may swap


@CUDA
@torch.no_grad()
def test_a_default_device_loads_onto_the_gpu(reordered):
    ids = token_ids().cuda()
    with torch.device("cuda"):
        model = load(reordered("llama"), keep=0.5)
        assert model.device.type == "cuda"
        assert model.generate(ids, max_new_tokens=3).shape == (1, 27)


@CUDA
@torch.no_grad()
def test_attach_to_a_model_on_a_gpu(saved, reordered):
    stock = AutoModelForCausalLM.from_pretrained(saved("llama"), device_map="cuda")
    model = AutoModelForCausalLM.from_pretrained(saved("llama"), device_map="cuda")
    attach(model, RippleConfig(dram_budget="1MiB"), reordered("llama"))
    ids, options = token_ids().cuda(), {"max_new_tokens": 12, "do_sample": False}
    wanted = stock.generate(ids, **options)
    assert torch.equal(model.generate(ids, **options), wanted)
    # With a static cache transformers compiles the forward call on a GPU.
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), wanted)


@CUDA
@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_a_trace_on_a_gpu(name, saved, tmp_path):
    source = open_source(saved(name))
    found = trace_source(source, cut_sequences(source, CALIBRATION, SMALL), SMALL, tmp_path / "trace")
    assert all(unpack(found.sets(mlp), source.neurons).sum(1).max() == 48 for mlp in range(source.layers))
    cuda = [ids.cuda() for ids in CALIBRATION]
    assert len(reorder(saved(name), tmp_path / "out", cuda, SMALL).orders) == source.layers
