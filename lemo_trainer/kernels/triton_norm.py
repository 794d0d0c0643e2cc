"""Triton: norms of chosen rows, read straight from the stream.

Legend: M chosen rows, D hidden width, P programs of the backward pass, each with its part of the rows.
"""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PROGRAMS = 512  # of the backward pass; each adds up the weight's gradient over its rows


@triton.jit
def _forward(
    x,
    rows,
    weight,
    bias,
    out,
    mean_out,
    rstd_out,
    width,
    eps,
    sx_n,
    chosen: tl.constexpr,
    centred: tl.constexpr,
    has_bias: tl.constexpr,
    tile: tl.constexpr,
):
    m = tl.program_id(0).to(tl.int64)
    n = tl.load(rows + m) if chosen else m
    d = tl.arange(0, tile)
    inside = d < width
    row = tl.load(x + n * sx_n + d, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(weight + d, mask=inside, other=0.0)
    if centred:
        mean = tl.sum(row) / width
        row = tl.where(inside, row - mean, 0.0)
        tl.store(mean_out + m, mean)
    rstd = 1.0 / tl.sqrt(tl.sum(row * row) / width + eps)
    tl.store(rstd_out + m, rstd)
    if centred:
        y = row * rstd * w.to(tl.float32)
        if has_bias:
            y += tl.load(bias + d, mask=inside, other=0.0).to(tl.float32)
    else:
        y = (row * rstd).to(out.dtype.element_ty).to(tl.float32) * w.to(tl.float32)
    tl.store(out + m * width + d, y.to(out.dtype.element_ty), mask=inside)


def forward(
    x_ND: Tensor, rows_M: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float, centred: bool
) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `torch_norm.forward`."""
    count, width = len(x_ND) if rows_M is None else len(rows_M), x_ND.shape[1]
    out = x_ND.new_empty(count, width)
    mean, rstd = (torch.empty(count, device=x_ND.device) for _ in range(2))
    if count:
        _forward[(count,)](
            x_ND,
            rows_M,
            weight_D,
            bias_D,
            out,
            mean,
            rstd,
            width,
            eps,
            x_ND.stride(0),
            chosen=rows_M is not None,
            centred=centred,
            has_bias=bias_D is not None,
            tile=triton.next_power_of_2(width),
        )
    return out, mean if centred else None, rstd


@triton.jit
def _backward(
    grad,
    x,
    rows,
    weight,
    mean_in,
    rstd_in,
    grad_x,
    grad_weight,
    grad_bias,
    count,
    width,
    sg_m,
    sx_n,
    chosen: tl.constexpr,
    centred: tl.constexpr,
    weight_gradient: tl.constexpr,
    tile: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    d = tl.arange(0, tile)
    inside = d < width
    w = tl.load(weight + d, mask=inside, other=0.0).to(tl.float32)
    total_weight = tl.zeros([tile], tl.float32)
    total_bias = tl.zeros([tile], tl.float32)
    for m in range(program, count, tl.num_programs(0)):
        n = tl.load(rows + m) if chosen else m
        row = tl.load(x + n * sx_n + d, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_in + m)
        if centred:
            row = tl.where(inside, row - tl.load(mean_in + m), 0.0)
        normed = row * rstd
        g = tl.load(grad + m * sg_m + d, mask=inside, other=0.0).to(tl.float32)
        grad_normed = g * w
        gx = grad_normed - normed * (tl.sum(grad_normed * normed) / width)
        if centred:
            gx -= tl.sum(grad_normed) / width
        tl.store(grad_x + m * width + d, (gx * rstd).to(grad_x.dtype.element_ty), mask=inside)
        if weight_gradient:
            total_weight += g * normed
            total_bias += g
    if weight_gradient:
        tl.store(grad_weight + program * width + d, total_weight, mask=inside)
        tl.store(grad_bias + program * width + d, total_bias, mask=inside)


def backward(
    grad_MD: Tensor,
    x_ND: Tensor,
    rows_M: Tensor | None,
    weight_D: Tensor,
    mean_M: Tensor | None,
    rstd_M: Tensor,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """As `torch_norm.backward`."""
    grad_MD = grad_MD if grad_MD.stride(1) == 1 else grad_MD.contiguous()
    count, width = grad_MD.shape
    programs = min(count, PROGRAMS)
    grad_x = x_ND.new_empty(count, width)
    parts = (programs, width) if weight_gradient else (0, width)
    weight_PD, bias_PD = (grad_MD.new_empty(parts, dtype=torch.float32) for _ in range(2))
    if count:
        _backward[(programs,)](
            grad_MD,
            x_ND,
            rows_M,
            weight_D,
            mean_M,
            rstd_M,
            grad_x,
            weight_PD,
            bias_PD,
            count,
            width,
            grad_MD.stride(0),
            x_ND.stride(0),
            chosen=rows_M is not None,
            centred=mean_M is not None,
            weight_gradient=weight_gradient,
            tile=triton.next_power_of_2(width),
        )
    if not weight_gradient:
        return grad_x, None, None
    return grad_x, weight_PD.sum(0), bias_PD.sum(0)
