"""Lifting of matrix products, poolings and elementwise functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from ollie_compile.expr import ELEMENTWISE, Affine, Constant, Loop, Read, Scope, Tensor


def matmul(a: Tensor, b: Tensor) -> Scope:
    """torch.matmul of [.., m, k] and [.., k, n] with broadcast leading dimensions; mm and bmm too.

    Raises:
        ValueError: fewer than two dimensions, or sizes that do not fit.
    """
    left, right = shape_of(a), shape_of(b)
    if len(left) < 2 or len(right) < 2 or left[-1] != right[-2]:
        raise ValueError(
            f"matmul needs [.., m, k] and [.., k, n], got {list(left)} and {list(right)}: reshape them first."
        )
    batch = [Loop(f"b{place}", 0, size) for place, size in enumerate(broadcast(left[:-2], right[:-2]))]
    m, n, k = Loop("m", 0, left[-2]), Loop("n", 0, right[-1]), Loop("k", 0, left[-1])
    first = Read(a, (*_aligned(left[:-2], batch), var(m), var(k)))
    second = Read(b, (*_aligned(right[:-2], batch), var(k), var(n)))
    return Scope((*batch, m, n), (k,), (first, second))


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Scope:
    """functional.linear of [.., k] with weight [n, k] and bias [n].

    addmm and baddbmm are `elementwise("+", bias, matmul(a, b))`.
    """
    sizes = shape_of(x)
    lead = [Loop(f"m{place}", 0, size) for place, size in enumerate(sizes[:-1])]
    n, k = Loop("n", 0, shape_of(weight)[0]), Loop("k", 0, sizes[-1])
    product = Scope((*lead, n), (k,), (Read(x, (*map(var, lead), var(k))), Read(weight, (var(n), var(k)))))
    return product if bias is None else elementwise("+", product, bias)


def elementwise(function: str, *tensors: Tensor) -> Scope:
    """A sum ("+"), a product ("*") or a function of `ELEMENTWISE`, with torch's broadcasting.

    Raises:
        ValueError: an unknown function.
    """
    if function not in ELEMENTWISE and function not in "+*":
        known = ", ".join(["+", "*", *ELEMENTWISE])
        raise ValueError(f"`function` must be one of {known}, got {function!r}.")
    sizes = broadcast(*map(shape_of, tensors))
    loops = [Loop(f"i{place}", 0, size) for place, size in enumerate(sizes)]
    factors = tuple(Read(tensor, tuple(_aligned(shape_of(tensor), loops))) for tensor in tensors)
    return Scope(tuple(loops), (), factors, function)


def average_pool(x: Tensor, kernel: Sequence[int], *, stride: Sequence[int], padding: Sequence[int]) -> Scope:
    """avg_pool of [batch, channels, *spatial] that counts its padding."""
    sizes = shape_of(x)
    lead = [Loop(name, 0, size) for name, size in zip("nc", sizes[:2], strict=True)]
    out, taps, positions = [], [], []
    for place, (size, tap, s, p) in enumerate(zip(sizes[2:], kernel, stride, padding, strict=True), start=1):
        out.append(Loop(f"h{place}", 0, (size + 2 * p - tap) // s + 1))
        taps.append(Loop(f"r{place}", 0, tap))
        positions.append(var(out[-1]) * s + var(taps[-1]) - p)
    count = math.prod(kernel)
    share = Constant(f"one_of_{count}", (), (Fraction(1, count),))
    factors = (Read(x, (*map(var, lead), *positions)), Read(share, ()))
    return Scope((*lead, *out), tuple(taps), factors)


def shape_of(tensor: Tensor) -> tuple[int, ...]:
    return tuple(high - low for low, high in tensor.box)


def broadcast(*shapes: Sequence[int]) -> list[int]:
    """The common shape of tensors, as torch broadcasts.

    Raises:
        ValueError: sizes that differ and are not 1.
    """
    length = max(map(len, shapes))
    result = []
    for place in range(-length, 0):
        sizes = {shape[place] for shape in shapes if len(shape) >= -place} - {1}
        if len(sizes) > 1:
            given = " and ".join(str(list(shape)) for shape in shapes)
            raise ValueError(f"Shapes must broadcast, got {given}.")
        result.append(sizes.pop() if sizes else 1)
    return result


def var(loop: Loop) -> Affine:
    return Affine.of(loop.name)


def _aligned(shape: Sequence[int], loops: Sequence[Loop]) -> list[Affine]:
    """Indices of a tensor of `shape` that is broadcast to `loops`."""
    tail = loops[len(loops) - len(shape) :]
    return [var(loop) if size > 1 else Affine() for size, loop in zip(shape, tail, strict=True)]
