"""Triton: attention of queries at given positions, as FlashAttention tiles it (arXiv 2307.08691).

Legend: B batch, K queries, T keys, H query heads, G key heads, d head width; tiles of M queries and N keys.
`sq_b` is the stride of the queries in the batch, in elements; heads are contiguous in d.
"""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lemo_trainer.kernels.dispatch import interpreted

TILE_ROWS = 64  # queries, and keys, of a tile
TILE_BYTES = 16384  # limit on a tile's queries or keys; wider heads and dtypes get tiles of fewer rows

_DTYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


@triton.jit
def _load(x, base, rows, stride, columns, inside, operand: tl.constexpr):
    """The tile of `x` at these rows and columns as `operand`, 0 where not `inside`."""
    tile = tl.load(x + base + rows[:, None] * stride + columns[None, :], mask=inside, other=0.0)
    return tile.to(operand)


@triton.jit
def _forward(
    q,
    k,
    v,
    positions,
    out,
    lse,
    heads,
    shared,
    queries,
    keys,
    width,
    scaling,
    sq_b,
    sq_h,
    sq_m,
    sk_b,
    sk_h,
    sk_n,
    sv_b,
    sv_h,
    sv_n,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_d: tl.constexpr,
    operand: tl.constexpr,
):
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    m = tl.program_id(0) * tile_m + tl.arange(0, tile_m)
    d = tl.arange(0, tile_d)
    has_query, has_d = m < queries, d < width
    at_M = tl.load(positions + batch * queries + m, mask=has_query, other=-1)  # -1 meets no key
    here = has_query[:, None] & has_d[None, :]
    q_Md = _load(q, batch * sq_b + head * sq_h, m, sq_m, d, here, operand)
    top = tl.full([tile_m], float("-inf"), tl.float32)
    total = tl.zeros([tile_m], tl.float32)
    sum_Md = tl.zeros([tile_m, tile_d], tl.float32)
    end = tl.minimum(keys, tl.max(at_M) + 1)
    for start in range(0, end, tile_n):
        n = start + tl.arange(0, tile_n)
        inside = (n < keys)[:, None] & has_d[None, :]
        k_Nd = _load(k, batch * sk_b + (head // shared) * sk_h, n, sk_n, d, inside, operand)
        met = (n < keys)[None, :] & (n[None, :] <= at_M[:, None])
        s_MN = tl.dot(q_Md, tl.trans(k_Nd), input_precision="ieee") * scaling
        s_MN = tl.where(met, s_MN, float("-inf"))
        higher = tl.maximum(top, tl.max(s_MN, 1))
        base_M = tl.where(higher == float("-inf"), 0.0, higher)
        p_MN = tl.exp(s_MN - base_M[:, None])
        fade = tl.exp(top - base_M)
        total = total * fade + tl.sum(p_MN, 1)
        v_Nd = _load(v, batch * sv_b + (head // shared) * sv_h, n, sv_n, d, inside, operand)
        p_MN = p_MN.to(v.dtype.element_ty).to(operand)
        sum_Md = sum_Md * fade[:, None] + tl.dot(p_MN, v_Nd, input_precision="ieee")
        top = higher
    sum_Md = sum_Md / tl.where(total == 0.0, 1.0, total)[:, None]
    row = (batch * queries + m) * heads + head
    tl.store(out + row[:, None] * width + d[None, :], sum_Md.to(out.dtype.element_ty), mask=here)
    lse_M = tl.where(total == 0.0, float("inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse + row, lse_M, mask=has_query)


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor]:
    """Outputs [B, K, H, d], and the logarithm [B, K, H] of each query's sum of exponentials (inf: no key)."""
    query, key, value = (_rows_contiguous(x) for x in (query, key, value))
    batch, heads, queries, width = query.shape
    out = query.new_empty(batch, queries, heads, width)
    lse = query.new_empty(batch, queries, heads, dtype=torch.float32)
    if out.numel():
        tiles = _tiles(query)
        grid = (triton.cdiv(queries, tiles["tile_m"]), batch * heads)
        _forward[grid](
            query,
            key,
            value,
            positions.contiguous(),
            out,
            lse,
            heads,
            heads // key.shape[1],
            queries,
            key.shape[2],
            width,
            scaling,
            *query.stride()[:3],
            *key.stride()[:3],
            *value.stride()[:3],
            **tiles,
        )
    return out, lse


@triton.jit
def _recompute(q, q_Md, k_Nd, g_Md, v_Nd, at_M, lse_M, delta_M, n, keys, scaling, operand: tl.constexpr):
    """The probabilities [M, N] and the gradient of the products of queries and keys, rounded as `q` is."""
    met = (n < keys)[None, :] & (n[None, :] <= at_M[:, None])
    s_MN = tl.dot(q_Md, tl.trans(k_Nd), input_precision="ieee") * scaling
    p_MN = tl.where(met, tl.exp(s_MN - lse_M[:, None]), 0.0)
    grad_p_MN = tl.dot(g_Md, tl.trans(v_Nd), input_precision="ieee")
    grad_s_MN = p_MN * (grad_p_MN - delta_M[:, None]) * scaling
    return p_MN.to(q.dtype.element_ty).to(operand), grad_s_MN.to(q.dtype.element_ty).to(operand)


@triton.jit
def _backward_query(
    q,
    k,
    v,
    positions,
    grad,
    lse,
    delta,
    grad_q,
    heads,
    shared,
    queries,
    keys,
    width,
    scaling,
    sq_b,
    sq_h,
    sq_m,
    sk_b,
    sk_h,
    sk_n,
    sv_b,
    sv_h,
    sv_n,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_d: tl.constexpr,
    operand: tl.constexpr,
):
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    m = tl.program_id(0) * tile_m + tl.arange(0, tile_m)
    d = tl.arange(0, tile_d)
    has_query, has_d = m < queries, d < width
    here = has_query[:, None] & has_d[None, :]
    at_M = tl.load(positions + batch * queries + m, mask=has_query, other=-1)  # -1 meets no key
    row = (batch * queries + m) * heads + head
    q_Md = _load(q, batch * sq_b + head * sq_h, m, sq_m, d, here, operand)
    g_Md = _load(grad, 0, row, width, d, here, operand)
    lse_M = tl.load(lse + row, mask=has_query, other=float("inf"))
    delta_M = tl.load(delta + row, mask=has_query, other=0.0)
    total_Md = tl.zeros([tile_m, tile_d], tl.float32)
    end = tl.minimum(keys, tl.max(at_M) + 1)
    for start in range(0, end, tile_n):
        n = start + tl.arange(0, tile_n)
        inside = (n < keys)[:, None] & has_d[None, :]
        k_Nd = _load(k, batch * sk_b + (head // shared) * sk_h, n, sk_n, d, inside, operand)
        v_Nd = _load(v, batch * sv_b + (head // shared) * sv_h, n, sv_n, d, inside, operand)
        _, ds_MN = _recompute(q, q_Md, k_Nd, g_Md, v_Nd, at_M, lse_M, delta_M, n, keys, scaling, operand)
        total_Md += tl.dot(ds_MN, k_Nd, input_precision="ieee")
    base = ((batch * heads + head) * queries + m) * width
    tl.store(grad_q + base[:, None] + d[None, :], total_Md.to(grad_q.dtype.element_ty), mask=here)


@triton.jit
def _backward_key(
    q,
    k,
    v,
    positions,
    grad,
    lse,
    delta,
    grad_k,
    grad_v,
    heads,
    shared,
    queries,
    keys,
    width,
    scaling,
    sq_b,
    sq_h,
    sq_m,
    sk_b,
    sk_h,
    sk_n,
    sv_b,
    sv_h,
    sv_n,
    tile_m: tl.constexpr,
    tile_n: tl.constexpr,
    tile_d: tl.constexpr,
    operand: tl.constexpr,
):
    """A tile of keys with all queries of the heads that share them, from the first that may meet one."""
    groups = heads // shared
    batch = (tl.program_id(1) // groups).to(tl.int64)
    group = tl.program_id(1) % groups
    first = tl.program_id(0) * tile_n
    n = first + tl.arange(0, tile_n)
    d = tl.arange(0, tile_d)
    inside = (n < keys)[:, None] & (d < width)[None, :]
    k_Nd = _load(k, batch * sk_b + group * sk_h, n, sk_n, d, inside, operand)
    v_Nd = _load(v, batch * sv_b + group * sv_h, n, sv_n, d, inside, operand)
    total_k_Nd = tl.zeros([tile_n, tile_d], tl.float32)
    total_v_Nd = tl.zeros([tile_n, tile_d], tl.float32)
    for start in range(0, queries, tile_m):
        m = start + tl.arange(0, tile_m)
        has_query = m < queries
        at_M = tl.load(positions + batch * queries + m, mask=has_query, other=-1)  # -1 meets no key
        if tl.max(at_M) >= first:
            here = has_query[:, None] & (d < width)[None, :]
            for head in range(group * shared, group * shared + shared):
                row = (batch * queries + m) * heads + head
                q_Md = _load(q, batch * sq_b + head * sq_h, m, sq_m, d, here, operand)
                g_Md = _load(grad, 0, row, width, d, here, operand)
                lse_M = tl.load(lse + row, mask=has_query, other=float("inf"))
                delta_M = tl.load(delta + row, mask=has_query, other=0.0)
                p, ds = _recompute(q, q_Md, k_Nd, g_Md, v_Nd, at_M, lse_M, delta_M, n, keys, scaling, operand)
                total_v_Nd += tl.dot(tl.trans(p), g_Md, input_precision="ieee")
                total_k_Nd += tl.dot(tl.trans(ds), q_Md, input_precision="ieee")
    base = ((batch * groups + group) * keys + n) * width
    tl.store(grad_k + base[:, None] + d[None, :], total_k_Nd.to(grad_k.dtype.element_ty), mask=inside)
    tl.store(grad_v + base[:, None] + d[None, :], total_v_Nd.to(grad_v.dtype.element_ty), mask=inside)


def backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    output: Tensor,
    lse: Tensor,
    *,
    scaling: float,
) -> tuple[Tensor, ...]:
    """Gradients of queries, keys and values."""
    query, key, value = (_rows_contiguous(x) for x in (query, key, value))
    grad = grad.contiguous()
    batch, heads, queries, width = query.shape
    groups, keys = key.shape[1:3]
    delta = (grad.float() * output.float()).sum(-1)
    grads = tuple(torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (query, key, value))
    if output.numel() and keys:
        inputs = (query, key, value, positions.contiguous(), grad, lse, delta)
        sizes = (heads, heads // groups, queries, keys, width, scaling)
        strides = (*query.stride()[:3], *key.stride()[:3], *value.stride()[:3])
        tiles = _tiles(query)
        grid = (triton.cdiv(queries, tiles["tile_m"]), batch * heads)
        _backward_query[grid](*inputs, grads[0], *sizes, *strides, **tiles)
        grid = (triton.cdiv(keys, tiles["tile_n"]), batch * groups)
        _backward_key[grid](*inputs, grads[1], grads[2], *sizes, *strides, **tiles)
    return grads


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _tiles(query: Tensor) -> dict[str, Any]:
    """Tile sizes, and the dtype of the factors of tl.dot: float32 in the interpreter, which multiplies
    bfloat16 as if its bits were integers."""
    operand = tl.float32 if interpreted() else _DTYPES[query.dtype]
    tile_d = max(16, triton.next_power_of_2(query.shape[3]))
    rows = max(16, min(TILE_ROWS, TILE_BYTES // (tile_d * query.element_size())))
    return {"tile_m": rows, "tile_n": rows, "tile_d": tile_d, "operand": operand}
