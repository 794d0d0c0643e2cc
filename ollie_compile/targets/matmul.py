"""Matrix products as a target of matching, by their iterator mapping table (OLLIE, section 4.3).

Each iterator of a contraction has a role by the tensors it occurs in, its row of the table.
"""

from __future__ import annotations

from dataclasses import dataclass

from ollie_compile.expr import Read, Scope, once


@dataclass(frozen=True, slots=True)
class Matmul:
    """O[batch, rows, columns] = Sum[contracted] A[batch, rows, contracted] * B[batch, contracted, columns].

    Each field names iterators: `rows` in the order of the first factor's dimensions, `columns` in the
    order of the scope's traversal.
    """

    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    contracted: tuple[str, ...]


OUTPUT = -1  # beside the positions of the factors
_ROLES = {
    frozenset((0, 1, OUTPUT)): "batch",
    frozenset((0, OUTPUT)): "rows",
    frozenset((1, OUTPUT)): "columns",
    frozenset((0, 1)): "contracted",
}


def mapping_table(scope: Scope) -> dict[str, frozenset[int]]:
    """For each iterator the factors it occurs in, by position, and `OUTPUT` where it is traversed."""
    table = {loop.name: {OUTPUT} for loop in scope.traversal} | {loop.name: set() for loop in scope.summation}
    for position, read in enumerate(scope.factors):
        for index in read.index:
            for name in index.iterators():
                table[name].add(position)
    return {name: frozenset(row) for name, row in table.items()}


@once
def match_matmul(scope: Scope) -> Matmul | None:
    """The matrix product that `scope` is, or None."""
    if not scope.is_contraction or len(scope.factors) != 2:
        return None
    first, second = map(_iterators, scope.factors)
    if first is None or second is None:
        return None
    roles = {name: _ROLES.get(row) for name, row in mapping_table(scope).items()}
    if None in roles.values():
        return None
    by_first = {name: place for place, name in enumerate(first)}
    rows = sorted((name for name in roles if roles[name] == "rows"), key=by_first.__getitem__)
    batch, columns, contracted = (
        tuple(name for name in roles if roles[name] == role) for role in ("batch", "columns", "contracted")
    )
    return Matmul(batch, tuple(rows), columns, contracted)


def _iterators(read: Read) -> list[str] | None:
    """The iterator of each dimension that has one, or None where one is compound or occurs twice."""
    names = [index.iterator for index in read.index if index.terms]
    if None in names or len(set(names)) < len(names):
        return None
    return [name for name in names if name is not None]
