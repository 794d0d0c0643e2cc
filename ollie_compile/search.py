"""Hybrid derivation search (OLLIE, section 5): exploration over states, guided completion at each.

Exploration applies one rule at a time, breadth first, and never visits two states with one fingerprint.
At every state guided derivation repairs, one after the other, the mismatches between its contractions
and a matrix product. What can be lowered on the way is a candidate.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

from ollie_compile.expr import Scope, canonical
from ollie_compile.lower import is_lowerable
from ollie_compile.matching import match_matmul, repair
from ollie_compile.rules import EXPLORATIVE, rewrites, simplify


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
        rules = (rule, *dict.fromkeys(simplified))
        return Derivation(scope, (*self.steps, Step(rules, scope)), depth)


@dataclass(slots=True)
class SearchStats:
    """States visited, states met again, lowerable expressions found, and the time in seconds."""

    states: int = 0
    duplicates: int = 0
    candidates: int = 0
    seconds: float = 0.0
    complete: bool = True


@dataclass(slots=True)
class SearchResult:
    """The lowerable derivations, in the order found, without the original expression."""

    derivations: list[Derivation] = field(default_factory=list)
    stats: SearchStats = field(default_factory=SearchStats)


def search(expression: Scope, *, max_depth: int, budget_s: float) -> SearchResult:
    """Derive lowerable expressions equal to `expression`.

    Args:
        max_depth: explorative steps from the start (repairs of guided derivations do not count).
        budget_s: seconds after which exploration stops; what was found until then is returned and
            `stats.complete` is False.
    """
    start = time.perf_counter()

    def in_time() -> bool:
        result.stats.complete = time.perf_counter() - start <= budget_s
        return result.stats.complete

    result = SearchResult()
    seen: set[str] = set()
    frontier: deque[Derivation] = deque()

    def visit(state: Derivation) -> bool:
        fingerprint = canonical(state.scope)
        if fingerprint in seen:
            result.stats.duplicates += 1
            return False
        seen.add(fingerprint)
        result.stats.states += 1
        if is_lowerable(state.scope):
            result.derivations.append(state)
        frontier.append(state)
        return True

    scope, simplified = simplify(expression)
    steps = (Step(tuple(dict.fromkeys(simplified)), scope),) if simplified else ()
    visit(Derivation(scope, steps))
    while frontier and in_time():
        state = frontier.popleft()
        for completed in _guided(state):
            if not visit(completed) or not in_time():
                break
        for derived in _explore(state) if state.depth < max_depth else ():
            visit(derived)
            if not in_time():
                break
    result.stats.candidates = len(result.derivations)
    result.stats.seconds = time.perf_counter() - start
    return result


def _explore(state: Derivation) -> Iterator[Derivation]:
    for name, rule in EXPLORATIVE.items():
        for scope in rewrites(state.scope, rule, _is_open):
            yield state.then(name, scope, depth=state.depth + 1)


def _is_open(scope: Scope) -> bool:
    """Whether exploration may change a scope: views are settled, and so is what an operator computes."""
    return not scope.is_view and match_matmul(scope) is None


def _guided(state: Derivation) -> Iterator[Derivation]:
    """The states on the way to one in which every contraction is a matrix product."""
    while True:
        target = next((scope for scope in state.scope.scopes() if _wants_repair(scope)), None)
        step = repair(target) if target is not None else None
        if step is None:
            return
        name, repaired = step
        state = state.then(name, _replaced(state.scope, target, repaired), depth=state.depth)
        yield state


def _wants_repair(scope: Scope) -> bool:
    """Whether a product is neither an operator's nor plainly elementwise."""
    unsettled = scope.summation or scope.divisions()
    return len(scope.factors) > 1 and bool(unsettled) and match_matmul(scope) is None


def _replaced(scope: Scope, target: Scope | None, repaired: Scope) -> Scope:
    return next(rewrites(scope, lambda _: iter((repaired,)), lambda inner: inner is target))
