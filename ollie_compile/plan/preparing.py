"""Preparing a plan: time the operator, search its expression, bound candidates, call the first of them."""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Iterator
from dataclasses import replace

from ollie_compile.config import OllieConfig
from ollie_compile.expr import Input, Read, Scope
from ollie_compile.lower.layouts import programs
from ollie_compile.lower.lowering import Program
from ollie_compile.measure.bounds import largest_elements
from ollie_compile.measure.machine import Machine
from ollie_compile.measure.timing import fastest_first
from ollie_compile.plan import exactness
from ollie_compile.plan.candidates import OUT_OF_TIME, Candidate, Plan
from ollie_compile.plan.checks import check_notation
from ollie_compile.plan.placing import LATER, add_kernels, as_function, constant_inputs, memory_layouts
from ollie_compile.problems.operators import Subprogram, largest_allowed
from ollie_compile.search.expansion import work
from ollie_compile.search.hybrid import search
from ollie_compile.targets.target import CONVOLVED

logger = logging.getLogger(__name__)

ORIGINAL_S, TIMED = 0.02, 0.2  # seconds in which an original is timed, and of the time for preparing at most
SEARCHED, BOUNDED = 0.5, 0.8  # shares of the time for preparing after which no search, no bound begins
MAX_BOUNDED = 48  # candidates of one operator whose cost is bounded, those with the least work first
KERNELS_S = 1.0  # seconds that building C++ kernels takes which this process has not built yet
CALLED = 2  # times the programs to be compiled are timed as they are called
NO_BETTER = "its cost bound does not beat what another takes"


def time_original(plan: Plan, config: OllieConfig, machine: Machine, deadline: float) -> None:
    """Time the operator as torch calls it: no plan can gain more than that."""
    left_s = deadline - machine.now()
    if left_s <= 0:
        plan.reason = OUT_OF_TIME
        return
    layouts = memory_layouts(plan.operator)
    plan.original_s = min(
        machine.least_seconds(
            machine.called(same.reference, same.example_inputs(), constant_inputs(same, config)),
            budget_s=min(ORIGINAL_S, TIMED * left_s / len(layouts)),
        )
        for same in layouts
    )


def prepare(plan: Plan, config: OllieConfig, machine: Machine, deadline: float) -> None:
    """Search, bound every candidate, and time the first of them as they are called."""
    operator = plan.operator
    start = machine.now()
    if plan.reason or deadline <= start:
        plan.reason = plan.reason or OUT_OF_TIME
        return
    if config.verify and isinstance(operator, Subprogram) and operator.declared:
        wrong = check_notation(operator)
        if wrong is not None:
            plan.reason = f"its notation is not what its function computes: it {wrong}"
            logger.error("ollie: %s: left as it is, %s", operator, plan.reason)
            return
    if config.non_finite == "exact" and (why := exactness.lifted_otherwise(operator)) is not None:
        plan.reason = f"values that are not finite would differ: {why}"
        return
    found = search(
        operator.expression(),
        max_depth=config.max_depth * operator.steps,
        budget_s=start + SEARCHED * (deadline - start) - machine.now(),
        workers=config.workers,
    )
    plan.stats = found.stats
    plan.candidates = [
        Candidate(program, derivation)
        for derivation in found.derivations
        for program in programs(derivation.scope, operator.device, portable=config.portable)
    ]
    if config.non_finite == "exact":
        _reject_constants(plan)
    _bound(plan, config, machine, start + BOUNDED * (deadline - start))
    if config.tune == "measure":
        _call(plan, config, machine, deadline)


def _reject_constants(plan: Plan) -> None:
    """Reject candidates that apply constant matrices, before they take time from the others."""
    known = plan.operator.expression().constants().keys()
    for candidate in plan.candidates:
        if not candidate.program.scope.constants().keys() <= known:
            candidate.rejected = exactness.OTHER_TERMS


def _bound(plan: Plan, config: OllieConfig, machine: Machine, deadline: float) -> None:
    """Bound every candidate's time, reject what cannot win, and sort by the bound.

    Bounds rest on measured products, so that those which differ by noise are sorted by the least work.
    """
    operator = plan.operator
    assert plan.original_s is not None
    limit_s, most_elements = plan.original_s * (1 - config.margin), largest_allowed(operator)
    plan.candidates.sort(key=lambda candidate: work(candidate.program.scope))
    for order, candidate in enumerate(plan.candidates):
        candidate.order = order
    for place, candidate in enumerate(plan.open):
        program = candidate.program
        if place >= MAX_BOUNDED:
            candidate.rejected = "others need fewer products"
        elif machine.now() > deadline:
            candidate.rejected = OUT_OF_TIME
        elif (largest := largest_elements(program.scope)) > most_elements:
            candidate.rejected = f"needs {largest * operator.dtype.itemsize / 2**30:.2g} GiB in one tensor"
        else:
            scope = _ahead(program.scope, operator.parameters) if config.freeze else program.scope
            candidate.bound_s = machine.bound_seconds(
                replace(program, scope=scope), operator.dtype, operator.device, limit=limit_s
            )
            if candidate.bound_s > limit_s:
                candidate.rejected = "its cost bound does not beat the original"
    plan.candidates = fastest_first(plan.candidates, lambda candidate: candidate.bound_s)


def _ahead(scope: Scope, parameters: tuple[str, ...]) -> Scope:
    """The expression with an input instead of each part that depends on parameters alone."""
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


def _call(plan: Plan, config: OllieConfig, machine: Machine, deadline: float) -> None:
    """Time a few candidates as they are called, without a compiler; the others are rejected."""
    add_kernels(plan, config)
    timed, best_s = 0, plan.original_s or math.inf
    slowest_s = 0.0
    for candidate in _by_family(plan.open):
        start = machine.now()
        new = _native(candidate.program) - machine.built
        if timed >= CALLED * config.candidates:
            candidate.rejected = LATER
        elif candidate.bound_s > best_s:
            candidate.rejected = NO_BETTER
        elif start + (KERNELS_S if new else slowest_s) > deadline:
            candidate.rejected = OUT_OF_TIME
        else:
            timed += 1
            call = machine.called(*as_function(plan.operator, candidate, config))
            candidate.operators = call.operators
            candidate.measured_s = machine.least_seconds(call)
            best_s = min(best_s, candidate.measured_s)
            machine.built.update(new)
            slowest_s = slowest_s if new else max(slowest_s, machine.now() - start)


def _native(program: Program) -> set[str]:
    """Names of the native code that the program's kernels build before their first call."""
    return {
        name for kernel, matches in program.used.items() for match in matches for name in kernel.native(match)
    }
