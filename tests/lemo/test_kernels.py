"""LeMo's kernels: references, Triton's under its interpreter and on a GPU, and the norms of models."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from lemo_trainer import apply_lemo, remove_lemo
from lemo_trainer.kernels.attention import attend
from lemo_trainer.kernels.norm import norm_rows
from lemo_trainer.measure import ActivationBytes
from lemo_trainer.model.norms import recognise
from lemo_trainer.session import session_of

from . import kernel_cases
from .tiny import (
    assert_same_step,
    batch,
    checkpointing,
    leaving_out,
    lora,
    loss_and_gradients,
    tiny_model,
)


def test_triton_kernels_equal_their_references_under_the_interpreter():
    """In a process of its own: the interpreter is chosen when triton is imported."""
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "tests.lemo.kernel_cases"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
def test_triton_kernels_equal_their_references_on_a_gpu():
    kernel_cases.check("cuda")


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("rows", [None, torch.tensor([0, 2, 3, 5])])
def test_norm_rows_has_the_gradients_of_its_formula(rows, centred):
    torch.manual_seed(0)
    x, weight, bias = (
        torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((2, 3, 5), (5,), (5,))
    )
    bias = bias if centred else None
    norm = nn.LayerNorm(5, eps=1e-3) if centred else nn.RMSNorm(5, eps=1e-3)
    with torch.no_grad():
        norm.double().weight.copy_(weight)
        if centred:
            norm.bias.copy_(bias)
    picked = x if rows is None else x.flatten(0, 1)[rows].unflatten(0, (2, -1))
    torch.testing.assert_close(norm_rows(x, rows, weight, bias, eps=1e-3, centred=centred), norm(picked))

    def normed(x, weight, *bias):
        return norm_rows(x, rows, weight, *bias, eps=1e-3, centred=centred)

    assert torch.autograd.gradcheck(normed, (x, weight, bias) if centred else (x, weight))


def test_norm_rows_saves_the_stream_and_a_number_a_row():
    x = torch.randn(2, 64, 32, requires_grad=True)
    weight = torch.ones(32, requires_grad=True)
    rows = torch.arange(0, 128, 2)
    with ActivationBytes() as activations:
        y = norm_rows(x, rows, weight, eps=1e-6)
        assert activations.bytes == y.nbytes + len(rows) * 4
    square = x.add(0)
    y = norm_rows(square, rows, weight, eps=1e-6)
    square.add_(1)  # autograd refuses what was saved of a stream that is overwritten
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_attention_by_positions_equals_dense_attention():
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, h, 9, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2))
    dense = nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=0.3, enable_gqa=True
    )
    index = torch.tensor([[0, 3, 8], [1, 2, 5]])
    chosen = torch.stack([query[b, :, index[b]] for b in range(2)])
    got = attend(chosen, key, value, index, scaling=0.3)
    torch.testing.assert_close(got, torch.stack([dense[b, :, index[b]] for b in range(2)]).transpose(1, 2))
    arguments = (chosen.detach().requires_grad_(), key, value)
    assert torch.autograd.gradcheck(lambda *qkv: attend(*qkv, index, scaling=0.3), arguments, fast_mode=True)


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_an_mlp_in_segments_gives_the_same_step_with_fewer_bytes(monkeypatch, mode, checkpointed):
    monkeypatch.setattr("lemo_trainer.layers.checkpointing.NARROW", 4)
    model, inputs = lora(tiny_model(intermediate_size=256), lora_dropout=0.0), batch("left")
    if checkpointed:
        checkpointing(model.get_base_model(), reentrant=False)
    config = leaving_out(mode, selector="recency", keep_ratio=0.8)
    steps, costs = [], []
    for segment in (0, 5):
        apply_lemo(model, dataclasses.replace(config, mlp_segment=segment))
        with ActivationBytes() as activations:
            steps.append(loss_and_gradients(model, inputs))
        costs.append((activations.saved_bytes, activations.peak_bytes))
        remove_lemo(model)
    assert_same_step(*steps)
    assert costs[1][1] < 0.9 * costs[0][1]
    assert checkpointed or costs[1][0] < 0.6 * costs[0][0]


def norm_of(kind):
    return tiny_model(kind, layers=1).model.layers[0].post_attention_layernorm


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_are_recognised_by_what_they_compute(dtype):
    def recognised(module):
        return recognise(module.to(dtype)) is not None

    assert recognised(norm_of("llama"))
    assert recognised(nn.LayerNorm(8))
    assert not recognised(norm_of("gemma"))  # 1 + weight
    assert not recognised(nn.LayerNorm(8, elementwise_affine=False))
    assert recognised(norm_of("olmo2")) == (dtype == torch.float32)  # rounds behind the weight

    class CentredRMSNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x):
            x = x - x.mean(-1, keepdim=True)
            return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)

    assert not recognised(CentredRMSNorm())


def test_a_touched_norm_runs_by_itself():
    norm = norm_of("llama")
    x = torch.randn(2, 3, 32)
    recognised = recognise(norm)
    assert recognised.fits(x)
    assert not recognised.fits(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        assert not recognised.fits(x)
    hook = norm.register_forward_hook(lambda *_: None)
    assert not recognised.fits(x)
    hook.remove()
    norm.forward = lambda x: x
    assert not recognised.fits(x)


@pytest.mark.parametrize("mode", ["detach", "eliminate"])
def test_fused_norms_change_no_step_and_save_fewer_bytes(mode):
    model, inputs = tiny_model(), batch("left")
    config = leaving_out(mode, selector="recency", selective_checkpointing=False)
    steps, saved = [], []
    for fused in (False, True):
        report = apply_lemo(model, dataclasses.replace(config, fused_kernels=fused))
        with ActivationBytes() as activations:
            steps.append(loss_and_gradients(model, inputs))
        saved.append(activations.saved_bytes)
        session_of(model).passes.without_gradient = True  # as a search of thresholds does
        with torch.no_grad():  # the rows are read straight from the stream
            torch.testing.assert_close(model(**inputs).loss, steps[0][0])
        remove_lemo(model)
    assert report.kernels == "in torch: rows added in place, norms (6 LlamaRMSNorm)"
    assert_same_step(*steps)
    assert saved[1] < 0.95 * saved[0]
