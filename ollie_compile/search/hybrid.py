"""Hybrid derivation search (OLLIE, section 5): exploration over states, guided completion at each.

Exploration applies one rule at a time, level by level, and never explores two states with one fingerprint.
At every state guided derivation repairs, one after the other, the mismatches between its contractions
and an operator: a matrix product, a dense convolution. What can be lowered on the way is a candidate.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ollie_compile.expr import Scope, canonical
from ollie_compile.measure import clock
from ollie_compile.rules import simplify
from ollie_compile.search.expansion import (
    COMPLETIONS,
    Expander,
    Expansion,
    Step,
    expanding,
    explored,
    is_candidate,
    products,
    work,
)

BEAM = 64
MAX_PRODUCTS = 4  # times those of the original; faster operators never win back more


@dataclass(frozen=True, slots=True)
class Derivation:
    """How an expression was reached; `depth` counts the explorative steps."""

    scope: Scope
    steps: tuple[Step, ...] = ()
    depth: int = 0

    def then(self, step: Step, *, depth: int) -> Derivation:
        return Derivation(step.scope, (*self.steps, step), depth)


@dataclass(slots=True)
class SearchStats:
    """The counts and the time of a search.

    Attributes:
        states: expressions visited, no two with one fingerprint.
        duplicates: expressions met again.
        pruned: expressions left out, by dominance or for lack of room in the beam.
        candidates: lowerable expressions found.
        seconds: CPU time taken, that of other processes included.
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

    def __init__(self, expression: Scope, budget_s: float, expand: Expander, *, fingerprints: bool) -> None:
        self.start, self.budget_s = clock.now(), budget_s
        self.expand, self.fingerprints = expand, fingerprints
        self.seen: set[str] = set()
        self.completed: set[tuple[Expansion, str]] = set()
        self.most_products = MAX_PRODUCTS * max(1, products(expression))
        self.result = SearchResult()

    @property
    def in_time(self) -> bool:
        stats = self.result.stats
        stats.complete = stats.complete and self.seconds <= self.budget_s
        return stats.complete

    @property
    def seconds(self) -> float:
        """CPU time taken until now, that of the other processes included."""
        return clock.now() - self.start + self.expand.elsewhere_s

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
        if is_candidate(state.scope):
            self.result.derivations.append(state)
        return True

    def completed_states(self, level: Sequence[Derivation]) -> Iterator[Derivation]:
        """The states on the way to those in which every contraction is an operator's."""
        tasks = [(repair, state) for state in level for repair in COMPLETIONS]
        expanded = self.expand([(repair, state.scope) for repair, state in tasks])
        for (repair, state), steps in zip(tasks, expanded, strict=True):
            met = self.completed if self.fingerprints else set()
            left = iter(steps)
            # From a state that was completed before, only known states would follow.
            while (key := (repair, canonical(state.scope))) not in met and (step := next(left, None)):
                met.add(key)
                state = state.then(step, depth=state.depth)
                yield state

    def explored_states(self, level: Sequence[Derivation]) -> Iterator[Derivation]:
        """The states one explorative step further."""
        expanded = self.expand([(explored, state.scope) for state in level])
        for state, steps in zip(level, expanded, strict=True):
            for step in steps:
                yield state.then(step, depth=state.depth + 1)

    def new(self, states: Iterator[Derivation]) -> list[Derivation]:
        """The states that are to be explored further, until the budget is spent."""
        return [state for state in itertools.takewhile(lambda _: self.in_time, states) if self.visit(state)]


def search(
    expression: Scope,
    *,
    max_depth: int,
    budget_s: float,
    beam: int = BEAM,
    guided: bool = True,
    fingerprints: bool = True,
    workers: int = 1,
) -> SearchResult:
    """Derive lowerable expressions equal to `expression`; equal arguments give equal results.

    Args:
        max_depth: explorative steps from the start (repairs of guided derivations do not count).
        budget_s: seconds of CPU time after which exploration stops; the derivations found until then are
            returned, and `stats.complete` is False.
        beam: how many states of one depth are explored further, those with the least work first.
        guided: repair mismatches at every state; False leaves everything to exploration.
        fingerprints: never explore two equal states; False is for measuring what they save.
        workers: processes that derive side by side; they pay in searches of seconds. Within the budget
            the result is the same for any number of them.

    Raises:
        ValueError: `workers` is not positive, or above 1 where processes cannot be forked.
    """
    with expanding(workers) as expand:
        found = _Search(expression, budget_s, expand, fingerprints=fingerprints)
        scope, simplified = simplify(expression)
        level = [Derivation(scope, (Step(simplified, scope),) if simplified else ())]
        found.visit(level[0])
        for depth in range(max_depth + 1):
            if guided:
                level += found.new(found.completed_states(level))
            if depth == max_depth or not level or not found.in_time:
                break
            level = sorted(level, key=lambda state: work(state.scope))
            found.result.stats.pruned += len(level[beam:])
            level = found.new(found.explored_states(level[:beam]))
        found.result.stats.seconds = found.seconds
    found.result.stats.candidates = len(found.result.derivations)
    return found.result
