"""Triton kernels of OLLIE's eOperators; `kernels.py` says what each computes.

Legend of dimensions: N batch, F channels, H result, T taps, L positions of the data; for banded products
M rows, W places, K features. `sx_n` is the stride of x in dimension n, in elements.
"""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES = 256  # places of the result that one program of selective_add computes
TILE = 32  # rows, keys and features of the tiles of banded products

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _selective_add(
    x,
    out,
    channels,
    taps1,
    taps2,
    length1,
    length2,
    size1,
    size2,
    sx_n,
    sx_f,
    sx_t1,
    sx_t2,
    sx_l1,
    sx_l2,
    offset1,
    offset2,
    step1,
    step2,
    stride1: tl.constexpr,
    stride2: tl.constexpr,
    places: tl.constexpr,
):
    plane = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * places + tl.arange(0, places)
    inside = at < size1 * size2
    h1 = at // size2 + offset1
    h2 = at % size2 + offset2
    # Shifted by a multiple of the stride, so that division and remainder round down for negative places too.
    whole1 = (h1 + (1 << 20) * stride1) // stride1 - (1 << 20)
    whole2 = (h2 + (1 << 20) * stride2) // stride2 - (1 << 20)
    base = x + plane // channels * sx_n + plane % channels * sx_f
    total = tl.zeros([places], tl.float32)
    for r1 in range((taps1 + stride1 - 1) // stride1):
        tap1 = stride1 * r1 + h1 - whole1 * stride1
        l1 = whole1 + step1 * r1
        rows = inside & (tap1 < taps1) & (l1 >= 0) & (l1 < length1)
        for r2 in range((taps2 + stride2 - 1) // stride2):
            tap2 = stride2 * r2 + h2 - whole2 * stride2
            l2 = whole2 + step2 * r2
            valid = rows & (tap2 < taps2) & (l2 >= 0) & (l2 < length2)
            at_x = tap1 * sx_t1 + tap2 * sx_t2 + l1 * sx_l1 + l2 * sx_l2
            total += tl.load(base + at_x, mask=valid, other=0.0).to(tl.float32)
    tl.store(out + plane * size1 * size2 + at, total.to(out.dtype.element_ty), mask=inside)


def selective_add(
    x: Tensor, size: list[int], stride: list[int], offset: list[int], step: list[int]
) -> Tensor:
    """As `kernels.selective_add`, for float16, bfloat16 and float32."""
    _check_dtype(x)
    batch, channels = x.shape[:2]
    out = x.new_empty(batch, channels, *size)
    if out.numel():
        grid = (batch * channels, triton.cdiv(size[0] * size[1], PLACES))
        _selective_add[grid](
            x, out, channels, *x.shape[2:], *size, *x.stride(), *offset, *step, *stride, places=PLACES
        )
    return out


@triton.jit
def _banded_scores(
    a,
    b,
    out,
    length,
    keys,
    features,
    places,
    dilation,
    offset,
    sa_n,
    sa_m,
    sa_k,
    sb_n,
    sb_m,
    sb_k,
    tile: tl.constexpr,
    operand: tl.constexpr,
):
    """Rows of one remainder by the dilation meet neighbouring keys: a tile of rows times a tile of keys
    is a plain product, whose diagonals are the places."""
    batch = (tl.program_id(0) // dilation).to(tl.int64)
    rest = tl.program_id(0) % dilation
    rows = tl.program_id(1) * tile + tl.arange(0, tile)
    columns = tl.program_id(1) * tile + tl.program_id(2) * tile + tl.arange(0, tile)
    m = rest + dilation * rows
    key = rest + dilation * columns + offset
    has_row, has_key = m < length, (key >= 0) & (key < keys)
    total = tl.zeros([tile, tile], tl.float32)
    for start in range(0, features, tile):
        k = start + tl.arange(0, tile)
        a_MK = tl.load(
            a + batch * sa_n + m[:, None] * sa_m + k[None, :] * sa_k,
            mask=has_row[:, None] & (k < features)[None, :],
            other=0.0,
        )
        b_KM = tl.load(
            b + batch * sb_n + key[None, :] * sb_m + k[:, None] * sb_k,
            mask=has_key[None, :] & (k < features)[:, None],
            other=0.0,
        )
        total += tl.dot(a_MK.to(operand), b_KM.to(operand), input_precision="ieee")
    w = columns[None, :] - rows[:, None]
    tl.store(
        out + (batch * length + m[:, None]) * places + w,
        total.to(out.dtype.element_ty),
        mask=has_row[:, None] & (w >= 0) & (w < places),
    )


def banded_scores(a: Tensor, b: Tensor, places: int, dilation: int, offset: int) -> Tensor:
    """As `kernels.banded_scores`, for float16, bfloat16 and float32."""
    _check_dtype(a)
    batch, length, features = a.shape
    out = a.new_empty(batch, length, places)
    if out.numel():
        rows = triton.cdiv(length, dilation)
        grid = (batch * dilation, triton.cdiv(rows, TILE), triton.cdiv(TILE - 1 + places, TILE))
        sizes = (length, b.shape[1], features, places, dilation, offset)
        _banded_scores[grid](a, b, out, *sizes, *a.stride(), *b.stride(), tile=TILE, operand=_operand(a))
    return out


@triton.jit
def _banded_values(
    a,
    b,
    out,
    length,
    keys,
    features,
    places,
    dilation,
    offset,
    sa_n,
    sa_m,
    sa_w,
    sb_n,
    sb_m,
    sb_k,
    tile: tl.constexpr,
    operand: tl.constexpr,
):
    """A tile of rows times tiles of keys, where A is read along its diagonals."""
    batch = (tl.program_id(0) // dilation).to(tl.int64)
    rest = tl.program_id(0) % dilation
    rows = tl.program_id(1) * tile + tl.arange(0, tile)
    k = tl.program_id(2) * tile + tl.arange(0, tile)
    m = rest + dilation * rows
    has_row, has_k = m < length, k < features
    total = tl.zeros([tile, tile], tl.float32)
    for start in range(0, tile - 1 + places, tile):
        columns = tl.program_id(1) * tile + start + tl.arange(0, tile)
        key = rest + dilation * columns + offset
        w = columns[None, :] - rows[:, None]
        a_MM = tl.load(
            a + batch * sa_n + m[:, None] * sa_m + w * sa_w,
            mask=has_row[:, None] & (w >= 0) & (w < places),
            other=0.0,
        )
        b_MK = tl.load(
            b + batch * sb_n + key[:, None] * sb_m + k[None, :] * sb_k,
            mask=((key >= 0) & (key < keys))[:, None] & has_k[None, :],
            other=0.0,
        )
        total += tl.dot(a_MM.to(operand), b_MK.to(operand), input_precision="ieee")
    tl.store(
        out + (batch * length + m[:, None]) * features + k[None, :],
        total.to(out.dtype.element_ty),
        mask=has_row[:, None] & has_k[None, :],
    )


def banded_values(a: Tensor, b: Tensor, dilation: int, offset: int) -> Tensor:
    """As `kernels.banded_values`, for float16, bfloat16 and float32."""
    _check_dtype(a)
    batch, length, places = a.shape
    features = b.shape[2]
    out = a.new_empty(batch, length, features)
    if out.numel():
        rows = triton.cdiv(length, dilation)
        grid = (batch * dilation, triton.cdiv(rows, TILE), triton.cdiv(features, TILE))
        sizes = (length, b.shape[1], features, places, dilation, offset)
        _banded_values[grid](a, b, out, *sizes, *a.stride(), *b.stride(), tile=TILE, operand=_operand(a))
    return out


def _check_dtype(x: Tensor) -> None:
    if x.dtype not in _DTYPES:
        raise TypeError(
            f"OLLIE's Triton kernels take float16, bfloat16 or float32, got {x.dtype}: cast first."
        )


def _operand(x: Tensor) -> tl.dtype:
    """The dtype of the factors of tl.dot; Triton's interpreter would multiply the bits of bfloat16."""
    return tl.float32 if triton.knobs.runtime.interpret else _DTYPES[x.dtype]
