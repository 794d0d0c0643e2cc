"""Guided derivation: repairs of what keeps a contraction from being an operator's (OLLIE, section 4.3).

A scope is a (batched) matrix product when every dimension that its factors read is one iterator; otherwise
the first mismatch says which derivation repairs it.
"""

from __future__ import annotations

import math

from ollie_compile.expr import Affine, Scope, once
from ollie_compile.rules import Rule, applied, simplify
from ollie_compile.rules.layout import dimension_splitting, rearrange
from ollie_compile.rules.substitution import split_phases, split_variable, substitute
from ollie_compile.rules.summation import split_summation
from ollie_compile.rules.windows import dilation_splitting, stride_splitting
from ollie_compile.targets.convolutions import match_convolution

MAX_ADDED = 1.5  # times the products, up to which a substitution is better than rearranging the tensor


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
    return products <= MAX_ADDED * _products(scope) and left < measure(scope)


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
