"""Plans: for each operator, search, check, measure, and keep the winner."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field

import torch

from ollie_compile import cost, tune
from ollie_compile.config import OllieConfig
from ollie_compile.lower import Program, programs
from ollie_compile.operators import Convolution
from ollie_compile.search import Derivation, SearchStats, search
from ollie_compile.verify import check_derivation, check_program

logger = logging.getLogger(__name__)

SEARCH_SHARE = 0.3  # of an operator's budget; the rest compiles and measures


@dataclass(slots=True)
class Candidate:
    """A program with what is known about it; times in seconds."""

    program: Program
    derivation: Derivation
    bound_s: float
    measured_s: float | None = None
    rejected: str | None = None


@dataclass(slots=True)
class Plan:
    """What was found for one operator; `winner` None keeps the original."""

    operator: Convolution
    winner: Candidate | None = None
    reason: str = ""
    original_s: float | None = None
    candidates: list[Candidate] = field(default_factory=list)
    stats: SearchStats = field(default_factory=SearchStats)
    seconds: float = 0.0


_plans: dict[tuple[Convolution, OllieConfig, int], Plan] = {}


def reset() -> None:
    """Forget all plans of this process."""
    _plans.clear()


def plan(operator: Convolution, config: OllieConfig, budget_s: float) -> Plan:
    """The plan for an operator, made once a process for each configuration and number of threads."""
    key = (operator, config, torch.get_num_threads())
    if key not in _plans:
        start = time.perf_counter()
        with tune.outside_compilation():
            made = _make(operator, config, budget_s)
        made.seconds = time.perf_counter() - start
        _plans[key] = made
    return _plans[key]


def _make(operator: Convolution, config: OllieConfig, budget_s: float) -> Plan:
    made = Plan(operator)
    if budget_s <= 0:
        made.reason = "no time left in the budget"
        return made
    stop = time.perf_counter() + budget_s
    found = search(operator.expression(), max_depth=config.max_depth, budget_s=budget_s * SEARCH_SHARE)
    made.stats = found.stats
    made.candidates = [
        Candidate(program, derivation, cost.bound_seconds(program, operator.dtype, operator.device))
        for derivation in found.derivations
        for program in programs(derivation.scope)
    ]
    made.candidates.sort(key=lambda candidate: candidate.bound_s)
    x, weight = operator.example_inputs()
    made.original_s = cost.median_seconds(lambda: operator.reference(x, weight), budget_s=0.05)
    for candidate in made.candidates:
        if candidate.bound_s > made.original_s * (1 - config.margin):
            candidate.rejected = "its cost bound does not beat the original"
    _drop_beyond(made, config.candidates, "cheaper candidates came first")
    if config.verify:
        _verify(made)
    if config.tune == "measure":
        _measure(made, config, stop)
    else:
        made.winner = next((c for c in made.candidates if c.rejected is None), None)
        made.reason = "lowest cost bound" if made.winner else "no candidate is left"
    return made


def _drop_beyond(made: Plan, count: int, reason: str) -> None:
    """Reject all but the first `count` candidates that are not rejected yet."""
    left = [candidate for candidate in made.candidates if candidate.rejected is None]
    for candidate in left[count:]:
        candidate.rejected = reason


def _verify(made: Plan) -> None:
    expression = made.operator.expression()
    for candidate in made.candidates:
        if candidate.rejected is None:
            wrong = check_derivation(expression, candidate.program.scope)
            wrong = wrong or check_program(made.operator, candidate.program)
            if wrong is not None:
                candidate.rejected = f"wrong: {wrong}"
                logger.error("ollie: %s: dropped %s: it %s", made.operator, candidate.program.scope, wrong)


def _measure(made: Plan, config: OllieConfig, stop: float) -> None:
    operator = made.operator
    inputs = operator.example_inputs()
    constant = 1 if config.freeze else None
    calls = []
    timed = []
    for candidate in made.candidates:
        if candidate.rejected is None and time.perf_counter() > stop:
            candidate.rejected = "no time left in the budget"
        if candidate.rejected is None:
            function = operator.finished(candidate.program)
            try:
                calls.append(tune.compiled(function, inputs, constant=constant))
            except Exception as error:  # whatever a code generator raises: the original still stands
                candidate.rejected = f"did not compile: {error}"
                logger.warning("ollie: %s: %s did not compile: %s", operator, candidate.program, error)
                continue
            timed.append(candidate)
    if not timed:
        made.reason = "no candidate is left"
        return
    calls.append(tune.compiled(operator.reference, inputs, constant=None))
    *times, made.original_s = tune.measure(calls)
    for candidate, seconds in zip(timed, times, strict=True):
        candidate.measured_s = seconds
        if seconds > made.original_s * (1 - config.margin):
            candidate.rejected = "measured no faster than the original"
    good = [candidate for candidate in timed if candidate.rejected is None]
    if not good:
        made.reason = "the original measured fastest"
        return
    made.winner = min(good, key=lambda candidate: candidate.measured_s or 0.0)
    made.reason = "measured fastest"
    for candidate in good:
        if candidate is not made.winner:
            candidate.rejected = "another candidate measured faster"
