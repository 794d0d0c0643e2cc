"""Bilinear decomposition: a window of taps through constant matrices (Cook-Toom; Winograd convolution).

One dimension at a time; applied to two dimensions in turn it is the nested F(m x m, r x r).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ollie_compile.expr import Affine, Constant, Loop, Read, Scope, quotient, remainder
from ollie_compile.rules import cook_toom

TILES = (2, 4)


@dataclass(frozen=True, slots=True)
class Correlation:
    """A dimension of a factor that is read at `out + tap + const` or `out - tap + const`.

    What else it is read at, `start`, is traversed too: windows that begin elsewhere.
    """

    data: int
    place: int
    out: Loop
    tap: Loop
    step: int
    start: Affine


def correlations(scope: Scope) -> list[Correlation]:
    """The dimensions of a contraction of two factors that a bilinear form can compute.

    The data must be read at out +- tap, `out` traversed and in no other index, `tap` summed and else only
    in the other factor; something else must be summed too, or nothing is gained. Other iterators of that
    dimension must be traversed and in the other factor.
    """
    if not scope.is_contraction or len(scope.factors) != 2 or scope.terms() != 2:
        return []
    found = [
        correlation
        for data, read in enumerate(scope.factors)
        for place, index in enumerate(read.index)
        for pair in itertools.permutations(index.terms, 2)
        if (correlation := _correlation(scope, data, place, pair)) is not None
    ]
    taps = {correlation.tap.name for correlation in found}
    return found if {loop.name for loop in scope.summation} - taps else []


def _correlation(
    scope: Scope, data: int, place: int, pair: Sequence[tuple[object, int]]
) -> Correlation | None:
    """The correlation of a dimension of the data, with two terms of its index as `out` and `tap`."""
    (out, one), (tap, step) = pair
    traversal = {loop.name: loop for loop in scope.traversal}
    summation = {loop.name: loop for loop in scope.summation}
    if not (isinstance(out, str) and isinstance(tap, str)) or one != 1 or abs(step) != 1:
        return None
    if out not in traversal or tap not in summation:
        return None
    index = scope.factors[data].index[place]
    used = [name for at in scope.factors[data].index for name in set(at.iterators())]
    other = {name for at in scope.factors[1 - data].index for name in at.iterators()}
    begin = index - Affine.of(out) - Affine.of(tap) * step - index.const
    moved = set(begin.iterators())
    if not moved <= traversal.keys() & other or any(begin.divisions()):
        return None
    if any(used.count(name) > 1 for name in (*moved, out, tap)) or out in other or tap not in other:
        return None
    return Correlation(data, place, traversal[out], summation[tap], step, begin)


def decompose(scope: Scope, at: Correlation, tile: int) -> Scope:
    """The bilinear form of one dimension, `tile` places of it at a time.

    Raises:
        ValueError: more products than `cook_toom.LARGEST`.
    """
    output, weight, data = cook_toom.matrices(tile, at.tap.extent)
    i = Loop(scope.fresh("i"), 0, data.shape[0])
    q, x = Loop(scope.fresh("q"), 0, -(-at.out.extent // tile)), Loop(scope.fresh("x"), 0, tile)
    moved, held = _transformed_data(scope, at, data, i, q, tile), _transformed_weight(scope, at, weight, i)
    by_data = {name for index in moved.index for name in index.iterators()}
    lead = [q if loop == at.out else loop for loop in scope.traversal]
    # Channels last: the transforms then run along contiguous values of one channel dimension.
    order = [loop for loop in lead if loop.name in by_data] + [
        loop for loop in lead if loop.name not in by_data
    ]
    rest = tuple(loop for loop in scope.summation if loop != at.tap)
    factors = (moved, held) if at.data == 0 else (held, moved)
    product = Scope((i, *order), rest, factors)
    place = order.index(q) + 1
    split = (*order[:place], x, *order[place:])
    result = Scope(split, (i,), (Read(output, (_var(x), _var(i))), _whole(product)))
    shifted = _var(at.out) - at.out.low
    index = {loop.name: _var(loop) for loop in scope.traversal} | {
        q.name: quotient(shifted, tile, scope.ranges),
        x.name: remainder(shifted, tile, scope.ranges),
    }
    return Scope(scope.traversal, (), (Read(result, tuple(index[loop.name] for loop in split)),))


def growth(scope: Scope) -> float:
    """How many times larger the values within an expression may get than the direct sum of |products|.

    It holds for inputs of one magnitude, and bounds by how much rounding errors grow: the product over the
    decomposed dimensions, and of the largest absolute row sums of other constants; 1.0 without constants.
    """
    factor = 1.0
    for inner in set(scope.scopes()):
        for constant in (read.tensor for read in inner.factors if isinstance(read.tensor, Constant)):
            if constant.name.startswith("At"):
                tile, products = constant.shape
                factor *= cook_toom.amplification(tile, products - tile + 1)
            elif not constant.name.startswith(("Bt", "G")):
                factor *= max(1.0, _largest_row_sum(constant))
    return factor


def _largest_row_sum(constant: Constant) -> float:
    width = constant.shape[-1] if constant.shape else 1
    rows = (constant.values[at : at + width] for at in range(0, len(constant.values), width))
    return max(float(sum(map(abs, row))) for row in rows)


def bilinear_decomposition(scope: Scope) -> Iterator[Scope]:
    """Every dimension that allows it with one tile size, for each of `TILES`."""
    for tile in TILES:
        derived = _all_dimensions(scope, tile)
        if derived is not None:
            yield derived


def _all_dimensions(scope: Scope, tile: int) -> Scope | None:
    at = next((c for c in correlations(scope) if _fits(c, tile)), None)
    if at is None:
        return None
    derived = decompose(scope, at, tile)
    (view,) = derived.factors
    assert isinstance(view.tensor, Scope)
    (matrix, product) = view.tensor.factors
    assert isinstance(product.tensor, Scope)
    deeper = _all_dimensions(product.tensor, tile)
    if deeper is None:
        return derived
    result = view.tensor.over(factors=(matrix, Read(deeper, product.index)))
    return derived.over(factors=(Read(result, view.index),))


def _fits(at: Correlation, tile: int) -> bool:
    taps = at.tap.extent
    return taps > 1 and tile + taps - 1 <= cook_toom.LARGEST and at.out.extent >= tile


def _transformed_data(scope: Scope, at: Correlation, matrix: Constant, i: Loop, q: Loop, tile: int) -> Read:
    """The read of L[i, q, ...] Sum[j] Bt[i, j] * data[tile * q + j, ...], channels last."""
    read = scope.factors[at.data]
    names = (name for n in itertools.count(1) if (name := f"t{n}") not in scope.ranges)
    summed = {loop.name for loop in scope.summation}
    loops = {loop.name: loop for loop in scope.traversal + scope.summation}
    j = Loop(scope.fresh("j"), 0, matrix.shape[1])
    first = at.tap.low if at.step == 1 else 1 - at.tap.high
    inside: list[Affine] = []
    lead: list[tuple[Loop, Affine]] = []
    channels: list[tuple[Loop, Affine]] = []
    for place, index in enumerate(read.index):
        if place == at.place:
            inside.append(_var(q) * tile + _var(j) + at.start + index.const + at.out.low + first)
            lead += [(loop, _var(loop)) for loop in (loops[name] for name in at.start.iterators())]
            lead.append((q, _var(q)))
            continue
        if not index.terms:
            inside.append(index)
            continue
        loop = loops.get(index.iterator or "")
        if loop is None or index != _var(loop):
            low, high = index.bounds(scope.ranges)
            loop = Loop(next(names), low, high + 1)
        inside.append(_var(loop))
        (channels if loop.name in summed else lead).append((loop, index))
    places = lead + channels
    factors = (Read(matrix, (_var(i), _var(j))), Read(read.tensor, tuple(inside)))
    tensor = Scope((i, *(loop for loop, _ in places)), (j,), factors)
    return Read(tensor, (_var(i), *(index for _, index in places)))


def _transformed_weight(scope: Scope, at: Correlation, matrix: Constant, i: Loop) -> Read:
    """The read of L[i, ...] Sum[tap] G[i, tap] * weight[tap, ...]."""
    read = scope.factors[1 - at.data]
    used = {name for index in read.index for name in index.iterators()} - {at.tap.name}
    loops = [loop for loop in scope.summation + scope.traversal if loop.name in used]
    counted = _var(at.tap) - at.tap.low if at.step == 1 else _var(at.tap) * -1 + at.tap.high - 1
    tensor = Scope((i, *loops), (at.tap,), (Read(matrix, (_var(i), counted)), read))
    return _whole(tensor)


def _whole(tensor: Scope) -> Read:
    return Read(tensor, tuple(map(_var, tensor.traversal)))


def _var(loop: Loop) -> Affine:
    return Affine.of(loop.name)
