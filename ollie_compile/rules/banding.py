"""Banded products as products of overlapping blocks (variable substitution by skewing, OLLIE, table 2)."""

from __future__ import annotations

from collections.abc import Iterator

from ollie_compile.expr import Affine, Loop, Read, Scope, quotient, remainder


def band_tiling(scope: Scope) -> Iterator[Scope]:
    """L[m, w] Sum[k] A[m, k] * B[m + w + c, k] by blocks of m, half as long as the band is wide.

    With m = T * q + x and j = x + w, every block is the product of T rows of A with the T + W - 1 rows of B
    that they meet, and w is found on its diagonals.
    """
    if not scope.is_contraction or len(scope.factors) != 2:
        return
    traversal = {loop.name: loop for loop in scope.traversal}
    counts = [name for index in scope.indices() for name in set(index.iterators())]
    for index in scope.indices():
        names = [str(a) for a, c in index.terms if a in traversal and c == 1]
        if len(names) != 2 or len(index.terms) != 2:
            continue
        for row, offset in (names, names[::-1]):
            width = traversal[offset].extent
            if counts.count(offset) == 1 and counts.count(row) == 2 and width > 3:
                yield _tiled(scope, traversal[row], traversal[offset], width // 2)


def _tiled(scope: Scope, row: Loop, offset: Loop, size: int) -> Scope:
    q = Loop(scope.fresh("q"), 0, -(-row.extent // size))
    x = Loop(scope.fresh("x"), 0, size)
    j = Loop(scope.fresh("j"), offset.low, offset.high + size - 1)
    position = _var(q) * size + _var(x) + row.low
    ranges = scope.ranges | {loop.name: (loop.low, loop.high) for loop in (q, x, j)}
    values = {row.name: position, offset.name: _var(j) - _var(x)}
    factors = scope.map_index(lambda index: index.substitute(values, ranges))
    lead = tuple(loop for loop in scope.traversal if loop not in (row, offset))
    blocks = Scope((*lead, q, x, j), scope.summation, factors)
    index = (*map(_var, lead), _var(q), _var(x), _var(x) + _var(offset))
    band = Scope((*lead, q, x, offset), (), (Read(blocks, index),))
    shifted = _var(row) - row.low
    found = (quotient(shifted, size, scope.ranges), remainder(shifted, size, scope.ranges))
    return Scope(scope.traversal, (), (Read(band, (*map(_var, lead), *found, _var(offset))),))


def _var(loop: Loop) -> Affine:
    return Affine.of(loop.name)
