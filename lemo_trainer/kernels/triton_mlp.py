"""Triton: the middle of a gated MLP. Legend: N elements."""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit
def _forward(gate, up, out, count, tile: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = n < count
    g = tl.load(gate + n, mask=inside, other=0.0).to(tl.float32)
    active = (g / (1.0 + tl.exp(-g))).to(out.dtype.element_ty).to(tl.float32)
    u = tl.load(up + n, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + n, (active * u).to(out.dtype.element_ty), mask=inside)


@triton.jit
def _backward(grad, gate, up, grad_gate, grad_up, count, tile: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * tile + tl.arange(0, tile)
    inside = n < count
    d = tl.load(grad + n, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + n, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + n, mask=inside, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-g))
    active = g * sigmoid
    slope = sigmoid + active * (1.0 - sigmoid)
    tl.store(grad_gate + n, (d * u * slope).to(grad_gate.dtype.element_ty), mask=inside)
    tl.store(grad_up + n, (d * active).to(grad_up.dtype.element_ty), mask=inside)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """As `torch_mlp.forward`."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    if count := gate.numel():
        _forward[(triton.cdiv(count, TILE),)](gate, up, out, count, tile=TILE)
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """As `torch_mlp.backward`."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    grad_gate, grad_up = torch.empty_like(gate), torch.empty_like(up)
    if count := gate.numel():
        _backward[(triton.cdiv(count, TILE),)](grad, gate, up, grad_gate, grad_up, count, tile=TILE)
    return grad_gate, grad_up
