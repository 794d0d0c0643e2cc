"""Plans: for each operator of a graph search, bound, check, measure, and keep the winner.

A graph's operators are prepared first, each with an equal share of the time: searched, bounded and the most
promising candidates timed as they are called. What is left of the time goes to where most can be gained.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from ollie_compile import tune
from ollie_compile.config import OllieConfig
from ollie_compile.lower import Program
from ollie_compile.operators import Operator
from ollie_compile.rules import of_users
from ollie_compile.search import Derivation, SearchStats

logger = logging.getLogger(__name__)

PREPARED = 0.5  # share of a graph's budget after which no search, bound or first timing begins
SAME_BUDGET = 1.05  # equal budgets of a graph leave an operator shares that differ by the clock
OUT_OF_TIME = "no time left in the budget"


@dataclass(slots=True)
class Candidate:
    """A program with what is known about it; times in seconds, `error` relative to the largest output.

    `reproducer` is Python source that shows again what is wrong with it.
    """

    program: Program
    derivation: Derivation
    bound_s: float = math.inf
    measured_s: float | None = None
    error: float | None = None
    rejected: str | None = None
    reproducer: str | None = None


@dataclass(slots=True)
class Plan:
    """What was found for one operator in `budget_s`; `winner` None keeps the original."""

    operator: Operator
    budget_s: float
    winner: Candidate | None = None
    reason: str = ""
    original_s: float | None = None
    candidates: list[Candidate] = field(default_factory=list)
    stats: SearchStats = field(default_factory=SearchStats)
    seconds: float = 0.0

    @property
    def complete(self) -> bool:
        """Whether nothing was left out for lack of time."""
        return self.stats.complete and not self.cut and self.reason != OUT_OF_TIME

    @property
    def cut(self) -> bool:
        """Whether candidates were left out for lack of time."""
        return any(candidate.rejected == OUT_OF_TIME for candidate in self.candidates)

    @property
    def gain_s(self) -> float:
        """Seconds of one call that the candidates left could save at best."""
        bounds = [candidate.bound_s for candidate in self.candidates if candidate.rejected is None]
        return max(0.0, (self.original_s or 0.0) - min(bounds, default=math.inf))


_plans: dict[tuple[Operator, OllieConfig, int, frozenset[str]], Plan] = {}


def reset() -> None:
    """Forget all plans of this process."""
    _plans.clear()


def plan(operator: Operator, config: OllieConfig, budget_s: float) -> Plan:
    """The plan for one operator.

    Raises:
        Exception: whatever planning failed with.
    """
    made = plan_all({operator: 1}, config, budget_s)[operator]
    if isinstance(made, Exception):
        raise made
    return made


def plan_all(
    operators: Mapping[Operator, int], config: OllieConfig, budget_s: float
) -> dict[Operator, Plan | Exception]:
    """The plans for a graph's operators, of this process, from the disk or made now, or why that failed.

    A plan that the budget cut short is made anew when it is asked for again with a larger one.

    Args:
        operators: with how often each occurs.
        budget_s: seconds for all of them; 0 keeps the originals.
    """
    from ollie_compile import saved

    made: dict[Operator, Plan | Exception] = {}
    for operator in operators:
        known = _plans.get(_key(operator, config))
        if config.budget_s == 0:
            made[operator] = Plan(operator, budget_s, reason=OUT_OF_TIME)
        elif known is not None and (known.complete or budget_s <= SAME_BUDGET * known.budget_s):
            made[operator] = known
        elif (kept := saved.load(operator, config, budget_s)) is not None:
            made[operator] = _plans[_key(operator, config)] = kept
    new = {operator: count for operator, count in operators.items() if operator not in made}
    if new:
        with tune.outside_compilation():
            made |= _make(new, config, budget_s)
    return made


def _key(operator: Operator, config: OllieConfig) -> tuple[Operator, OllieConfig, int, frozenset[str]]:
    return operator, replace(config, budget_s=0), torch.get_num_threads(), frozenset(of_users())


def _make(
    operators: Mapping[Operator, int], config: OllieConfig, budget_s: float
) -> dict[Operator, Plan | Exception]:
    from ollie_compile import choice, cost, saved

    made: dict[Operator, Plan | Exception] = {}
    start = time.perf_counter()
    stop = start + budget_s
    for left, operator in zip(range(len(operators), 0, -1), operators, strict=True):
        begun = time.perf_counter()
        fresh = Plan(operator, budget_s)
        made[operator] = fresh
        share = (start + PREPARED * budget_s - begun) / left
        try:
            choice.prepare(fresh, config, begun + share)
        except Exception as error:  # a fault in planning must not take the user's model with it
            made[operator] = error
        fresh.seconds = time.perf_counter() - begun
    prepared = [result for result in made.values() if isinstance(result, Plan)]
    gains = {fresh.operator: operators[fresh.operator] * fresh.gain_s for fresh in prepared}
    hoped = sum(gains.values())
    for fresh in sorted(prepared, key=lambda fresh: -gains[fresh.operator]):
        begun, gain = time.perf_counter(), gains[fresh.operator]
        share = gain / hoped if hoped > 0 else 1.0
        hoped -= gain
        try:
            choice.decide(fresh, config, begun + share * (stop - begun))
        except Exception as error:
            made[fresh.operator] = error
        fresh.seconds += time.perf_counter() - begun
    for operator, result in made.items():
        if isinstance(result, Plan):
            _plans[_key(operator, config)] = result
            saved.save(result, config)
        else:
            logger.warning("ollie: %s: left as it is, planning failed", operator, exc_info=result)
    cost.profile.save()
    return made
