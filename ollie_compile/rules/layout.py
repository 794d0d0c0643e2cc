"""Data-layout transformation: a tensor is rearranged before a product reads it (OLLIE, table 2)."""

from __future__ import annotations

from collections.abc import Iterator

from ollie_compile.expr import Affine, Input, Loop, Ranges, Read, Scope


def rearrange(scope: Scope, position: int) -> Scope:
    """Read factor `position` through a new tensor that has one dimension for each of its iterators.

    Applied to an activation this is im2col; applied to a weight, a transform done ahead of time.
    """
    read = scope.factors[position]
    used = {name for index in read.index for name in index.iterators()}
    loops = tuple(loop for loop in scope.traversal + scope.summation if loop.name in used)
    moved = Read(Scope(loops, (), (read,)), tuple(Affine.of(loop.name) for loop in loops))
    return scope.with_factor(position, moved)


def split_dimensions(scope: Scope, position: int) -> Scope | None:
    """Read factor `position` through T'[.., u, v, ..] = T[.., by * u + v, ..] wherever it is read at
    by * u + v with v in a range of `by` values; None where no dimension is.

    It turns dilation into space-to-batch and strides into space-to-depth.
    """
    read = scope.factors[position]
    loops: list[Loop] = []
    inside: list[Affine] = []
    outside: list[Affine] = []
    rests: list[tuple[Loop, Affine]] = []
    found = False
    for place, (index, (low, high)) in enumerate(zip(read.index, read.tensor.box, strict=True)):
        parts = _whole_and_rest(index, scope.ranges)
        if parts is None:
            whole = Loop(f"d{place}", low, high)
            loops.append(whole)
            inside.append(Affine.of(whole.name))
            outside.append(index)
            continue
        found = True
        by, u, v, const = parts
        first, last = u.bounds(scope.ranges)
        whole = Loop(f"u{place}", first, last + 1)
        loops.append(whole)
        inside.append(Affine.of(whole.name) * by + const)
        outside.append(u)
        if v.terms:
            first, last = v.bounds(scope.ranges)
            rest = Loop(f"v{place}", first, last + 1)
            inside[-1] += Affine.of(rest.name)
            rests.append((rest, v))
    # The remainders come first, beside a batch dimension, and leave the rows of the tensor whole.
    view = Scope((*(loop for loop, _ in rests), *loops), (), (Read(read.tensor, tuple(inside)),))
    moved = Read(view, (*(v for _, v in rests), *outside))
    return scope.with_factor(position, moved) if found else None


def _whole_and_rest(index: Affine, ranges: Ranges) -> tuple[int, Affine, Affine, int] | None:
    """(by, u, v, const) with index = by * u + v + const, the largest `by` > 1 that splits it, or None."""
    for by in sorted({abs(c) for _, c in index.terms if abs(c) > 1}, reverse=True):
        u = Affine(tuple((a, c // by) for a, c in index.terms if c % by == 0), index.const // by)
        v = Affine(tuple((a, c) for a, c in index.terms if c % by))
        low, high = v.bounds(ranges)
        if len(index.terms) > 1 and high - low < by:
            return by, u, v, index.const % by
    return None


def dimension_splitting(scope: Scope) -> Iterator[Scope]:
    """Every factor of a contraction with a dimension that `split_dimensions` splits."""
    if scope.is_contraction:
        for position in range(len(scope.factors)):
            derived = split_dimensions(scope, position)
            if derived is not None:
                yield derived


def layout_transformation(scope: Scope) -> Iterator[Scope]:
    """Every factor of a contraction that reads an input at a compound index."""
    if scope.is_contraction:
        for position, read in enumerate(scope.factors):
            if isinstance(read.tensor, Input) and any(index.compound for index in read.index):
                yield rearrange(scope, position)
