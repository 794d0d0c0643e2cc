"""Hybrid derivation search (OLLIE, section 5): exploration over states, guided completion at each.

Exploration applies one rule at a time, level by level, and never explores two states with one fingerprint.
At every state guided derivation repairs, one after the other, the mismatches between its contractions
and an operator: a matrix product, a dense convolution. What can be lowered on the way is a candidate.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ollie_compile.expr import Scope, canonical, once
from ollie_compile.lower import is_lowerable
from ollie_compile.matching import match_matmul, repair_convolution, repair_product
from ollie_compile.rules import EXPLORATIVE, RELATING, rewrites, simplify
from ollie_compile.transforms import is_transform

BEAM = 64
MAX_GROWTH = 4  # times the products of the original; more than this is never won back by faster operators

Repair = Callable[[Scope], tuple[str, Scope] | None]
REPAIRS: tuple[Repair, ...] = (repair_product, repair_convolution)


@dataclass(frozen=True, slots=True)
class Step:
    """One derivation step: the rules applied and the expression after them."""

    rules: tuple[str, ...]
    scope: Scope

    def __str__(self) -> str:
        return f"{' + '.join(self.rules)}\n    {self.scope}"


@dataclass(frozen=True, slots=True)
class Derivation:
    """How an expression was reached; `depth` counts the explorative steps."""

    scope: Scope
    steps: tuple[Step, ...] = ()
    depth: int = 0

    def then(self, rule: str, scope: Scope, *, depth: int) -> Derivation:
        scope, simplified = simplify(scope)
        return Derivation(scope, (*self.steps, Step((rule, *simplified), scope)), depth)


@dataclass(slots=True)
class SearchStats:
    """What a search did.

    Attributes:
        states: expressions visited, no two with one fingerprint.
        duplicates: expressions met again.
        pruned: expressions left out, by dominance or for lack of room in the beam.
        candidates: lowerable expressions found.
        seconds: time taken.
        complete: whether the budget sufficed.
    """

    states: int = 0
    duplicates: int = 0
    pruned: int = 0
    candidates: int = 0
    seconds: float = 0.0
    complete: bool = True


@dataclass(slots=True)
class SearchResult:
    """The lowerable derivations, in the order found, without the original expression."""

    derivations: list[Derivation] = field(default_factory=list)
    stats: SearchStats = field(default_factory=SearchStats)


class _Search:
    """The states of one search, met so far and still to be explored."""

    def __init__(self, expression: Scope, budget_s: float, *, fingerprints: bool) -> None:
        self.start, self.budget_s = time.perf_counter(), budget_s
        self.fingerprints = fingerprints
        self.seen: set[str] = set()
        self.completed: set[tuple[Repair, str]] = set()
        self.most_products = MAX_GROWTH * max(1, products(expression))
        self.result = SearchResult()

    @property
    def in_time(self) -> bool:
        stats = self.result.stats
        stats.complete = stats.complete and time.perf_counter() - self.start <= self.budget_s
        return stats.complete

    def visit(self, state: Derivation) -> bool:
        """Whether a state is new and not dominated; lowerable ones are kept as candidates."""
        stats = self.result.stats
        if self.fingerprints:
            fingerprint = canonical(state.scope)
            if fingerprint in self.seen:
                stats.duplicates += 1
                return False
            self.seen.add(fingerprint)
        stats.states += 1
        if products(state.scope) > self.most_products:
            stats.pruned += 1
            return False
        if is_lowerable(state.scope):
            self.result.derivations.append(state)
        return True

    def completions(self, state: Derivation, repair: Repair) -> Iterator[Derivation]:
        """The states on the way to one in which every contraction is an operator's."""
        met = self.completed if self.fingerprints else set()
        while (key := (repair, canonical(state.scope))) not in met:
            met.add(key)
            step = next(_repairs(state.scope, repair), None)
            if step is None:
                return
            name, target, repaired = step
            state = state.then(name, _replaced(state.scope, target, repaired), depth=state.depth)
            yield state


def search(
    expression: Scope,
    *,
    max_depth: int,
    budget_s: float,
    beam: int = BEAM,
    guided: bool = True,
    fingerprints: bool = True,
) -> SearchResult:
    """Derive lowerable expressions equal to `expression`; equal arguments give equal results.

    Args:
        max_depth: explorative steps from the start (repairs of guided derivations do not count).
        budget_s: seconds after which exploration stops; what was found until then is returned and
            `stats.complete` is False.
        beam: how many states of one depth are explored further, those with the least work first.
        guided: repair mismatches at every state; False leaves everything to exploration.
        fingerprints: never explore two equal states; False is there to see what they save.
    """
    found = _Search(expression, budget_s, fingerprints=fingerprints)
    scope, simplified = simplify(expression)
    steps = (Step(simplified, scope),) if simplified else ()
    level = [Derivation(scope, steps)]
    found.visit(level[0])
    for depth in range(max_depth + 1):
        for state, repair in itertools.product(list(level), REPAIRS if guided else ()):
            level += filter(found.visit, found.completions(state, repair))
            if not found.in_time:
                break
        if depth == max_depth or not found.in_time:
            break
        level = sorted(level, key=lambda state: work(state.scope))
        found.result.stats.pruned += len(level[beam:])
        level = _next_level(found, level[:beam])
        if not level:
            break
    stats = found.result.stats
    stats.candidates = len(found.result.derivations)
    stats.seconds = time.perf_counter() - found.start
    return found.result


def _next_level(found: _Search, level: Sequence[Derivation]) -> list[Derivation]:
    deeper = []
    for state in level:
        for derived in _explore(state):
            if found.visit(derived):
                deeper.append(derived)
            if not found.in_time:
                return deeper
    return deeper


@once
def products(scope: Scope) -> int:
    """Multiplications in the contractions of an expression."""
    contractions = (inner for inner in scope.scopes() if inner.is_contraction)
    return sum(math.prod(loop.extent for loop in inner.traversal + inner.summation) for inner in contractions)


@once
def work(scope: Scope) -> tuple[int, int]:
    """What ranks states: their products, then the elements that computing them makes."""
    return products(scope), sum(math.prod(inner.shape) for inner in scope.scopes())


def _explore(state: Derivation) -> Iterator[Derivation]:
    for name, rule in (EXPLORATIVE | RELATING).items():
        for scope in rewrites(state.scope, rule, _is_open if name in EXPLORATIVE else lambda _: True):
            yield state.then(name, scope, depth=state.depth + 1)


def _is_open(scope: Scope) -> bool:
    """Whether exploration may change a scope: views are settled, and so is what an operator computes."""
    return not (scope.is_view or is_transform(scope) or match_matmul(scope) is not None)


def _repairs(scope: Scope, repair: Repair) -> Iterator[tuple[str, Scope, Scope]]:
    for target in scope.scopes():
        if _wants_repair(target) and (step := repair(target)) is not None:
            yield step[0], target, step[1]


def _wants_repair(scope: Scope) -> bool:
    """Whether a product is neither an operator's nor plainly elementwise."""
    unsettled = scope.summation or scope.divisions()
    return scope.terms() > 1 and scope.function == "*" and bool(unsettled) and match_matmul(scope) is None


def _replaced(scope: Scope, target: Scope, repaired: Scope) -> Scope:
    return next(rewrites(scope, lambda _: iter((repaired,)), lambda inner: inner is target))
