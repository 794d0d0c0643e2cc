"""Choosing among the prepared candidates of one operator: checks, compilations, and measurements in turn."""

from __future__ import annotations

import logging
import math
import time

from ollie_compile.config import OllieConfig
from ollie_compile.measure import calls, pace, timing
from ollie_compile.plan.candidates import OUT_OF_TIME, Candidate, Plan
from ollie_compile.plan.checks import Checks
from ollie_compile.plan.placing import (
    LATER,
    add_kernels,
    as_function,
    constant_inputs,
    fits,
    is_library_call,
    is_one_kernel,
    left_open,
    memory_layouts,
    placed_seconds,
)

logger = logging.getLogger(__name__)

COMPARED = 2  # programs as they are called that are timed once more, beside the original
NO_FASTER = "measured no faster than the original"


def decide(made: Plan, config: OllieConfig, stop: float) -> None:
    """Check, compile and measure what was prepared, and choose the winner."""
    if made.reason:
        return
    checks = Checks(made.operator, config, stop)
    if config.tune == "measure":
        _measure(made, config, checks, stop)
    else:
        _take_cheapest(made, config, checks)
    if not made.reason:
        made.reason = OUT_OF_TIME if made.cut else "no candidate is left"


def _measure(made: Plan, config: OllieConfig, checks: Checks, stop: float) -> None:
    """Compile what may beat what is known, then measure it, the best call and the original in turn.

    What could not be compiled in all its places before `stop` is left out.
    """
    operator = made.operator
    assert made.original_s is not None
    bar = made.original_s * (1 - config.margin)
    built: list[timing.Call] = []
    timed: list[Candidate] = []
    if not is_library_call(operator):
        stop -= pace.pace.seconds(0)  # the original is compiled too
    for candidate in sorted(left_open(made), key=lambda candidate: candidate.measured_s or math.inf):
        if (candidate.measured_s or math.inf) > bar or len(timed) == COMPARED:
            break
        candidate.compile_s = placed_seconds(candidate)
        if fits(made, candidate, stop) and checks.passes(candidate):
            built.append(calls.called(*as_function(operator, candidate, config)))
            timed.append(candidate)
    bar = min([bar, *(candidate.measured_s or math.inf for candidate in timed)])
    hopeful = [c for c in left_open(made) if c.bound_s < bar and not is_one_kernel(c.program)]
    hopeful.sort(key=lambda candidate: candidate.bound_s * (candidate.measured_s or math.inf))
    compiled = 0
    for candidate in hopeful:
        if compiled == config.candidates:
            break
        alone_s = pace.pace.seconds(candidate.operators)
        if candidate in timed:
            if time.perf_counter() + alone_s + made.places * candidate.compile_s > stop:
                continue
        else:
            candidate.compile_s = placed_seconds(candidate)
            if not fits(made, candidate, stop - alone_s) or not checks.passes(candidate):
                continue
        start = time.perf_counter()
        try:
            call = calls.compiled(*as_function(operator, candidate, config))
        except Exception as error:  # whatever a code generator raises: the original still stands
            candidate.rejected = f"did not compile: {error}"
            logger.warning("ollie: %s: %s did not compile: %s", operator, candidate.program, error)
            continue
        compiled += 1
        candidate.compile_s = time.perf_counter() - start
        pace.pace.took(candidate.compile_s, candidate.operators)
        if candidate in timed:
            built[timed.index(candidate)] = call
        else:
            built.append(call)
            timed.append(candidate)
    fitting = [place for place, candidate in enumerate(timed) if fits(made, candidate, stop)]
    if fitting:
        _compare(made, config, [built[place] for place in fitting], [timed[place] for place in fitting], stop)
    for candidate in left_open(made):
        if candidate is not made.winner:
            candidate.rejected = NO_FASTER if candidate.measured_s else LATER
    if not fitting and not made.cut:
        made.reason = "the original measured fastest" if made.candidates else "no candidate is left"


def _compare(
    made: Plan, config: OllieConfig, built: list[timing.Call], timed: list[Candidate], stop: float
) -> None:
    operator = made.operator
    build = calls.called if is_library_call(operator) else calls.compiled
    originals = [
        build(same.reference, same.example_inputs(), constant=constant_inputs(same, config))
        for same in memory_layouts(operator)
    ]
    times = timing.measure([*built, *originals], stop)
    made.original_s = min(times[len(built) :])
    for candidate, seconds in zip(timed, times[: len(built)], strict=True):
        candidate.measured_s = seconds
        if seconds > made.original_s * (1 - config.margin):
            candidate.rejected = NO_FASTER
    good = [candidate for candidate in timed if candidate.rejected is None]
    if not good:
        made.reason = "the original measured fastest"
        return
    made.winner = min(good, key=lambda candidate: candidate.measured_s or 0.0)
    made.reason = "measured fastest"
    for candidate in good:
        if candidate is not made.winner:
            candidate.rejected = "another candidate measured faster"


def _take_cheapest(made: Plan, config: OllieConfig, checks: Checks) -> None:
    """The candidate with the lowest bound that passes the checks wins unmeasured."""
    add_kernels(made, config)
    passed = 0
    for candidate in left_open(made):
        if passed == config.candidates:
            candidate.rejected = LATER
        elif checks.passes(candidate):
            passed += 1
            if made.winner is None:
                candidate.operators = calls.called(*as_function(made.operator, candidate, config)).operators
                candidate.compile_s = placed_seconds(candidate)
                if fits(made, candidate, checks.stop):
                    made.winner, made.reason = candidate, "lowest cost bound"
            else:
                candidate.rejected = "another candidate has a lower bound"
