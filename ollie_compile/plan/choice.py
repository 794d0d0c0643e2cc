"""Choosing among the prepared candidates of one operator: checks, compilations, and measurements in turn."""

from __future__ import annotations

import logging
import math

from ollie_compile.config import OllieConfig
from ollie_compile.measure.machine import Machine
from ollie_compile.measure.timing import Call, fastest_first
from ollie_compile.plan.candidates import OUT_OF_TIME, Candidate, Plan
from ollie_compile.plan.checks import Checks
from ollie_compile.plan.placing import (
    LATER,
    add_kernels,
    as_function,
    constant_inputs,
    fits,
    is_library_call,
    memory_layouts,
    seconds_in_graph,
)

logger = logging.getLogger(__name__)

COMPARED = 2  # programs as they are called that are timed once more, beside the original
NO_FASTER = "measured no faster than the original"


def decide(plan: Plan, config: OllieConfig, machine: Machine, checks: Checks) -> None:
    """Check, compile and measure the prepared candidates until the deadline of `checks`, and choose."""
    if plan.reason:
        return
    if config.tune == "measure":
        _measure(plan, config, machine, checks)
    else:
        _take_cheapest(plan, config, machine, checks)
    if not plan.reason:
        plan.reason = OUT_OF_TIME if plan.cut else "no candidate is left"


def _measure(plan: Plan, config: OllieConfig, machine: Machine, checks: Checks) -> None:
    """Compile the candidates that may be fastest; measure them, the best calls and the original in turn.

    A candidate that could not be compiled at all its occurrences before the deadline is left out.
    """
    assert plan.original_s is not None
    deadline = checks.deadline
    if not is_library_call(plan.operator):
        deadline -= machine.pace.seconds(0)  # the original is compiled too
    bar_s = plan.original_s * (1 - config.margin)
    finalists = _best_calls(plan, config, machine, checks, bar_s, deadline)
    bar_s = min([bar_s, *(candidate.measured_s or math.inf for candidate in finalists)])
    hopeful = [one for one in plan.open if one.bound_s < bar_s and not one.program.standalone]
    compiled = 0
    for candidate in fastest_first(hopeful, lambda one: one.bound_s * (one.measured_s or math.inf)):
        if compiled == config.candidates:
            break
        if not _may_compile(plan, candidate, machine, checks, deadline, known=candidate in finalists):
            continue
        call = _compile(plan, candidate, config, machine)
        if call is not None:
            compiled += 1
            finalists[candidate] = call
    finalists = {one: call for one, call in finalists.items() if fits(plan, one, machine, deadline)}
    if finalists:
        _compare(plan, config, machine, finalists, deadline)
    for candidate in plan.open:
        if candidate is not plan.winner:
            candidate.rejected = NO_FASTER if candidate.measured_s else LATER
    if not finalists and not plan.cut:
        plan.reason = "the original measured fastest" if plan.candidates else "no candidate is left"


def _best_calls(
    plan: Plan, config: OllieConfig, machine: Machine, checks: Checks, bar_s: float, deadline: float
) -> dict[Candidate, Call]:
    """The fastest programs as they are called, of those that beat `bar_s` and pass the checks."""
    finalists: dict[Candidate, Call] = {}
    for candidate in fastest_first(plan.open, lambda candidate: candidate.measured_s or math.inf):
        if (candidate.measured_s or math.inf) > bar_s or len(finalists) == COMPARED:
            break
        candidate.compile_s = seconds_in_graph(candidate, machine)
        if fits(plan, candidate, machine, deadline) and checks.passes(candidate):
            finalists[candidate] = machine.called(*as_function(plan.operator, candidate, config))
    return finalists


def _may_compile(
    plan: Plan, candidate: Candidate, machine: Machine, checks: Checks, deadline: float, *, known: bool
) -> bool:
    """Whether a candidate can be compiled alone and then at all its occurrences, and passes the checks.

    Args:
        known: whether it is timed as it is called and has passed the checks: then it stays, if not compiled.
    """
    alone_s = machine.pace.seconds(candidate.operators)
    if known:
        return machine.now() + alone_s + plan.occurrences * candidate.compile_s <= deadline
    candidate.compile_s = seconds_in_graph(candidate, machine)
    return fits(plan, candidate, machine, deadline - alone_s) and checks.passes(candidate)


def _compile(plan: Plan, candidate: Candidate, config: OllieConfig, machine: Machine) -> Call | None:
    """A candidate compiled by Inductor; None rejects it, for it does not compile."""
    start = machine.now()
    try:
        call = machine.compiled(*as_function(plan.operator, candidate, config))
    except Exception as error:  # a code generator may raise anything, and the original still stands
        candidate.rejected = f"did not compile: {error}"
        logger.warning("ollie: %s: %s did not compile: %s", plan.operator, candidate.program, error)
        return None
    candidate.compile_s = machine.now() - start
    machine.pace.took(candidate.compile_s, candidate.operators)
    return call


def _compare(
    plan: Plan, config: OllieConfig, machine: Machine, finalists: dict[Candidate, Call], deadline: float
) -> None:
    """Measure the finalists and the original in turn.

    Of those that beat the original enough the fastest wins, and the one with the least work of those that are
    equally fast.
    """
    operator = plan.operator
    build = machine.called if is_library_call(operator) else machine.compiled
    originals = [
        build(same.reference, same.example_inputs(), constant_inputs(same, config))
        for same in memory_layouts(operator)
    ]
    times = machine.measure([*finalists.values(), *originals], deadline)
    plan.original_s = min(times[len(finalists) :])
    for candidate, seconds in zip(finalists, times[: len(finalists)], strict=True):
        candidate.measured_s = seconds
        if seconds > plan.original_s * (1 - config.margin):
            candidate.rejected = NO_FASTER
    faster = [candidate for candidate in finalists if candidate.rejected is None]
    if not faster:
        plan.reason = "the original measured fastest"
        return
    faster.sort(key=lambda candidate: (candidate.order, plan.candidates.index(candidate)))
    plan.winner = fastest_first(faster, lambda candidate: candidate.measured_s or 0.0)[0]
    plan.reason = "measured fastest"
    for candidate in faster:
        if candidate is not plan.winner:
            candidate.rejected = "another candidate measured faster, or as fast with less work"


def _take_cheapest(plan: Plan, config: OllieConfig, machine: Machine, checks: Checks) -> None:
    """Let the candidate with the lowest bound that passes the checks win, unmeasured."""
    add_kernels(plan, config)
    passed = 0
    for candidate in plan.open:
        if passed == config.candidates:
            candidate.rejected = LATER
        elif checks.passes(candidate):
            passed += 1
            if plan.winner is not None:
                candidate.rejected = "another candidate has a lower bound"
                continue
            candidate.operators = machine.called(*as_function(plan.operator, candidate, config)).operators
            candidate.compile_s = seconds_in_graph(candidate, machine)
            if fits(plan, candidate, machine, checks.deadline):
                plan.winner, plan.reason = candidate, "lowest cost bound"
