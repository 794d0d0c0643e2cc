"""Traversal merging and the removal of iterators that do nothing (OLLIE, table 2)."""

from collections.abc import Iterator

from ollie_compile.expr import Affine, Input, Ranges, Read, Scope
from ollie_compile.rules.boundary import vanishes


def traversal_merging(scope: Scope) -> Iterator[Scope]:
    """A read of a rearranged intermediate becomes a read of the intermediate itself.

    Rearranged inputs stay, because a layout transformation made them, but they are rearranged only once.
    Diagonals that are read at a division stay too, because they would not become views.
    """
    whole = _read_in_place(scope)
    if whole is not None:
        yield whole
        return
    for position, read in enumerate(scope.factors):
        view = read.tensor
        if not isinstance(view, Scope) or not view.is_view or _divides_diagonal(view, read):
            continue
        if _rearranges_input(view) and not scope.is_view:
            continue
        if _zero_outside(view, read, scope.ranges):
            at = dict(zip((loop.name for loop in view.traversal), read.index, strict=True))
            inner = view.factors[0]
            index = tuple(i.substitute(at, scope.ranges) for i in inner.index)
            yield scope.with_factor(position, Read(inner.tensor, index))


def _read_in_place(scope: Scope) -> Scope | None:
    """The scope that `scope` only copies, with the same box and order; None if it copies none."""
    inner, index = scope.factors[0].tensor, scope.factors[0].index
    if not scope.is_view or not isinstance(inner, Scope) or inner.box != scope.box:
        return None
    in_place = all(i == Affine.of(loop.name) for i, loop in zip(index, scope.traversal, strict=True))
    return inner if in_place else None


def _rearranges_input(view: Scope) -> bool:
    inner = view.factors[0].tensor
    return view.is_view and (
        isinstance(inner, Input) or (isinstance(inner, Scope) and _rearranges_input(inner))
    )


def _divides_diagonal(view: Scope, read: Read) -> bool:
    names = [name for index in view.factors[0].index for name in index.iterators()]
    return any(
        names.count(loop.name) > 1 and any(True for _ in index.divisions())
        for loop, index in zip(view.traversal, read.index, strict=True)
    )


def _zero_outside(view: Scope, read: Read, ranges: Ranges) -> bool:
    """Whether `read` also reads a 0 below the view at every index outside the view's box."""
    for loop, index in zip(view.traversal, read.index, strict=True):
        first, last = index.bounds(ranges)
        inside = loop.low <= first and last < loop.high
        if not inside and not vanishes(view.factors[0], view.ranges, loop.name, loop.low, loop.high):
            return False
    return True


def idle_iterator(scope: Scope) -> Iterator[Scope]:
    """A traversal iterator that no read uses leaves the computation: its values are all the same."""
    if scope.is_view:
        return
    used = scope.used()
    if any(loop.name not in used for loop in scope.traversal):
        busy = tuple(loop for loop in scope.traversal if loop.name in used)
        inner = scope.over(traversal=busy)
        yield Scope(scope.traversal, (), (Read(inner, tuple(Affine.of(loop.name) for loop in busy)),))


def unit_iterator(scope: Scope) -> Iterator[Scope]:
    """An iterator with a single value is that value; a sum over it has a single term."""
    unit = {name: Affine.of(low) for name, (low, high) in scope.ranges.items() if high - low == 1}
    if unit and unit.keys() & (scope.used() | {loop.name for loop in scope.summation}):
        summation = tuple(loop for loop in scope.summation if loop.name not in unit)
        factors = scope.map_index(lambda index: index.substitute(unit, scope.ranges))
        yield scope.over(summation=summation, factors=factors)
