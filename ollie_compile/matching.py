"""Operator matching with iterator mapping tables (OLLIE, section 4.3).

Each iterator of a contraction has a role by the tensors it occurs in, its row of the table. A scope is a
(batched) matrix product when every dimension that its factors read is one iterator; otherwise the first
mismatch says which derivation repairs it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ollie_compile.convolutions import match_convolution
from ollie_compile.expr import Affine, Read, Scope, once
from ollie_compile.rules import Rule, applied, simplify
from ollie_compile.rules.layout import dimension_splitting, rearrange
from ollie_compile.rules.substitution import split_phases, split_variable, substitute
from ollie_compile.rules.summation import split_summation
from ollie_compile.rules.windows import dilation_splitting, stride_splitting

MAX_GROWTH = 1.5  # products that guided substitution may add; above, rearranging the tensor is better


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


@once
def repair_product(scope: Scope) -> tuple[str, Scope] | None:
    """The derivation that removes the first mismatch between a contraction and a matrix product.

    Returns the rule's name and the derived scope, or None where nothing is known to help: the mismatch
    is then left to exploration.
    """
    traversal = {loop.name for loop in scope.traversal}
    summation = {loop.name for loop in scope.summation}
    for division in scope.divisions():
        name = division.of.iterator
        if name in traversal and division.of.coefficient(name) == 1:
            return "variable splitting", split_variable(scope, name, division.by, division.of.const)
    compound = [index for read in scope.factors for index in read.index if index.compound]
    outer = {name for index in compound for name in index.iterators()} & summation
    if outer and outer != summation:
        return "summation splitting", split_summation(scope, outer)
    for expression in compound if not outer else ():
        for name in _replaceable(scope, expression):
            derived = substitute(scope, expression, name)
            if derived is not None and _pays(scope, simplify(derived)[0]):
                return "variable substitution", derived
    return _repair_layout(scope)


def _replaceable(scope: Scope, expression: Affine) -> list[str]:
    """Iterators of `expression`, those first that occur in few other places: replacing them leaves less."""
    indices = [index for read in scope.factors for index in read.index]
    occurrences = {name: sum(name in i.iterators() for i in indices) for name in expression.iterators()}
    return sorted(occurrences, key=lambda name: (occurrences[name], name))


def _pays(scope: Scope, derived: Scope, *, terms: bool = False) -> bool:
    """Whether a substitution removes a compound index from the contractions without many more products.

    Every repair so lowers (summations, divisions, compound indices), which ends guided derivation.

    Args:
        terms: removing a term of a compound index is enough.
    """
    measure = _terms if terms else _compounds
    contractions = [inner for inner in derived.scopes() if inner.is_contraction]
    products = sum(_products(inner) for inner in contractions)
    left = sum(measure(inner) for inner in contractions)
    return products <= MAX_GROWTH * _products(scope) and left < measure(scope)


def _terms(scope: Scope) -> int:
    return sum(len(index.terms) for read in scope.factors for index in read.index)


def _products(scope: Scope) -> int:
    return math.prod(loop.extent for loop in scope.traversal + scope.summation)


def _compounds(scope: Scope) -> int:
    return sum(index.compound for read in scope.factors for index in read.index)


def _repair_layout(scope: Scope) -> tuple[str, Scope] | None:
    for position, read in enumerate(scope.factors):
        rearranged = isinstance(read.tensor, Scope) and not read.tensor.is_view
        if not rearranged and any(index.compound for index in read.index):
            return "layout transformation", rearrange(scope, position)
    return None


@once
def repair_convolution(scope: Scope) -> tuple[str, Scope] | None:
    """The derivation that removes the first mismatch between a contraction and a dense convolution.

    As `repair_product`. Strides and dilation are mismatches: more can be derived from dense convolutions.
    """
    match = match_convolution(scope)
    if match is not None and match.dense:
        return None
    traversal = {loop.name for loop in scope.traversal}
    for division in scope.divisions():
        name = division.of.iterator
        if name in traversal and division.of.coefficient(name) == 1:
            return "variable splitting", split_variable(scope, name, division.by, division.of.const)
    split = applied(scope, dimension_splitting)
    if split:
        return "dimension splitting", split[0]
    nested = _repair_nested_taps(scope)
    if nested is not None:
        return nested
    rules: dict[str, Rule] = {"dilation splitting": dilation_splitting, "stride splitting": stride_splitting}
    steps = ((name, derived) for name, rule in rules.items() for derived in applied(scope, rule))
    return next(steps, None)


def repair_phases(scope: Scope) -> tuple[str, Scope] | None:
    """The derivation that splits the first iterator that is divided by 2 into phases; as `repair_product`."""
    traversal = {loop.name for loop in scope.traversal}
    for division in scope.divisions():
        name = division.of.iterator
        if division.by == 2 and name in traversal and division.of.coefficient(name) == 1:
            derived = split_phases(scope, name)
            if derived is not None:
                return "phase splitting", derived
    return None


def _repair_nested_taps(scope: Scope) -> tuple[str, Scope] | None:
    """A window of windows: the sum over the outer taps leaves, and they move into where windows start."""
    traversal = {loop.name for loop in scope.traversal}
    summation = {loop.name for loop in scope.summation}
    compound = [index for read in scope.factors for index in read.index if len(index.terms) > 1]
    outer = set()
    for index in compound:
        taps = sorted((abs(c), str(a)) for a, c in index.terms if a in summation)
        if traversal & set(index.iterators()):
            outer |= {name for _, name in taps[1:]}
    if outer and outer != summation:
        return "summation splitting", split_summation(scope, outer)
    for index in compound:
        start = Affine(tuple((a, c) for a, c in index.terms if a in traversal))
        if len(start.terms) < 2:
            continue
        for name in _replaceable(scope, start):
            derived = substitute(scope, start, name)
            if derived is not None and _pays(scope, simplify(derived)[0], terms=True):
                return "variable substitution", derived
    return None
