"""Plans: for each operator, search, check, measure, and keep the winner."""

from __future__ import annotations

import functools
import logging
import math
import time
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ollie_compile import cost, tune
from ollie_compile.config import OllieConfig
from ollie_compile.expr import Input, Read, Scope
from ollie_compile.lower import Program, programs, with_kernels
from ollie_compile.numeric import check_program, exact_results, reproducer, rounding_error
from ollie_compile.operators import Operator, Subprogram
from ollie_compile.rules import of_users
from ollie_compile.search import Derivation, SearchStats, search, work
from ollie_compile.verify import check_derivation, check_notation

logger = logging.getLogger(__name__)

# Shares of an operator's budget after which no search, bound or check begins; the rest compiles and measures.
SEARCHED, BOUNDED, CHECKED = 0.3, 0.5, 0.7
SAME_BUDGET = 1.05  # equal budgets of a graph leave an operator shares that differ by the clock
MAX_GROWTH = 16  # of the largest intermediate over the operator's own tensors; more may not fit in memory
MAX_BOUNDED = 64  # candidates of one operator whose cost is bounded, those with the least work first
HALF_SLACK = (
    2.0  # times the rounding of the original that a candidate may have where it is above the tolerance
)
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


_plans: dict[tuple[Operator, OllieConfig, int, frozenset[str]], Plan] = {}


def reset() -> None:
    """Forget all plans of this process."""
    _plans.clear()


def plan(operator: Operator, config: OllieConfig, budget_s: float) -> Plan:
    """The plan for an operator, made once a process for each configuration, thread count and users' rules.

    A plan that the budget cut short is made anew when it is asked for again with a larger one.
    """
    if config.budget_s == 0:
        return Plan(operator, budget_s, reason=OUT_OF_TIME)
    key = (operator, replace(config, budget_s=0), torch.get_num_threads(), frozenset(of_users()))
    known = _plans.get(key)
    if known is not None and (known.complete or budget_s <= SAME_BUDGET * known.budget_s):
        return known
    start = time.perf_counter()
    with tune.outside_compilation():
        made = _plans[key] = _make(operator, config, budget_s)
    made.seconds = time.perf_counter() - start
    return made


def _make(operator: Operator, config: OllieConfig, budget_s: float) -> Plan:
    made = Plan(operator, budget_s)
    start = time.perf_counter()
    if budget_s <= 0:
        made.reason = OUT_OF_TIME
        return made
    if config.verify and isinstance(operator, Subprogram) and operator.declared:
        wrong = check_notation(operator)
        if wrong is not None:
            made.reason = f"its notation is not what its function computes: it {wrong}"
            logger.error("ollie: %s: left as it is, %s", operator, made.reason)
            return made
    found = search(
        operator.expression(),
        max_depth=config.max_depth * operator.steps,
        budget_s=start + SEARCHED * budget_s - time.perf_counter(),
        workers=config.workers,
    )
    made.stats = found.stats
    inputs = operator.example_inputs()
    made.original_s = cost.median_seconds(lambda: operator.reference(*inputs), budget_s=0.05)
    made.candidates = [
        Candidate(program, derivation)
        for derivation in found.derivations
        for program in programs(derivation.scope, operator.device)
    ]
    _bound(made, config, start + BOUNDED * budget_s)
    if config.tune == "measure":
        left = _take_best(made, config, start + CHECKED * budget_s)
        _measure(made, left, config, start + budget_s)
    elif left := _take_best(made, config, start + budget_s):
        made.winner, made.reason = left[0], "lowest cost bound"
        for candidate in left[1:]:
            candidate.rejected = "another candidate has a lower bound"
    if not made.reason:
        made.reason = OUT_OF_TIME if made.cut else "no candidate is left"
    return made


def _bound(made: Plan, config: OllieConfig, stop: float) -> None:
    """Bound every candidate's time, reject what cannot win, and sort by the bound."""
    operator = made.operator
    layouts = (*operator.inputs.values(), *operator.outputs)
    limit = MAX_GROWTH * sum(math.prod(layout.shape) for layout in layouts)
    assert made.original_s is not None
    made.candidates.sort(key=lambda candidate: work(candidate.program.scope))
    for place, candidate in enumerate(made.candidates):
        program = candidate.program
        if place >= MAX_BOUNDED:
            candidate.rejected = "others need fewer products"
        elif time.perf_counter() > stop:
            candidate.rejected = OUT_OF_TIME
        elif (largest := cost.largest_elements(program.scope)) > limit:
            candidate.rejected = f"needs {largest * operator.dtype.itemsize / 2**30:.2g} GiB in one tensor"
        else:
            ahead = _ahead(program.scope, operator.parameters) if config.freeze else program.scope
            candidate.bound_s = cost.bound_seconds(
                replace(program, scope=ahead), operator.dtype, operator.device
            )
            if candidate.bound_s > made.original_s * (1 - config.margin):
                candidate.rejected = "its cost bound does not beat the original"
    made.candidates.sort(key=lambda candidate: candidate.bound_s)


def _ahead(scope: Scope, parameters: tuple[str, ...]) -> Scope:
    """The expression with an input in the place of whatever depends on parameters alone."""
    factors = []
    for place, read in enumerate(scope.factors):
        inner = read.tensor
        if isinstance(inner, Scope) and inner.inputs().keys() <= set(parameters):
            index = tuple(i - low for i, (low, _) in zip(read.index, inner.box, strict=True))
            factors.append(Read(Input(f"ahead_{place}", inner.shape), index))
        else:
            new = _ahead(inner, parameters) if isinstance(inner, Scope) else inner
            factors.append(Read(new, read.index))
    return scope.over(factors=tuple(factors))


def _take_best(made: Plan, config: OllieConfig, stop: float) -> list[Candidate]:
    """The first `config.candidates` of those left that pass the checks; the others are rejected.

    The best with eOperators that have other kernels is taken with those as well.
    """
    checks = _Checks(made.operator, config, stop)
    best: list[Candidate] = []
    others: list[Candidate] = []
    for candidate in made.candidates:
        if candidate.rejected is not None:
            continue
        if len(best) == config.candidates:
            candidate.rejected = "cheaper candidates came first"
        elif checks.passes(candidate):
            best.append(candidate)
            if not others:
                written = with_kernels(candidate.program, made.operator.device)
                others = [replace(candidate, program=program) for program in written]
    made.candidates += others
    return best + [candidate for candidate in others if checks.passes(candidate)]


class _Checks:
    """The checks of one operator's candidates; after `stop` none begins."""

    def __init__(self, operator: Operator, config: OllieConfig, stop: float) -> None:
        self.operator, self.config, self.stop = operator, config, stop
        self.slowest = 0.0

    @functools.cached_property
    def exact(self) -> tuple[Tensor, ...]:
        return exact_results(self.operator)

    @functools.cached_property
    def limit(self) -> float:
        """How much a candidate may round."""
        if self.operator.dtype.itemsize >= 4:
            return self.config.tolerance
        return max(self.config.tolerance, HALF_SLACK * rounding_error(self.operator, None, self.exact))

    def passes(self, candidate: Candidate) -> bool:
        """Whether a candidate is right and rounds no more than it may; otherwise it is rejected."""
        start = time.perf_counter()
        late = start + self.slowest > self.stop
        candidate.rejected = OUT_OF_TIME if late else self._fault(candidate)
        self.slowest = max(self.slowest, time.perf_counter() - start)
        return candidate.rejected is None

    def _fault(self, candidate: Candidate) -> str | None:
        operator, program = self.operator, candidate.program
        if self.config.verify:
            expression = operator.expression()
            wrong = check_derivation(expression, program.scope)
            if wrong is None and time.perf_counter() > self.stop:
                return OUT_OF_TIME
            wrong = wrong or check_program(operator, program, self.exact)
            if wrong is not None:
                wrong += _first_wrong_step(expression, candidate.derivation)
                candidate.reproducer = reproducer(operator, program)
                logger.error(
                    "ollie: %s: dropped, it %s; to see it again:\n%s", operator, wrong, candidate.reproducer
                )
                return f"wrong: {wrong}"
        candidate.error = rounding_error(operator, program, self.exact)
        if not candidate.error <= self.limit:
            return f"its rounding error {candidate.error:.1e} is above the tolerance {self.limit:.1e}"
        return None


def _first_wrong_step(expression: Scope, derivation: Derivation) -> str:
    for step in derivation.steps:
        if check_derivation(expression, step.scope) is not None:
            return f", first after the rules {' + '.join(step.rules)}"
    return ""


def _measure(made: Plan, left: list[Candidate], config: OllieConfig, stop: float) -> None:
    operator = made.operator
    inputs = operator.example_inputs()
    names = list(operator.inputs)
    constant = [names.index(name) for name in operator.parameters if name in names] if config.freeze else []
    calls = []
    timed = []
    slowest = 0.0
    for candidate in left:
        start = time.perf_counter()
        if start + slowest > stop:
            candidate.rejected = OUT_OF_TIME
            continue
        try:
            values = (*inputs, *candidate.program.constants(operator.dtype, operator.device).values())
            calls.append(tune.compiled(operator.finished(candidate.program), values, constant=constant))
        except Exception as error:  # whatever a code generator raises: the original still stands
            candidate.rejected = f"did not compile: {error}"
            logger.warning("ollie: %s: %s did not compile: %s", operator, candidate.program, error)
            continue
        timed.append(candidate)
        slowest = max(slowest, time.perf_counter() - start)
    if not timed:
        return
    calls.append(tune.compiled(operator.reference, inputs, constant=()))
    *times, made.original_s = tune.measure(calls, stop)
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
