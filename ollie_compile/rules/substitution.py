"""Variable substitution: an iterator is replaced by an index expression (OLLIE, table 2).

The rules for traversal iterators write S = L[x] S'[phi(x)]: S' is traversed by the new iterators, and phi
says where the old ones are found in it. S' may hold values that nobody reads (boundary relaxing is
implied); phi never leaves its box. Traversal merging then moves phi into the surrounding scope.
"""

from __future__ import annotations

from collections.abc import Iterator

from ollie_compile.expr import Affine, Loop, Read, Scope, quotient, remainder
from ollie_compile.rules.boundary import vanishes

MAX_SKEW = 4  # times the products; more is never won back


def substitute(scope: Scope, expression: Affine, name: str) -> Scope | None:
    """Traverse by t = expression instead of by the iterator `name`, or None where that has no inverse.

    `expression` must be a * name + terms of other traversal iterators. Every other occurrence of `name`
    must have a coefficient that a divides, so that all reads stay integral in t.
    """
    traversal = {loop.name for loop in scope.traversal}
    factor = expression.coefficient(name)
    if not factor or any(atom not in traversal for atom, _ in expression.terms):
        return None
    for read in scope.factors:
        for index in read.index:
            if index.coefficient(name) % factor or any(
                name in division.of.iterators() for division in index.divisions()
            ):
                return None
    low, high = expression.bounds(scope.ranges)
    new = Loop(scope.fresh("t"), low, high + 1)
    difference = Affine.of(new.name) - expression

    def replaced(index: Affine) -> Affine:
        times = index.coefficient(name) // factor
        return index + difference * times if times else index

    return _traversed_by(scope, name, [new], [expression], scope.map_index(replaced))


def variable_substitution(scope: Scope) -> Iterator[Scope]:
    """Every compound index expression, in place of every iterator in it that it can replace."""
    expressions = {index for read in scope.factors for index in read.index if len(index.terms) > 1}
    for expression in sorted(expressions, key=str):
        for name in sorted(set(expression.iterators())):
            derived = substitute(scope, expression, name)
            if derived is not None:
                yield derived


def split_variable(scope: Scope, name: str, by: int, offset: int) -> Scope:
    """Traverse by q = (name + offset) // by and r = (name + offset) % by instead of by `name`."""
    loop = next(loop for loop in scope.traversal if loop.name == name)
    low, high = (loop.low + offset) // by, (loop.high - 1 + offset) // by
    q, r = Loop(scope.fresh("q"), low, high + 1), Loop(scope.fresh("x"), 0, by)
    shifted = Affine.of(name) + offset
    found = [quotient(shifted, by, scope.ranges), remainder(shifted, by, scope.ranges)]
    value = Affine.of(q.name) * by + Affine.of(r.name) - offset
    ranges = {**scope.ranges, q.name: (q.low, q.high), r.name: (r.low, r.high)}
    factors = scope.map_index(lambda index: index.substitute({name: value}, ranges))
    return _traversed_by(scope, name, [q, r], found, factors)


def variable_splitting(scope: Scope) -> Iterator[Scope]:
    """Every traversal iterator that some read divides, split by that divisor; views stay as they are."""
    if scope.is_view:
        return
    traversal = {loop.name for loop in scope.traversal}
    seen = set()
    for division in scope.divisions():
        name, offset = division.of.iterator, division.of.const
        if name in traversal and division.of.coefficient(name) == 1:
            seen.add((name, division.by, offset))
    for name, by, offset in sorted(seen):
        yield split_variable(scope, name, by, offset)


def split_phases(scope: Scope, name: str) -> Scope | None:
    """Traverse by whole and half steps of 2 from the start of the iterator `name`.

    `split_variable` takes the steps from where a division takes them, and needs another whole step where
    those begin elsewhere. Here that moves into the reads, for (x + 1) // 2 is x for a half step x: a stride
    of 2 becomes windows side by side, each with taps of its own, that begin half a step apart.

    Returns:
        None where a division of the half step is left.
    """
    loop = next(loop for loop in scope.traversal if loop.name == name)
    view = split_variable(scope, name, 2, -loop.low)
    (read,) = view.factors
    inner = read.tensor
    assert isinstance(inner, Scope)
    place = next(at for at, other in enumerate(scope.traversal) if other.name == name)
    half = inner.traversal[place + 1].name

    def without(index: Affine) -> Affine:
        """The same where a division of the half step alone is a straight line through its two values."""
        for division in index.divisions():
            if division.of.iterator == half:
                first, second = (
                    Affine.of(division).substitute({half: Affine.of(at)}, inner.ranges).const for at in (0, 1)
                )
                line = Affine.of(half) * (second - first) + first
                index = index + (line - Affine.of(division)) * index.coefficient(division)
        return index

    factors = inner.map_index(without)
    if any(half in d.of.iterators() for r in factors for index in r.index for d in index.divisions()):
        return None
    return view.over(factors=(Read(inner.over(factors=factors), read.index),))


def skew(scope: Scope, expression: Affine, name: str) -> Scope | None:
    """Sum over t = expression instead of over `name`, or None where that changes the sum.

    `expression` must be name + terms or -name + terms of other iterators: a unimodular change of variables.
    Then t also meets values outside the range of `name`, for which some factor must be provably 0. The
    inverse is to skew by the value of `name`, and to tighten.
    """
    loop = next((loop for loop in scope.summation if loop.name == name), None)
    step = expression.coefficient(name)
    rest = expression - Affine.of(name) * step
    if loop is None or abs(step) != 1 or scope.function != "*" or name in rest.iterators():
        return None
    if not any(vanishes(read, scope.ranges, name, loop.low, loop.high) for read in scope.factors):
        return None
    low, high = expression.bounds(scope.ranges)
    new = Loop(scope.fresh("t"), low, high + 1)
    ranges = {**scope.ranges, new.name: (new.low, new.high)}
    value = (Affine.of(new.name) - rest) * step
    factors = scope.map_index(lambda index: index.substitute({name: value}, ranges))
    summation = tuple(new if other == loop else other for other in scope.summation)
    return scope.over(summation=summation, factors=factors)


def skewing(scope: Scope) -> Iterator[Scope]:
    """The windows of a contraction as sums over the places that are read: the weights then form bands.

    All dimensions at once in which the places are few: at most `MAX_SKEW` times the taps.
    """
    if not scope.is_contraction:
        return
    derived = scope
    extents = {loop.name: loop.extent for loop in scope.summation}
    expressions = {index for read in scope.factors for index in read.index if len(index.terms) > 1}
    for expression in sorted(expressions, key=str):
        low, high = expression.bounds(scope.ranges)
        for name in sorted(extents.keys() & set(expression.iterators())):
            if high - low < MAX_SKEW * extents[name]:
                derived = skew(derived, expression, name) or derived
    if derived is not scope:
        yield derived


def _traversed_by(
    scope: Scope, name: str, loops: list[Loop], found: list[Affine], factors: tuple[Read, ...]
) -> Scope:
    """L[traversal] S'[phi]: S' has `loops` in place of the iterator `name`, and phi finds it at `found`."""
    place = next(at for at, loop in enumerate(scope.traversal) if loop.name == name)
    index = [Affine.of(loop.name) for loop in scope.traversal]
    inner = (*scope.traversal[:place], *loops, *scope.traversal[place + 1 :])
    index[place : place + 1] = found
    read = Read(scope.over(traversal=inner, factors=factors), tuple(index))
    return Scope(scope.traversal, (), (read,))
