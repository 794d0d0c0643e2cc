"""Derivation rules: each turns a scope into scopes of equal value (OLLIE, section 4).

A rule is a function from a scope to equal scopes. Exploration applies the rules of `EXPLORATIVE` at
every scope that no operator computes yet, and those of `RELATING`, which concern several contractions,
everywhere; `simplify` applies the others, which only ever remove work, to a fixpoint. `register` adds a
rule of the user's own.
"""

from collections.abc import Callable, Iterator

from ollie_compile.expr import Read, Scope, once
from ollie_compile.rules.banding import band_tiling
from ollie_compile.rules.bilinear import bilinear_decomposition
from ollie_compile.rules.boundary import boundary_tightening
from ollie_compile.rules.layout import dimension_splitting, layout_transformation
from ollie_compile.rules.linear import reassociation, shared_factor
from ollie_compile.rules.merging import idle_iterator, traversal_merging, unit_iterator
from ollie_compile.rules.splitting import distribution, expression_merging, expression_splitting
from ollie_compile.rules.substitution import skewing, variable_splitting, variable_substitution
from ollie_compile.rules.summation import summation_splitting
from ollie_compile.rules.windows import dilation_splitting, stride_splitting, tap_splitting

__all__ = ["EXPLORATIVE", "RELATING", "SIMPLIFYING", "Rule", "applied", "register", "rewrites", "simplify"]

Rule = Callable[[Scope], Iterator[Scope]]

EXPLORATIVE: dict[str, Rule] = {
    "summation splitting": summation_splitting,
    "variable substitution": variable_substitution,
    "variable splitting": variable_splitting,
    "skewing": skewing,
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
    "distribution": distribution,
    "expression splitting": expression_splitting,
    "expression merging": expression_merging,
}
SIMPLIFYING: dict[str, Rule] = {
    "traversal merging": traversal_merging,
    "unit iterator": unit_iterator,
    "idle iterator": idle_iterator,
    "boundary tightening": boundary_tightening,
}


_OWN = frozenset(EXPLORATIVE)


def of_users() -> set[str]:
    """Names of the registered rules."""
    return EXPLORATIVE.keys() - _OWN


def register(name: str, rule: Rule) -> None:
    """Add a rule to exploration; wrong derivations are dropped in verification, with the rule's name.

    Raises:
        ValueError: a rule of this name exists.
    """
    if name in EXPLORATIVE | RELATING | SIMPLIFYING:
        raise ValueError(f"A rule must have a name of its own, got {name!r}: choose another.")
    EXPLORATIVE[name] = rule


def rewrites(scope: Scope, rule: Rule, where: Callable[[Scope], bool] = lambda _: True) -> Iterator[Scope]:
    """The expression with `rule` applied at one of its scopes, each way in turn.

    Args:
        where: the scopes at which the rule may be applied.
    """
    if where(scope):
        yield from applied(scope, rule)
    for position, read in enumerate(scope.factors):
        if isinstance(read.tensor, Scope):
            for derived in rewrites(read.tensor, rule, where):
                yield scope.with_factor(position, Read(derived, read.index))


def applied(scope: Scope, rule: Rule) -> tuple[Scope, ...]:
    """The scopes that a rule derives, remembered, because derived expressions share most of their scopes."""
    if rule not in scope.memo:
        scope.memo[rule] = tuple(rule(scope))
    derived: tuple[Scope, ...] = scope.memo[rule]
    return derived


@once
def simplify(scope: Scope) -> tuple[Scope, tuple[str, ...]]:
    """Apply the simplifying rules to a fixpoint; returns the scope and the rules that applied."""
    names: list[str] = []
    for position, read in enumerate(scope.factors):
        if isinstance(read.tensor, Scope):
            inner, below = simplify(read.tensor)
            names += below
            if inner is not read.tensor:
                scope = scope.with_factor(position, Read(inner, read.index))
    for name, rule in SIMPLIFYING.items():
        derived = next(rule(scope), None)
        if derived is not None:
            simple, further = simplify(derived)
            return simple, tuple(dict.fromkeys((*names, name, *further)))
    return scope, tuple(dict.fromkeys(names))
