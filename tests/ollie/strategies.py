"""Random convolutions and expressions, small enough to be evaluated exactly."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st

from ollie_compile.expr import Affine, Input, Loop, Read, Scope, parse, quotient, remainder
from ollie_compile.problems.operators import Convolution, Layout

FORCED = {
    "tune": "model",
    "margin": 0.0,
    "budget_s": 120,
    "max_depth": 0,
    "candidates": 1,
    "portable": True,
}
"""Options by which everything is rewritten that can be, without a kernel to compile."""


def operator(x: torch.Tensor, weight: torch.Tensor, **settings: Any) -> Convolution:
    """The operator of a convolution of these tensors; settings as in torch, per dimension or one int."""
    dims = x.dim() - 2
    full = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0} | settings
    transposed, groups = full.pop("transposed", False), full.pop("groups", 1)
    sizes = {
        name: (value,) * dims if isinstance(value, int) else tuple(value) for name, value in full.items()
    }
    out = torch.ops.aten.convolution.default(
        x,
        weight,
        None,
        sizes["stride"],
        sizes["padding"],
        sizes["dilation"],
        transposed,
        sizes["output_padding"],
        groups,
    )
    layouts = [Layout(tuple(t.shape), tuple(t.stride())) for t in (x, weight, out)]
    return Convolution(
        input=layouts[0],
        weight=layouts[1],
        output=layouts[2],
        transposed=transposed,
        groups=groups,
        dtype=x.dtype,
        device=x.device,
        **sizes,
    )


@st.composite
def convolutions(draw: st.DrawFn) -> Convolution:
    """1d and 2d, plain (strided, dilated, grouped) and transposed (strided, output-padded)."""
    dims = draw(st.integers(1, 2))
    transposed = draw(st.booleans())
    per_dim = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(dims))  # noqa: E731
    size, taps, stride, padding = per_dim(1, 5), per_dim(1, 4), per_dim(1, 3), per_dim(0, 2)
    batch, channels, outputs = (draw(st.integers(1, 3)) for _ in range(3))
    groups = 1 if transposed else draw(st.integers(1, 2))
    dilation = (1,) * dims if transposed else per_dim(1, 2)
    extra = tuple(draw(st.integers(0, s - 1)) for s in stride) if transposed else (0,) * dims
    for n, k, s, p, d, e in zip(size, taps, stride, padding, dilation, extra, strict=True):
        assume((n - 1) * s - 2 * p + k + e > 0 if transposed else n + 2 * p - d * (k - 1) > 0)
    shape = (channels, outputs) if transposed else (outputs * groups, channels)
    return operator(
        torch.zeros(batch, channels * groups, *size),
        torch.zeros(*shape, *taps),
        stride=stride,
        padding=padding,
        dilation=dilation,
        output_padding=extra,
        transposed=transposed,
        groups=groups,
    )


@st.composite
def expressions(draw: st.DrawFn, depth: int = 2) -> Scope:
    """Any small scope: products, sums and functions of reads at affine indices with divisions, nested."""
    loops = []
    for name in ("a", "b", "c", "k", "r")[: draw(st.integers(1, 5))]:
        low = draw(st.integers(-2, 2))
        loops.append(Loop(name, low, low + draw(st.integers(1, 4))))
    cut = draw(st.integers(1, len(loops)))
    ranges = {loop.name: (loop.low, loop.high) for loop in loops}
    function = draw(st.sampled_from(["*", "*", "*", "+", "relu", "sigmoid"]))
    count = 1 if function in ("relu", "sigmoid") else draw(st.integers(1, 3))
    factors = []
    for place in range(count):
        inner: Input | Scope
        if depth and draw(st.integers(0, 3)) == 0:
            inner = draw(expressions(depth=depth - 1))
        else:
            shape = tuple(draw(st.lists(st.integers(1, 5), min_size=1, max_size=3)))
            inner = Input(f"{'ABC'[place]}{depth}_{'x'.join(map(str, shape))}", shape)
        index = tuple(draw(_indices(ranges)) for _ in inner.box)
        factors.append(Read(inner, index))
    return Scope(tuple(loops[:cut]), tuple(loops[cut:]), tuple(factors), function)


KINDS = 9


@st.composite
def contractions(draw: st.DrawFn, kinds: tuple[int, ...] = tuple(range(KINDS))) -> Scope:
    """Windows, bands, products of sums, sums of products and products of products, of random sizes."""
    pick = lambda low, high: draw(st.integers(low, high))  # noqa: E731
    h, c, r, f, at = pick(1, 6), pick(1, 3), pick(1, 5), pick(2, 5), pick(1, 4)
    stride, dilation, pad = pick(1, 3), pick(1, 3), pick(0, 2)
    tensors = {
        "A": Input("A", (c, pick(1, 9))),
        "K": Input("K", (f, c, r)),
        "L": Input("L", (pick(1, 3), c, r)),
        "P": Input("P", (h, c)),
        "Q": Input("Q", (pick(1, 9), c)),
        "R": Input("R", (c, f)),
        "S": Input("S", (f, r)),
        "T": Input("T", (c, pick(1, 3))),
    }
    window = f"Sum[c:0..{c}, r:0..{r}] A[c, {stride}*h + {dilation}*r - {pad}]"
    product = f"{{L[h:0..{h}, f:0..{f}] Sum[c:0..{c}] P[h, c] * R[c, f]}}[h, f]"
    moved = draw(st.sampled_from(["f", "f - 1"]))
    other = f"{{L[h:0..{h}, f:0..{f}] Sum[k:0..{c}] P[h, k] * T[k, f]}}[h, {moved}]"
    taps = f"{{L[f:0..{f}, c:0..{c}, r:0..{r}] K[f, c, r] + L[f - {at}, c, r]}}[f, c, r]"
    both = f"{{L[c:0..{c}, f:0..{f}] R[c, f] + T[c, f - {at}]}}[c, f]"
    cut = pick(1, f - 1)
    parts = [
        f"{{L[h:0..{h}, f:{low}..{high}] Sum[c:0..{c}] P[h, c] * R[c, f]}}[h, f]"
        for low, high in ((0, cut), (cut, f))
    ]
    texts = (
        f"L[h:0..{h}, f:0..{f}] {window} * K[f, c, r]",
        f"L[h:0..{h}, f:0..{f}] {window} * {taps}",
        f"L[h:0..{h}, f:0..{f}] Sum[c:0..{c}] P[h, c] * {both}",
        f"L[h:0..{h}, f:0..{f}] {product} + {other}",
        f"L[h:0..{h}, f:0..{f}] {parts[0]} + {parts[1]}",
        f"L[h:0..{h}, r:0..{r}] Sum[f:0..{f}] {product} * S[f, r]",
        f"L[h:0..{h}, f:0..{f + 2}] Sum[c:0..{c}] P[h, c] * Q[h + f - {pad}, c]",
        f"L[h:0..{h}, f:0..{f}] {window} * K[0, c, r]",
        f"L[h:0..{h}, f:0..{f}] Sum[c:0..{c}, r:0..{r}] A[c, (h + {pad}) // 2 + r] * K[f, c, r]",
    )
    return parse(texts[draw(st.sampled_from(kinds))], tensors)


@st.composite
def _indices(draw: st.DrawFn, ranges: dict[str, tuple[int, int]]) -> Affine:
    steps = st.sampled_from([1, 1, 1, -1, 2, 3])
    names = draw(st.lists(st.sampled_from(sorted(ranges)), max_size=3, unique=True))
    total = Affine(const=draw(st.integers(-2, 2)))
    for name in names:
        total += Affine.of(name) * draw(steps)
    kind = draw(st.sampled_from(["affine", "affine", "affine", "quotient", "remainder"]))
    if kind == "affine":
        return total
    return (quotient if kind == "quotient" else remainder)(total, draw(st.integers(2, 4)), ranges)
