"""Summation splitting: a sum over several iterators becomes a sum of sums (OLLIE, table 2)."""

from collections.abc import Collection, Iterator
from itertools import combinations

from ollie_compile.expr import Affine, Read, Scope

MANY = 3


def split_summation(scope: Scope, outer: Collection[str]) -> Scope:
    """Sum[outer, inner] f  ->  Sum[outer] {L[outer, traversal] Sum[inner] f}.

    The outer iterators come first in the inner traversal: a library operator then writes the values
    that are summed next as whole planes.
    """
    kept = tuple(loop for loop in scope.summation if loop.name in outer)
    rest = tuple(loop for loop in scope.summation if loop.name not in outer)
    inner = scope.over(traversal=kept + scope.traversal, summation=rest)
    read = Read(inner, tuple(Affine.of(loop.name) for loop in inner.traversal))
    return Scope(scope.traversal, kept, (read,))


def summation_splitting(scope: Scope) -> Iterator[Scope]:
    """Every split of the summation into two non-empty parts; of many iterators, one goes or one stays."""
    names = [loop.name for loop in scope.summation]
    sizes = range(1, len(names)) if len(names) <= MANY else (1, len(names) - 1)
    for size in sizes:
        for outer in combinations(names, size):
            yield split_summation(scope, outer)
