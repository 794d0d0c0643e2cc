"""Expression splitting, expression merging and distribution: rules between expressions (OLLIE, table 2)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeGuard

from ollie_compile.expr import Affine, Loop, Read, Scope, canonical


def split_expression(scope: Scope, name: str, at: int) -> Scope:
    """L[x:a..b] f  ->  L[x:a..b] {L[x:a..at] f}[x] + {L[x:at..b] f}[x]: two independent expressions.

    Sums that the factors read lose the terms that are 0 in a part, so that the parts of a concatenation
    come apart. `expression_merging` is the inverse, `shared_factor` where terms were lost.
    """
    loop = next(loop for loop in scope.traversal if loop.name == name)
    parts = (
        _restricted(scope.over(traversal=_with_range(scope, loop, low, high)))
        for low, high in ((loop.low, at), (at, loop.high))
    )
    index = tuple(Affine.of(loop.name) for loop in scope.traversal)
    return Scope(scope.traversal, (), tuple(Read(part, index) for part in parts), "+")


def expression_splitting(scope: Scope) -> Iterator[Scope]:
    """Every contraction of a sum, split where a term of the sum begins or ends."""
    if not scope.is_contraction:
        return
    traversal = {loop.name: loop for loop in scope.traversal}
    seams = set()
    for read in scope.factors:
        if not _is_sum(read.tensor):
            continue
        for inner, index in zip(read.tensor.traversal, read.index, strict=True):
            if index.iterator not in traversal or index.coefficient(index.iterator) != 1:
                continue
            loop = traversal[index.iterator]
            seams |= {(loop.name, at - index.const) for at in _ends(read.tensor, inner)}
    for name, at in sorted(seams):
        if traversal[name].low < at < traversal[name].high:
            yield split_expression(scope, name, at)


def expression_merging(scope: Scope) -> Iterator[Scope]:
    """{L[x:a..m] f}[x] + {L[x:m..b] f}[x]  ->  {L[x:a..b] f}[x], for terms that are read in place."""
    if scope.function != "+" or scope.summation:
        return
    for left, first in enumerate(scope.factors):
        for right, second in enumerate(scope.factors):
            merged = _merged(first, second) if left != right else None
            if merged is not None:
                rest = tuple(read for at, read in enumerate(scope.factors) if at not in (left, right))
                factors = (Read(merged, first.index), *rest)
                yield Scope(scope.traversal, (), factors, "+" if rest else "*")


def distribution(scope: Scope) -> Iterator[Scope]:
    """X * (A + B)  ->  X * A + X * B: the inverse of `shared_factor` for terms that are read alike."""
    if not scope.is_contraction:
        return
    for position, read in enumerate(scope.factors):
        total = read.tensor
        if not _is_sum(total) or not _stays_inside(total, read, scope):
            continue
        values = {loop.name: index for loop, index in zip(total.traversal, read.index, strict=True)}
        terms = []
        for term in total.factors:
            index = tuple(i.substitute(values, scope.ranges) for i in term.index)
            terms.append(scope.with_factor(position, Read(term.tensor, index)))
        place = tuple(Affine.of(loop.name) for loop in scope.traversal)
        yield Scope(scope.traversal, (), tuple(Read(term, place) for term in terms), "+")


def _is_sum(tensor: object) -> TypeGuard[Scope]:
    return isinstance(tensor, Scope) and tensor.function == "+" and not tensor.summation


def _stays_inside(tensor: Scope, read: Read, scope: Scope) -> bool:
    bounds = (index.bounds(scope.ranges) for index in read.index)
    return all(
        low <= first and last < high for (first, last), (low, high) in zip(bounds, tensor.box, strict=True)
    )


def _ends(total: Scope, loop: Loop) -> Iterator[int]:
    """Values of an iterator of a sum at which one of its terms begins or ends."""
    for term in total.factors:
        for index, (low, high) in zip(term.index, term.tensor.box, strict=True):
            if index.iterator == loop.name and index.coefficient(loop.name) == 1:
                yield from (low - index.const, high - index.const)


def _with_range(scope: Scope, loop: Loop, low: int, high: int) -> tuple[Loop, ...]:
    return tuple(Loop(loop.name, low, high) if other == loop else other for other in scope.traversal)


def _restricted(scope: Scope) -> Scope:
    """`scope` with the sums below cut to the part that it reads, without the terms that are 0."""
    for position, read in enumerate(scope.factors):
        total = read.tensor
        if not _is_sum(total) or not _stays_inside(total, read, scope):
            continue
        bounds = (index.bounds(scope.ranges) for index in read.index)
        loops = tuple(
            Loop(loop.name, first, last + 1)
            for loop, (first, last) in zip(total.traversal, bounds, strict=True)
        )
        cut = total.over(traversal=loops)
        kept = tuple(term for term in total.factors if not _is_outside(term, cut)) or total.factors[:1]
        cut = Scope(loops, (), kept, "+" if len(kept) > 1 else "*")
        scope = scope.with_factor(position, Read(cut, read.index))
    return scope


def _is_outside(read: Read, scope: Scope) -> bool:
    """Whether a read is outside its tensor's box for all values of the scope's iterators."""
    bounds = (index.bounds(scope.ranges) for index in read.index)
    return any(
        last < low or first >= high
        for (first, last), (low, high) in zip(bounds, read.tensor.box, strict=True)
    )


def _merged(first: Read, second: Read) -> Scope | None:
    """The expression of which two terms are adjoining parts, or None."""
    left, right = first.tensor, second.tensor
    if not isinstance(left, Scope) or not isinstance(right, Scope) or first.index != second.index:
        return None
    differing = [
        place for place, boxes in enumerate(zip(left.box, right.box, strict=True)) if len({*boxes}) > 1
    ]
    if len(differing) != 1 or left.box[differing[0]][1] != right.box[differing[0]][0]:
        return None
    (place,) = differing
    low, high = left.box[place][0], right.box[place][1]
    whole, other = (
        part.over(traversal=_with_range(part, part.traversal[place], low, high)) for part in (left, right)
    )
    return whole if canonical(whole) == canonical(other) else None
