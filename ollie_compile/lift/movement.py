"""Lifting of operators that only move values: views, pads, slices, concatenations, windows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from fractions import Fraction

from ollie_compile.expr import Affine, Constant, Loop, Read, Scope, Tensor, quotient, ranges_of, remainder
from ollie_compile.lift.products import shape_of, var


def permute(x: Tensor, order: Sequence[int]) -> Scope:
    """x.permute(order); a transposition is one too."""
    loops = _loops(shape_of(x))
    index = tuple(map(var, loops))
    return Scope(tuple(loops[place] for place in order), (), (Read(x, index),))


def pad(x: Tensor, pads: Sequence[tuple[int, int]]) -> Scope:
    """Zeros before and after each dimension; negative numbers cut values off."""
    loops = _loops([size + before + after for size, (before, after) in zip(shape_of(x), pads, strict=True)])
    index = tuple(var(loop) - before for loop, (before, _) in zip(loops, pads, strict=True))
    return Scope(tuple(loops), (), (Read(x, index),))


def narrow(x: Tensor, dim: int, start: int, stop: int, step: int = 1) -> Scope:
    """aten.slice of one dimension, 0 <= start < stop <= size."""
    sizes = list(shape_of(x))
    sizes[dim] = -(-(stop - start) // step)
    loops = _loops(sizes)
    index = [var(loop) for loop in loops]
    index[dim] = index[dim] * step + start
    return Scope(tuple(loops), (), (Read(x, tuple(index)),))


def cat(tensors: Sequence[Tensor], dim: int) -> Scope:
    """torch.cat: a sum, for each part is 0 where the others are."""
    sizes = list(shape_of(tensors[0]))
    parts = [shape_of(tensor)[dim] for tensor in tensors]
    sizes[dim] = sum(parts)
    loops = _loops(sizes)
    factors = []
    for place, tensor in enumerate(tensors):
        index = [var(loop) for loop in loops]
        index[dim] = index[dim] - sum(parts[:place])
        factors.append(Read(tensor, tuple(index)))
    return Scope(tuple(loops), (), tuple(factors), "+")


def stack(tensors: Sequence[Tensor], dim: int) -> Scope:
    """torch.stack: `cat` along a new dimension of size 1."""
    return cat([unsqueeze(tensor, dim) for tensor in tensors], dim)


def unsqueeze(x: Tensor, dim: int) -> Scope:
    sizes = list(shape_of(x))
    loops = _loops([*sizes[:dim], 1, *sizes[dim:]])
    return Scope(tuple(loops), (), (Read(x, tuple(var(loop) for loop in loops if loop is not loops[dim])),))


def view(x: Tensor, shape: Sequence[int]) -> Scope:
    """x.reshape(shape) of a tensor in row-major order.

    Raises:
        ValueError: another number of elements.
    """
    old = shape_of(x)
    if math.prod(old) != math.prod(shape):
        raise ValueError(f"`shape` must hold {math.prod(old)} elements, got {list(shape)}.")
    return strided(x, shape, [math.prod(shape[place + 1 :]) for place in range(len(shape))], 0)


def strided(x: Tensor, shape: Sequence[int], stride: Sequence[int], offset: int) -> Scope:
    """aten.as_strided of a tensor in row-major order, with strides that are not negative."""
    old = shape_of(x)
    loops = _loops(shape)
    ranges = ranges_of(tuple(loops))
    position = Affine(const=offset)
    for loop, step in zip(loops, stride, strict=True):
        position += var(loop) * step
    index = []
    for place, size in enumerate(old):
        below = math.prod(old[place + 1 :])
        whole = quotient(position, below, ranges) if below > 1 else position
        index.append(remainder(whole, size, ranges) if size > 1 else Affine())
    return Scope(tuple(loops), (), (Read(x, tuple(index)),))


def unfold(x: Tensor, dim: int, size: int, step: int) -> Scope:
    """x.unfold(dim, size, step), a strided view of overlapping windows; the window comes last."""
    sizes = list(shape_of(x))
    sizes[dim] = (sizes[dim] - size) // step + 1
    loops = _loops([*sizes, size])
    index = [var(loop) for loop in loops[:-1]]
    index[dim] = index[dim] * step + var(loops[-1])
    return Scope(tuple(loops), (), (Read(x, tuple(index)),))


def index_select(x: Tensor, dim: int, chosen: Sequence[int]) -> Scope:
    """x.index_select with known indices: a slice where they are evenly spaced, else a one-hot matrix."""
    steps = {second - first for first, second in itertools.pairwise(chosen)}
    sizes = list(shape_of(x))
    rows = sizes[dim]
    sizes[dim] = len(chosen)
    loops = _loops(sizes)
    index = [var(loop) for loop in loops]
    if len(steps) <= 1:
        index[dim] = index[dim] * (steps.pop() if steps else 1) + chosen[0]
        return Scope(tuple(loops), (), (Read(x, tuple(index)),))
    values = tuple(Fraction(row == place) for place in chosen for row in range(rows))
    name = f"select_{'_'.join(map(str, chosen))}_of_{rows}"
    summed = Loop("k", 0, rows)
    one_hot = Read(Constant(name, (len(chosen), rows), values), (index[dim], var(summed)))
    index[dim] = var(summed)
    return Scope(tuple(loops), (summed,), (one_hot, Read(x, tuple(index))))


def _loops(sizes: Sequence[int]) -> list[Loop]:
    return [Loop(f"i{place}", 0, size) for place, size in enumerate(sizes)]
