"""Rules between expressions: reassociation of products, and sums that share a factor (OLLIE, table 2)."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping

from ollie_compile.expr import Affine, Loop, Read, Scope, ranges_of
from ollie_compile.rules.boundary import vanishes


def reassociation(scope: Scope) -> Iterator[Scope]:
    """(X A) B  ->  X (A B): a contraction that reads a contraction at plain iterators changes its order.

    Sum[r] {Sum[k] X[m, k] * A[k, r]}[m, r] * B[r, n]  ->  Sum[k] X[m, k] * {Sum[r] A[k, r] * B[r, n]}[k, n].
    """
    if not scope.is_contraction or len(scope.factors) != 2:
        return
    for position, read in enumerate(scope.factors):
        inner = read.tensor
        if not isinstance(inner, Scope) or not inner.is_contraction or len(inner.factors) != 2:
            continue
        bounds = [index.bounds(scope.ranges) for index in read.index]
        if any(
            low < loop.low or high >= loop.high
            for (low, high), loop in zip(bounds, inner.traversal, strict=True)
        ):
            continue
        values = {loop.name: index for loop, index in zip(inner.traversal, read.index, strict=True)}
        renamed = _inlined(inner, scope, values)
        for kept in (0, 1):
            derived = _reassociated(scope, 1 - position, renamed, kept)
            if derived is not None:
                yield derived


def _reassociated(scope: Scope, other: int, inner: Scope, kept: int) -> Scope | None:
    """Contract factor `1 - kept` of `inner` with the outer factor `other` first, where nothing else has
    the iterators that this sums."""
    first, second = inner.factors[kept], inner.factors[1 - kept]
    outer = scope.factors[other]
    loops = {loop.name: loop for loop in scope.traversal + scope.summation + inner.summation}
    by_kept, by_moved = _names(first), _names(second) | _names(outer)
    summed_now = tuple(loop for loop in scope.summation if loop.name not in by_kept)
    left = tuple(loop for loop in scope.summation if loop.name in by_kept) + inner.summation
    if not summed_now or not {loop.name for loop in inner.summation} <= by_kept & _names(second):
        return None
    free = tuple(
        loops[name] for name in sorted(by_moved - {loop.name for loop in summed_now}, key=list(loops).index)
    )
    moved = Scope(free, summed_now, (second, outer))
    factors = (first, Read(moved, tuple(Affine.of(loop.name) for loop in free)))
    return Scope(scope.traversal, left, factors)


def shared_factor(scope: Scope) -> Iterator[Scope]:
    """X * A + X * B  ->  X * (A + B): two contractions of one tensor, read alike, are one.

    Reads are alike up to the names of summed iterators, and up to a window that is longer on one side:
    what is read at h is read at h + r - 1 where r is 1, so that a 1x1 convolution joins a 3x3.
    """
    if scope.function != "+" or scope.summation:
        return
    pairs = itertools.permutations(range(len(scope.factors)), 2)
    for (left, right), (first, second) in itertools.product(pairs, itertools.product((0, 1), repeat=2)):
        joined = _joined(scope, left, right, first, second)
        if joined is not None:
            rest = [read for at, read in enumerate(scope.factors) if at not in (left, right)]
            whole = Read(joined, tuple(Affine.of(loop.name) for loop in joined.traversal))
            yield scope.over(factors=(whole, *rest)) if rest else joined


def _joined(scope: Scope, left: int, right: int, first: int, second: int) -> Scope | None:
    """Terms `left` and `right` of a sum as one product with their factors `first` and `second` in common."""
    terms = [_as_term(scope, scope.factors[at]) for at in (left, right)]
    if terms[0] is None or terms[1] is None:
        return None
    kept = {loop.name: Affine.of(loop.name) for loop in scope.traversal}
    wide, narrow = terms[0], _inlined(terms[1], terms[0], kept)
    shared, other = wide.factors[first], narrow.factors[second]
    if shared.tensor != other.tensor:
        return None
    values: dict[str, Affine] = {}  # iterators that `narrow` sums, as those of `wide`
    pinned: dict[str, int] = {}  # iterators that only `wide` sums, at the value where the reads agree
    sums = {loop.name: loop for loop in wide.summation}
    own = {loop.name: loop for loop in narrow.summation}
    for mine, theirs in zip(shared.index, other.index, strict=True):
        summed = [(str(a), c) for a, c in mine.terms if a in sums]
        if mine == theirs:
            continue
        if len(summed) != 1:
            return None
        (name, step), loop = summed[0], sums[summed[0][0]]
        rest = mine - Affine.of(name) * step
        difference = theirs - rest
        if not difference.terms and difference.const % step == 0:
            value = difference.const // step
            if not loop.low <= value < loop.high or name in pinned:
                return None
            pinned[name] = value
            continue
        (tap,) = difference.terms if len(difference.terms) == 1 else ((None, 0),)
        source = own.get(str(tap[0]))
        if source is None or tap[1] != step or difference.const % step:
            return None
        shift = difference.const // step  # wide's iterator = narrow's + shift
        if source.low + shift < loop.low or source.high + shift > loop.high:
            return None
        values[source.name] = Affine.of(name) - shift
    if set(own) != set(values) or not set(own) <= _names(narrow.factors[1 - second]):
        return None
    used = {name for value in values.values() for name in value.iterators()} | set(pinned)
    if any(name not in used and name not in _names(shared) for name in sums):
        return None
    return _sum_of_weights(wide, narrow, 1 - first, 1 - second, values, pinned, first)


def _sum_of_weights(
    wide: Scope,
    narrow: Scope,
    first: int,
    second: int,
    values: dict[str, Affine],
    pinned: dict[str, int],
    shared: int,
) -> Scope:
    """Sum[..] X * (A + B), where B is 0 at the indices that only `wide` sums."""
    a, b = wide.factors[first], narrow.factors[second]
    ranges = wide.ranges
    # B with one dimension for each of its iterators and one, of a single place, for each pinned iterator.
    loops = [loop for loop in narrow.traversal + narrow.summation if loop.name in _names(b)]
    units = [Loop(f"p_{name}", 0, 1) for name in pinned]
    view = Scope((*loops, *units), (), (b,))
    index = [values.get(loop.name) or Affine.of(loop.name) for loop in loops]
    index += [Affine.of(name) - value for name, value in pinned.items()]
    names = _names(a) | {name for expression in index for name in expression.iterators()}
    free = tuple(loop for loop in wide.traversal + wide.summation if loop.name in names)
    assert all(loop.name in ranges for loop in free)
    total = Scope(free, (), (a, Read(view, tuple(index))), "+")
    weight = Read(total, tuple(Affine.of(loop.name) for loop in free))
    factors = (wide.factors[shared], weight)
    return wide.over(factors=factors if shared == 0 else factors[::-1])


def _as_term(scope: Scope, read: Read) -> Scope | None:
    """The contraction that a term of a sum reads, over the sum's own traversal; None for others.

    A term may be read outside its box, as the parts of a concatenation are, where its factors are 0 too.
    """
    inner = read.tensor
    if not isinstance(inner, Scope) or not inner.is_contraction or len(inner.factors) != 2:
        return None
    for loop, index in zip(inner.traversal, read.index, strict=True):
        low, high = index.bounds(scope.ranges)
        outside = low < loop.low or high >= loop.high
        if outside and not any(
            vanishes(factor, inner.ranges, loop.name, loop.low, loop.high) for factor in inner.factors
        ):
            return None
    values = {loop.name: index for loop, index in zip(inner.traversal, read.index, strict=True)}
    return _inlined(inner, scope, values)


def _inlined(inner: Scope, outer: Scope, values: Mapping[str, Affine]) -> Scope:
    """`inner` over the traversal of `outer`: `values` replace its iterators, and its sums get fresh names."""
    taken = set(outer.ranges)
    renamed: dict[str, str] = {}
    for loop in inner.summation:
        stem, count = loop.name.rstrip("0123456789"), 0
        renamed[loop.name] = loop.name
        while renamed[loop.name] in taken:
            count += 1
            renamed[loop.name] = f"{stem}{count}"
        taken.add(renamed[loop.name])
    values = {**values, **{old: Affine.of(new) for old, new in renamed.items()}}
    summation = tuple(Loop(renamed[loop.name], loop.low, loop.high) for loop in inner.summation)
    ranges = outer.ranges | ranges_of(summation)
    factors = inner.map_index(lambda index: index.substitute(values, ranges))
    return inner.over(traversal=outer.traversal, summation=summation, factors=factors)


def _names(read: Read) -> set[str]:
    return {name for index in read.index for name in index.iterators()}
