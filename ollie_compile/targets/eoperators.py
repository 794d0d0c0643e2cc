"""eOperators with kernels of their own (OLLIE, section 4.4): selective additions and banded products."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from ollie_compile.expr import Affine, Loop, Quotient, Read, Remainder, Scope

MAX_OVERLAPS = 2  # spatial dimensions of the kernels, and of torch's fold


@dataclass(frozen=True, slots=True)
class Overlap:
    """One spatial dimension of a selective addition, with its places among the dimensions of the data.

    Counted from 0 in every dimension, the result at h adds, for each r, the data at tap
    `stride * r + (h + offset) % stride` and position `(h + offset) // stride + step * r`.
    """

    out: str
    tap: int
    position: int
    stride: int
    offset: int
    step: int

    @property
    def folds(self) -> bool:
        """Whether each tap and position belongs to one place of the result, as in torch's fold."""
        return self.stride == 1 or self.step == -1


@dataclass(frozen=True, slots=True)
class SelectiveAdd:
    """A sum of overlapping planes of one tensor; with strides of 1 it is the paper's OffsetAdd.

    Args:
        read: the tensor whose planes are added.
        plain: its other dimensions, by the iterators of the result; others of those have one value.
    """

    read: Read
    plain: tuple[tuple[str, int], ...]
    overlaps: tuple[Overlap, ...]

    @property
    def folds(self) -> bool:
        return all(overlap.folds for overlap in self.overlaps)


def match_selective_add(scope: Scope) -> SelectiveAdd | None:
    """The selective addition that a scope computes, itself or by a rearranged read of one, or None."""
    if scope.is_view and isinstance(scope.factors[0].tensor, Scope):
        merged = _merged(scope, scope.factors[0])
        return None if merged is None else _match(merged)
    return _match(scope)


def _merged(scope: Scope, read: Read) -> Scope | None:
    """The scope below, traversed as its reader is; None where it is read outside its box."""
    inner = read.tensor
    assert isinstance(inner, Scope)
    if not inner.summation or {loop.name for loop in inner.summation} & scope.ranges.keys():
        return None
    for (low, high), index in zip(inner.box, read.index, strict=True):
        first, last = index.bounds(scope.ranges)
        if first < low or last >= high:
            return None
    values = {loop.name: index for loop, index in zip(inner.traversal, read.index, strict=True)}
    ranges = {**scope.ranges, **{loop.name: (loop.low, loop.high) for loop in inner.summation}}
    factors = inner.map_index(lambda index: index.substitute(values, ranges))
    return inner.over(traversal=scope.traversal, factors=factors)


def _match(scope: Scope) -> SelectiveAdd | None:
    if scope.function != "*" or len(scope.factors) != 1 or not 1 <= len(scope.summation) <= MAX_OVERLAPS:
        return None
    (read,) = scope.factors
    overlaps = []
    for summed in scope.summation:
        places = [place for place, index in enumerate(read.index) if summed.name in index.iterators()]
        if len(places) != 2:
            return None
        found = _overlap(scope, summed, *places) or _overlap(scope, summed, *places[::-1])
        if found is None:
            return None
        overlaps.append(found)
    taken = {place for overlap in overlaps for place in (overlap.tap, overlap.position)}
    places = [place for place in range(len(read.index)) if place not in taken]
    names = _whole(scope, read, places)
    if names is None:
        return None
    known = [*names, *(overlap.out for overlap in overlaps)]
    left = [loop for loop in scope.traversal if loop.name not in known]
    if len(known) + len(left) != len(scope.traversal) or any(loop.extent > 1 for loop in left):
        return None
    return SelectiveAdd(read, tuple(zip(names, places, strict=True)), tuple(overlaps))


def _overlap(scope: Scope, summed: Loop, tap: int, position: int) -> Overlap | None:
    (read,) = scope.factors
    stride = read.index[tap].coefficient(summed.name)
    step = read.index[position].coefficient(summed.name)
    rest = read.index[tap] - Affine.of(summed.name) * stride
    whole = read.index[position] - Affine.of(summed.name) * step
    rest, whole = _stepped(rest, whole)
    if stride < 1 or step == 0 or len(whole.terms) != 1 or whole.terms[0][1] != 1:
        return None
    atom, first = whole.terms[0][0], whole.const
    if stride == 1:
        out, shift = (atom if isinstance(atom, str) else None), 0
        selected = Affine(const=rest.const)
    elif isinstance(atom, Quotient) and atom.by == stride:
        out, shift = atom.of.iterator, atom.of.const
        selected = Affine.of(Remainder(atom.of, stride)) + rest.const
        if out is None or atom.of.coefficient(out) != 1:
            return None
    else:
        return None
    (tap_low, tap_high), (low, _) = read.tensor.box[tap], read.tensor.box[position]
    aligned = rest == selected and stride * summed.low + rest.const == tap_low
    if out not in {loop.name for loop in scope.traversal} or not aligned:
        return None
    if tap_high - tap_low > stride * summed.extent:
        return None
    start = first + step * summed.low - low
    return Overlap(out, tap, position, stride, scope.ranges[out][0] + shift + stride * start, step)


def _stepped(rest: Affine, whole: Affine) -> tuple[Affine, Affine]:
    """The phases of phase splitting as those of the next place: 1 - h % 2 is (h + 1) % 2, and h // 2 + h % 2
    is (h + 1) // 2."""
    for atom, coefficient in rest.terms:
        if isinstance(atom, Remainder) and atom.by == 2 and coefficient == -1:
            phase, following = Affine.of(atom), atom.of + 1
            if whole - phase - Affine.of(Quotient(atom.of, 2)) == Affine(const=whole.const):
                rest = rest + phase - 1 + Affine.of(Remainder(following, 2))
                whole = Affine.of(Quotient(following, 2)) + whole.const
    return rest, whole


@dataclass(frozen=True, slots=True)
class Banded:
    """A product along the diagonals of a band (OLLIE's G2BMM and GBMM).

    Counted from 0 in every dimension, with key = row + dilation * place + offset:
    scores O[batch, row, place] = Sum[feature] A[batch, row, feature] * B[batch, key, feature], or
    values O[batch, row, feature] = Sum[place] A[batch, row, place] * B[batch, key, feature].

    Args:
        first: position of A among the factors.
        key: dimension of B that is read at the key.
    """

    scores: bool
    first: int
    batch: tuple[str, ...]
    row: str
    place: str
    feature: str
    key: int
    dilation: int
    offset: int


def match_banded(scope: Scope) -> Banded | None:
    """The banded product that a scope is, or None."""
    if not scope.is_contraction or len(scope.factors) != 2 or len(scope.summation) != 1:
        return None
    return _match_banded(scope, 0) or _match_banded(scope, 1)


def _match_banded(scope: Scope, first: int) -> Banded | None:
    a, b = scope.factors[first], scope.factors[1 - first]
    keys = [place for place, index in enumerate(b.index) if index.compound]
    if len(keys) != 1:
        return None
    (at,) = keys
    key = b.index[at]
    of_a, of_b = _whole(scope, a, range(len(a.index))), _whole(scope, b, set(range(len(b.index))) - {at})
    if of_a is None or of_b is None or len(key.terms) != 2 or any(True for _ in key.divisions()):
        return None
    (summed,) = (loop.name for loop in scope.summation)
    traversed = [loop.name for loop in scope.traversal]
    batch = tuple(name for name in traversed if name in of_a and name in of_b)
    for row, place in itertools.permutations(key.iterators()):
        scores = place != summed
        feature = next((name for name in of_b if name not in batch), "")
        wanted = [(*batch, row, feature if scores else place), (*batch, feature)]
        wanted += [(*batch, row, place if scores else feature)]
        if [*map(sorted, wanted)] != [*map(sorted, (of_a, of_b, traversed))]:
            continue
        dilation = key.coefficient(place)
        if key.coefficient(row) == 1 and dilation > 0:
            start = sum(key.coefficient(name) * scope.ranges[name][0] for name in (row, place))
            offset = key.const + start - b.tensor.box[at][0]
            return Banded(scores, first, batch, row, place, feature, at, dilation, offset)
    return None


def _whole(scope: Scope, read: Read, places: Iterable[int]) -> list[str] | None:
    """The iterators that dimensions are read at, or None where one is not read as a whole."""
    names = []
    for place in places:
        name = read.index[place].iterator
        if name is None or read.index[place] != Affine.of(name):
            return None
        if read.tensor.box[place] != scope.ranges[name]:
            return None
        names.append(name)
    return names
