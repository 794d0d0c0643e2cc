"""Splitting the iterators of windows: dilation, strides, large kernels (variable substitution, table 2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from ollie_compile.expr import Affine, Loop, Ranges, Read, Scope
from ollie_compile.rules.boundary import vanishes
from ollie_compile.rules.substitution import split_variable

WINDOWS = (2, 3)  # taps of the small windows that a large one is split into


def dilation_splitting(scope: Scope) -> Iterator[Scope]:
    """Traverse by h // d and h % d where something is read at h + d * ..., for all such h of one d.

    All values that one remainder reads then lie d apart: with dimension splitting, space-to-batch.
    """
    if not scope.is_contraction:
        return
    names: dict[int, set[str]] = {}
    divided = {name for division in scope.divisions() for name in division.of.iterators()}
    whole = {loop.name for loop in scope.traversal} - divided
    for index in scope.indices():
        steps = {abs(c) for _, c in index.terms if abs(c) > 1}
        ones = {str(a) for a, c in index.terms if c == 1 and a in whole}
        for step in steps if ones else ():
            names.setdefault(step, set()).update(ones)
    for step, found in sorted(names.items()):
        derived = scope
        for name in sorted(found):
            derived = _splice(derived, name, step)
        yield derived


def _splice(scope: Scope, name: str, by: int) -> Scope:
    """`split_variable` applied below the views that earlier splits put around the scope."""
    if scope.is_view and isinstance(inner := scope.factors[0].tensor, Scope):
        return scope.over(factors=(Read(_splice(inner, name, by), scope.factors[0].index),))
    return split_variable(scope, name, by, 0)


def split_summed(scope: Scope, by: Mapping[str, int]) -> Scope | None:
    """Sum over q and x with r = low + by * q + x instead of over r, for each r in `by`.

    None where `by` does not divide a range and no factor is 0 beyond its end.
    """
    values: dict[str, Affine] = {}
    loops: list[Loop] = []
    ranges = dict(scope.ranges)
    for loop in scope.summation:
        if loop.name not in by:
            loops.append(loop)
            continue
        step = by[loop.name]
        if loop.extent % step and not _ends_with_zeros(scope, loop):
            return None
        q = Loop(_unused("q", ranges), 0, -(-loop.extent // step))
        ranges[q.name] = (q.low, q.high)
        x = Loop(_unused("x", ranges), 0, step)
        ranges[x.name] = (x.low, x.high)
        values[loop.name] = Affine.of(q.name) * step + Affine.of(x.name) + loop.low
        loops += [q, x]
    factors = scope.map_index(lambda index: index.substitute(values, ranges))
    return scope.over(summation=tuple(loops), factors=factors)


def _ends_with_zeros(scope: Scope, loop: Loop) -> bool:
    """Whether some factor of a product is 0 for all values of `loop` beyond its end."""
    return scope.function == "*" and any(
        vanishes(read, scope.ranges, loop.name, high=loop.high) for read in scope.factors
    )


def _unused(prefix: str, ranges: Ranges) -> str:
    return next(name for n in itertools.count(1) if (name := f"{prefix}{n}") not in ranges)


def stride_splitting(scope: Scope) -> Iterator[Scope]:
    """Sum by r // s and r % s where something is read at s * h + r: with dimension splitting,
    space-to-depth. All such r of one s at once."""
    names: dict[int, set[str]] = {}
    for r, step in _windows(scope):
        if step > 1:
            names.setdefault(step, set()).add(r)
    for step, found in sorted(names.items()):
        derived = split_summed(scope, dict.fromkeys(found, step))
        if derived is not None:
            yield derived


def tap_splitting(scope: Scope) -> Iterator[Scope]:
    """Sum large windows as windows of windows, in each size of `WINDOWS`: a 5x5 as four 3x3, padded."""
    extents = {loop.name: loop.extent for loop in scope.summation}
    taps = {r for r, step in _windows(scope) if step == 1}
    for size in WINDOWS:
        large = {r: size for r in taps if extents[r] > size}
        derived = split_summed(scope, large) if large else None
        if derived is not None:
            yield derived


def _windows(scope: Scope) -> Iterator[tuple[str, int]]:
    """(r, s) for every read at s * h + r + ... of a contraction, r summed with a step of 1."""
    if not scope.is_contraction:
        return
    traversal = {loop.name for loop in scope.traversal}
    summation = {loop.name for loop in scope.summation}
    for read in scope.factors:
        for index in read.index:
            steps = [c for a, c in index.terms if a in traversal]
            taps = [str(a) for a, c in index.terms if a in summation and abs(c) == 1]
            if len(steps) == 1 and len(taps) == 1 and len(index.terms) == 2:
                yield taps[0], abs(steps[0])
