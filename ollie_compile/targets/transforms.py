"""Constant matrices as a target: applied to one tensor along a summed iterator.

One kernel applies a matrix, or two nested ones at once. Without that kernel a matrix is a weighted sum of
slices: a slice for each column is multiplied by that column. This does more products than writing out every
row without its zeros, but it stays one small kernel, which compiles quickly and is bound by memory.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from torch import Tensor

from ollie_compile.expr import Affine, Constant, Loop, Quotient, Ranges, Read, Remainder, Scope
from ollie_compile.kernels import library
from ollie_compile.targets.target import Cost, Kernel, Lowering, ProductLayout, Target
from ollie_compile.targets.views import Box, Window, is_view, padded

MAX_COLUMNS = 16  # slices that are written out


def is_transform(scope: Scope) -> bool:
    """Whether a scope applies one constant matrix to one tensor, along one summed iterator."""
    if len(scope.summation) != 1 or len(scope.factors) != 2 or scope.function != "*":
        return False
    if scope.terms() != 1:
        return False
    constant, read = _parts(scope)
    row, column = constant.index
    used = {name for index in read.index for name in index.iterators()}
    summed = scope.summation[0].name
    return (
        row.iterator in {loop.name for loop in scope.traversal} - used
        and row == Affine.of(row.iterator or "")
        and set(column.iterators()) == {summed}
        and summed in used
        and scope.summation[0].extent <= MAX_COLUMNS
    )


def _parts(scope: Scope) -> tuple[Read, Read]:
    """The read of the matrix and the other one."""
    first, second = scope.factors
    return (first, second) if isinstance(first.tensor, Constant) else (second, first)


def matrix(scope: Scope) -> Constant:
    """The constant that is applied."""
    constant = _parts(scope)[0].tensor
    assert isinstance(constant, Constant)
    return constant


def column(scope: Scope) -> Affine:
    """The index at which the matrix is read along its columns."""
    return _parts(scope)[0].index[1]


def row_loop(scope: Scope) -> Loop:
    """The traversal iterator that only the matrix has."""
    name = _parts(scope)[0].index[0].iterator
    return next(loop for loop in scope.traversal if loop.name == name)


def data(scope: Scope) -> Read:
    """The read that the matrix is applied to."""
    return _parts(scope)[1]


@dataclass(frozen=True, slots=True)
class Applied:
    """One matrix: the rows are traversed by `row`, the columns summed by an iterator that starts at 0."""

    constant: Constant
    row: str
    column: str


@dataclass(frozen=True, slots=True)
class Joined:
    """A dimension `name` of the result that is computed by whole and rest, of which a part is taken."""

    name: str
    whole: str
    rest: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Transform:
    """O[loops] = Sum[columns] matrices * read, with no division in the read's index.

    Args:
        read: at the loops that are no rows and at the columns.
        loops: in the order of the scope, but for what `joined` puts together afterwards.
    """

    read: Read
    matrices: tuple[Applied, ...]
    loops: tuple[Loop, ...]
    joined: tuple[Joined, ...]

    @property
    def ranges(self) -> Ranges:
        """Of all iterators of the read, the columns among them."""
        columns = {one.column: (0, one.constant.shape[1]) for one in self.matrices}
        return {loop.name: (loop.low, loop.high) for loop in self.loops} | columns


def match_transform(scope: Scope) -> Transform | None:
    """The kernel call that computes a scope, two nested matrices in one where that is possible, or None."""
    outer = _single(scope, "outer")
    if outer is None:
        return None
    inside = outer.read.tensor
    inner = _single(inside, "inner") if isinstance(inside, Scope) else None
    both = _nested(outer, inside, inner) if isinstance(inside, Scope) and inner is not None else None
    return next((found for found in (both, outer) if found is not None and _callable(found)), None)


def _single(scope: Scope, side: str) -> Transform | None:
    """The matrix that a scope applies as a whole."""
    if not is_transform(scope):
        return None
    constant, row = matrix(scope), row_loop(scope)
    (summed,) = scope.summation
    index = column(scope)
    step = index.coefficient(summed.name)
    first, last = index.bounds(scope.ranges)
    whole = (first, last, row.low, row.high) == (0, constant.shape[1] - 1, 0, constant.shape[0])
    if abs(step) != 1 or not whole:
        return None
    name = scope.fresh(f"{summed.name}_{side}")
    value = {summed.name: (Affine.of(name) - index.const) * step}
    ranges = {**scope.ranges, name: (0, constant.shape[1])}
    read = data(scope)
    taken = Read(read.tensor, tuple(at.substitute(value, ranges) for at in read.index))
    return Transform(taken, (Applied(constant, row.name, name),), scope.traversal, ())


def _nested(outer: Transform, inside: Scope, inner: Transform) -> Transform | None:
    """The matrices of `outer` and of the scope that it reads, on different dimensions."""
    (applied,) = inner.matrices
    tails = {
        at.terms[0][0]: place
        for place, at in enumerate(outer.read.index)
        if len(at.terms) == 1 and isinstance(at.terms[0][0], Remainder) and at == Affine.of(at.terms[0][0])
    }
    values: dict[str, Affine] = {}
    loops, joined = list(outer.loops), []
    ranges = dict(outer.ranges)
    for loop, at in zip(inside.traversal, outer.read.index, strict=True):
        atom = at.terms[0][0] if len(at.terms) == 1 and at.terms[0][1] == 1 else None
        if loop.name in values:
            continue
        if isinstance(atom, Quotient):
            tail = tails.get(Remainder(atom.of, atom.by))
            name = atom.of.iterator
            if tail is None or name is None or at.const or atom.of.coefficient(name) != 1:
                return None
            rest = inside.traversal[tail]
            first, last = atom.of.bounds(ranges)
            covered = loop.low * atom.by <= first and last < loop.high * atom.by
            place = next((p for p, known in enumerate(loops) if known.name == name), None)
            if place is None or (rest.low, rest.high) != (0, atom.by) or not covered:
                return None
            new = Loop(f"{name}_whole", loop.low, loop.high), Loop(f"{name}_rest", 0, atom.by)
            loops[place : place + 1] = new
            joined.append(
                Joined(name, new[0].name, new[1].name, first - loop.low * atom.by, last + 1 - first)
            )
            values |= {loop.name: Affine.of(new[0].name), rest.name: Affine.of(new[1].name)}
            ranges |= {one.name: (one.low, one.high) for one in new}
        elif isinstance(atom, Remainder):
            if tails.get(atom) is None:
                return None
        elif at.iterator is not None and at == Affine.of(at.iterator):
            low, high = ranges[at.iterator]
            if low < loop.low or high > loop.high:
                return None
            values[loop.name] = at
        elif loop.name == applied.row or not _zero_beyond(loop, inner.read):
            return None
        else:
            values[loop.name] = at
    row = values[applied.row].iterator if applied.row in values else None
    position = {loop.name: loop for loop in loops}
    if len(values) != len(inside.traversal) or row not in position:
        return None
    if (position[row].low, position[row].high) != (0, applied.constant.shape[0]):
        return None
    if row == outer.matrices[0].row:
        return None
    ranges[applied.column] = (0, applied.constant.shape[1])
    index = tuple(at.substitute(values, ranges) for at in inner.read.index)
    if any(name in values for name in (one.name for one in joined)):
        return None
    matrices = (*outer.matrices, Applied(applied.constant, row, applied.column))
    return Transform(Read(inner.read.tensor, index), matrices, tuple(loops), tuple(joined))


def _zero_beyond(loop: Loop, read: Read) -> bool:
    """Whether a read gives 0 wherever the loop leaves its range."""
    places = [place for place, at in enumerate(read.index) if loop.name in at.iterators()]
    if len(places) != 1 or read.index[places[0]].terms != Affine.of(loop.name).terms:
        return False
    low, high = read.tensor.box[places[0]]
    const = read.index[places[0]].const
    return loop.low <= low - const and high - const <= loop.high


def _callable(call: Transform) -> bool:
    """Whether the read has no divisions and its last loop runs along one dimension alone."""
    if any(True for at in call.read.index for _ in at.divisions()):
        return False
    name = call.loops[-1].name
    used = [at for at in call.read.index if name in at.iterators()]
    return len(used) == 1 and used[0] == Affine.of(name) + used[0].const


def strides(index: tuple[Affine, ...], stride: tuple[int, ...], name: str) -> int:
    """How far in memory a step of an iterator goes, for a tensor of those strides."""
    return sum(at.coefficient(name) * step for at, step in zip(index, stride, strict=True))


def start(
    index: tuple[Affine, ...],
    stride: tuple[int, ...],
    box: tuple[tuple[int, int], ...],
    lows: Mapping[str, int],
) -> int:
    """The position in memory of the first value that is read."""
    total = 0
    for at, step, (low, _) in zip(index, stride, box, strict=True):
        first = at.const + sum(at.coefficient(name) * lows[name] for name in at.iterators())
        total += (first - low) * step
    return total


def _cost(scope: Scope) -> Cost:
    """Each value is loaded once for all rows of the matrix."""
    size, taps = math.prod(scope.shape), math.prod(loop.extent for loop in scope.summation)
    return Cost(elements=size + size // row_loop(scope).extent * taps)


def contiguous(
    call: Transform, lowering: Lowering, kept: Collection[int | None] = ()
) -> tuple[Tensor, tuple[Affine, ...], Box]:
    """The tensor that a transform reads, contiguous along its last loop, with its index and box.

    It is padded to all that is read, but for the dimensions `kept`.
    """
    last, read = call.loops[-1].name, call.read
    places = sorted(range(len(read.index)), key=lambda at: last in read.index[at].iterators())
    index, box = tuple(read.index[at] for at in places), tuple(read.tensor.box[at] for at in places)
    bounds = [
        (low, high - 1) if place in kept else at.bounds(call.ranges)
        for place, at, (low, high) in zip(places, index, box, strict=True)
    ]
    value, box = padded(lowering.value(read).permute(places), box, bounds)
    return value.contiguous(), index, box


class CppMatrices(Kernel[Transform]):
    """The C++ kernel for one or two matrices, which keeps a tile of them in registers."""

    family, title, devices = "cpp", "matrices in C++", ("cpu",)
    preferred = standalone = True

    def match(self, scope: Scope, layout: ProductLayout) -> Transform | None:
        return match_transform(scope)

    def call(self, match: Transform, scope: Scope, lowering: Lowering) -> Tensor:
        value, index, box = contiguous(match, lowering)
        names = [loop.name for loop in match.loops]
        result = library.transform(
            value,
            [loop.extent for loop in match.loops],
            [strides(index, value.stride(), name) for name in names],
            start(index, value.stride(), box, {name: low for name, (low, _) in match.ranges.items()}),
            [names.index(one.row) for one in match.matrices],
            [strides(index, value.stride(), one.column) for one in match.matrices],
            [float(number) for one in match.matrices for number in one.constant.values],
            [one.constant.shape[1] for one in match.matrices],
        )
        for part in match.joined:
            at = names.index(part.whole)
            result = result.flatten(at, at + 1).narrow(at, part.start, part.size)
            names[at : at + 2] = [part.name]
        return result

    def cost(self, match: Transform, scope: Scope, layout: ProductLayout) -> Cost:
        return _cost(scope)

    def native(self, match: Transform) -> frozenset[str]:
        return frozenset([" * ".join(one.constant.name for one in match.matrices)])


class SlicedMatrices(Target[Read]):
    """Plain aten: a slice for each column of the matrix, weighted and added up."""

    def match(self, scope: Scope, layout: ProductLayout) -> Read | None:
        return data(scope) if is_transform(scope) and is_view(data(scope)) else None

    def call(self, match: Read, scope: Scope, lowering: Lowering) -> Tensor:
        constant, _ = _parts(scope)
        matrix_values = lowering.value(constant)
        window = self._window(match, scope, lowering)
        (summed,) = scope.summation
        row = row_loop(scope)
        place = scope.traversal.index(row)
        loops = [loop for loop in scope.traversal if loop is not row]
        coefficients_shape = [row.extent, *[1] * (len(loops) - place)]
        total: Tensor | None = None
        for value in range(summed.low, summed.high):
            ranges = {summed.name: (value, value + 1)}
            at = column(scope).substitute({summed.name: Affine.of(value)}, ranges).const
            coefficients = matrix_values[row.low : row.high, at].reshape(coefficients_shape)
            term = window.at({summed.name: value}, loops).unsqueeze(place) * coefficients
            total = term if total is None else total + term
        assert total is not None, "a summation has at least one value"
        return total.expand(scope.shape)

    def _window(self, read: Read, scope: Scope, lowering: Lowering) -> Window:
        """The data in the order of the traversal, so that the additions run along contiguous values."""
        rank = {loop.name: place for place, loop in enumerate(scope.traversal)}
        order = sorted(
            range(len(read.index)),
            key=lambda at: max((rank.get(name, -1) for name in read.index[at].iterators()), default=-1),
        )
        value = lowering.value(read).permute(order).contiguous()
        index, box = [read.index[at] for at in order], tuple(read.tensor.box[at] for at in order)
        return Window.of(index, box, value, scope.ranges)

    def cost(self, match: Read, scope: Scope, layout: ProductLayout) -> Cost:
        return _cost(scope)
