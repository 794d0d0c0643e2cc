"""Derivation rules: each turns a scope into scopes of equal value (OLLIE, section 4).

A rule is a function from a scope to what it derives. Exploration applies the rules of `EXPLORATIVE` at
every scope that no operator computes yet, and those of `RELATING`, which concern several contractions,
everywhere; `simplify` applies the others, which only ever remove work, to a fixpoint. `register` adds a
rule of the user's own.
"""

import functools
from collections.abc import Callable, Iterator

from ollie_compile.expr import Read, Scope
from ollie_compile.rules.banding import band_tiling
from ollie_compile.rules.bilinear import bilinear_decomposition
from ollie_compile.rules.boundary import boundary_tightening
from ollie_compile.rules.layout import dimension_splitting, layout_transformation
from ollie_compile.rules.linear import reassociation, shared_factor
from ollie_compile.rules.merging import idle_iterator, traversal_merging, unit_iterator
from ollie_compile.rules.substitution import variable_splitting, variable_substitution
from ollie_compile.rules.summation import summation_splitting
from ollie_compile.rules.windows import dilation_splitting, stride_splitting, tap_splitting

__all__ = ["EXPLORATIVE", "RELATING", "SIMPLIFYING", "Rule", "register", "rewrites", "simplify"]

Rule = Callable[[Scope], Iterator[Scope]]

EXPLORATIVE: dict[str, Rule] = {
    "summation splitting": summation_splitting,
    "variable substitution": variable_substitution,
    "variable splitting": variable_splitting,
    "layout transformation": layout_transformation,
    "dilation splitting": dilation_splitting,
    "stride splitting": stride_splitting,
    "tap splitting": tap_splitting,
    "dimension splitting": dimension_splitting,
    "band tiling": band_tiling,
    "bilinear decomposition": bilinear_decomposition,
}
RELATING: dict[str, Rule] = {
    "reassociation": reassociation,
    "shared factor": shared_factor,
}
SIMPLIFYING: dict[str, Rule] = {
    "traversal merging": traversal_merging,
    "unit iterator": unit_iterator,
    "idle iterator": idle_iterator,
    "boundary tightening": boundary_tightening,
}


def register(name: str, rule: Rule) -> None:
    """Add a rule to exploration; verification drops and names what it derives wrongly.

    Raises:
        ValueError: a rule of this name exists.
    """
    if name in EXPLORATIVE | RELATING | SIMPLIFYING:
        raise ValueError(f"A rule must have a name of its own, got {name!r}: choose another.")
    EXPLORATIVE[name] = rule


def rewrites(
    scope: Scope,
    rule: Rule,
    where: Callable[[Scope], bool] = lambda _: True,
    prune: Callable[[Scope], bool] = lambda _: False,
) -> Iterator[Scope]:
    """The expression with `rule` applied at one of its scopes, each way in turn.

    Args:
        where: the scopes at which the rule may be applied.
        prune: the scopes that are left out with all below them.
    """
    if prune(scope):
        return
    if where(scope):
        yield from rule(scope)
    for position, read in enumerate(scope.factors):
        if isinstance(read.tensor, Scope):
            for derived in rewrites(read.tensor, rule, where, prune):
                yield scope.with_factor(position, Read(derived, read.index))


@functools.lru_cache(maxsize=1 << 14)
def _is_simple(scope: Scope) -> bool:
    """Whether no simplifying rule applies to a scope or below; derived expressions share most scopes."""
    below = (read.tensor for read in scope.factors if isinstance(read.tensor, Scope))
    return all(map(_is_simple, below)) and not any(True for rule in SIMPLIFYING.values() for _ in rule(scope))


def simplify(scope: Scope) -> tuple[Scope, list[str]]:
    """Apply the simplifying rules until none applies; returns the scope and the rules that did."""
    applied: list[str] = []
    while True:
        for name, rule in SIMPLIFYING.items():
            derived = next(rewrites(scope, rule, prune=_is_simple), None)
            if derived is not None:
                scope = derived
                applied.append(name)
                break
        else:
            return scope, applied
