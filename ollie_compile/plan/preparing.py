"""Preparing a plan: time the operator, search its expression, bound candidates, call the first of them."""

from __future__ import annotations

import itertools
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import replace

from ollie_compile.config import OllieConfig
from ollie_compile.expr import Input, Read, Scope
from ollie_compile.lower.layouts import programs
from ollie_compile.lower.lowering import CONVOLVED, Program
from ollie_compile.measure import bounds, calls, timing
from ollie_compile.plan.candidates import OUT_OF_TIME, Candidate, Plan
from ollie_compile.plan.checks import check_notation
from ollie_compile.plan.placing import (
    LATER,
    add_kernels,
    as_function,
    constant_inputs,
    left_open,
    memory_layouts,
)
from ollie_compile.problems.operators import Subprogram, largest_allowed
from ollie_compile.search.expansion import work
from ollie_compile.search.hybrid import search

logger = logging.getLogger(__name__)

ORIGINAL_S, TIMED = 0.02, 0.2  # seconds in which an original is timed, and of the time for preparing at most
SEARCHED, BOUNDED = 0.5, 0.8  # shares of the time for preparing after which no search, no bound begins
MAX_BOUNDED = 48  # candidates of one operator whose cost is bounded, those with the least work first
KERNELS_S = 1.0  # what it takes to build C++ kernels that this process has not built yet
CALLED = 2  # times the programs to be compiled are timed as they are called
NO_BETTER = "its cost bound does not beat what another takes"


def time_original(made: Plan, config: OllieConfig, stop: float) -> None:
    """Time the operator as torch calls it; what it takes is what can be gained at most."""
    left = stop - time.perf_counter()
    if left <= 0:
        made.reason = OUT_OF_TIME
        return
    layouts = memory_layouts(made.operator)
    made.original_s = min(
        timing.median_seconds(
            calls.called(same.reference, same.example_inputs(), constant=constant_inputs(same, config)),
            budget_s=min(ORIGINAL_S, TIMED * left / len(layouts)),
        )
        for same in layouts
    )


def prepare(made: Plan, config: OllieConfig, stop: float) -> None:
    """Search, bound every candidate and time the first of them as they are called."""
    operator = made.operator
    start = time.perf_counter()
    if made.reason or stop <= start:
        made.reason = made.reason or OUT_OF_TIME
        return
    if config.verify and isinstance(operator, Subprogram) and operator.declared:
        wrong = check_notation(operator)
        if wrong is not None:
            made.reason = f"its notation is not what its function computes: it {wrong}"
            logger.error("ollie: %s: left as it is, %s", operator, made.reason)
            return
    found = search(
        operator.expression(),
        max_depth=config.max_depth * operator.steps,
        budget_s=start + SEARCHED * (stop - start) - time.perf_counter(),
        workers=config.workers,
    )
    made.stats = found.stats
    made.candidates = [
        Candidate(program, derivation)
        for derivation in found.derivations
        for program in programs(derivation.scope, operator.device, portable=config.portable)
    ]
    _bound(made, config, start + BOUNDED * (stop - start))
    if config.tune == "measure":
        _call(made, config, stop)


def _bound(made: Plan, config: OllieConfig, stop: float) -> None:
    """Bound every candidate's time, reject what cannot win, and sort by the bound."""
    operator = made.operator
    assert made.original_s is not None
    limit, most = made.original_s * (1 - config.margin), largest_allowed(operator)
    made.candidates.sort(key=lambda candidate: work(candidate.program.scope))
    for place, candidate in enumerate(made.candidates):
        program = candidate.program
        if place >= MAX_BOUNDED:
            candidate.rejected = "others need fewer products"
        elif time.perf_counter() > stop:
            candidate.rejected = OUT_OF_TIME
        elif (largest := bounds.largest_elements(program.scope)) > most:
            candidate.rejected = f"needs {largest * operator.dtype.itemsize / 2**30:.2g} GiB in one tensor"
        else:
            ahead = _ahead(program.scope, operator.parameters) if config.freeze else program.scope
            candidate.bound_s = bounds.bound_seconds(
                replace(program, scope=ahead), operator.dtype, operator.device, limit=limit
            )
            if candidate.bound_s > limit:
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


def _by_family(candidates: list[Candidate]) -> Iterator[Candidate]:
    """The candidates in turn from products, convolutions and bilinear forms: bounds of one kind compare."""
    families: dict[tuple[bool, bool], list[Candidate]] = {}
    for candidate in candidates:
        program = candidate.program
        families.setdefault((bool(program.scope.constants()), program.layout in CONVOLVED), []).append(
            candidate
        )
    rows = itertools.zip_longest(*families.values())
    return (candidate for row in rows for candidate in row if candidate is not None)


def _call(made: Plan, config: OllieConfig, stop: float) -> None:
    """Time a few candidates as they are called, without a compiler; the others are rejected."""
    add_kernels(made, config)
    operator = made.operator
    timed, best = 0, made.original_s or math.inf
    slowest = 0.0
    for candidate in _by_family(left_open(made)):
        start = time.perf_counter()
        new = _kernels(candidate.program) - _built
        if timed >= CALLED * config.candidates:
            candidate.rejected = LATER
        elif candidate.bound_s > best:
            candidate.rejected = NO_BETTER
        elif start + (KERNELS_S if new else slowest) > stop:
            candidate.rejected = OUT_OF_TIME
        else:
            timed += 1
            call = calls.called(*as_function(operator, candidate, config))
            candidate.operators = call.operators
            candidate.measured_s = timing.median_seconds(call)
            best = min(best, candidate.measured_s)
            _built.update(new)
            slowest = slowest if new else max(slowest, time.perf_counter() - start)


def _kernels(program: Program) -> frozenset[str]:
    """The names of its C++ kernels: the matrices that they are built for, or "" for the additions'."""
    return frozenset(program.scope.constants() or [""]) if program.kernels == "cpp" else frozenset()


_built: set[str] = set()
"""Names of the kernels that this process has built."""
