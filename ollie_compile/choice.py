"""Choosing among the candidates of one operator: bounds, first timings, checks, compiled measurements."""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

from torch import Tensor

from ollie_compile import cost, tune
from ollie_compile.config import OllieConfig
from ollie_compile.expr import Input, Read, Scope
from ollie_compile.gradients import Gradient
from ollie_compile.lower import CONVOLVED, Program, programs, with_kernels
from ollie_compile.numeric import check_program, exact_results, reproducer, rounding_error
from ollie_compile.operators import Convolution, Operator, Subprogram, Tensors
from ollie_compile.plan import OUT_OF_TIME, Candidate, Plan
from ollie_compile.search import Derivation, search, work
from ollie_compile.verify import check_derivation, check_notation

logger = logging.getLogger(__name__)

ORIGINAL_S, TIMED = 0.02, 0.2  # seconds in which an original is timed, and of the time for preparing at most
SEARCHED, BOUNDED = 0.5, 0.8  # shares of the time for preparing after which no search, no bound begins
MAX_GROWTH = 16  # of the largest intermediate over the operator's own tensors; more may not fit in memory
MAX_BOUNDED = 48  # candidates of one operator whose cost is bounded, those with the least work first
KERNELS_S = 1.0  # what it takes to build C++ kernels that this process has not built yet
CALLED = 2  # times the programs to be compiled are timed as they are called
COMPARED = 2  # programs as they are called that are timed once more, beside the original
HALF_SLACK = 2.0  # times the rounding of the original that a candidate may have above the tolerance
NO_FASTER = "measured no faster than the original"
NO_BETTER = "its cost bound does not beat what another takes"
LATER = "cheaper candidates came first"


def time_original(made: Plan, config: OllieConfig, stop: float) -> None:
    """Time the operator as torch calls it; what it takes is what can be gained at most."""
    left = stop - time.perf_counter()
    if left <= 0:
        made.reason = OUT_OF_TIME
        return
    layouts = _layouts(made.operator)
    made.original_s = min(
        cost.median_seconds(
            tune.called(same.reference, same.example_inputs(), constant=_constant(same, config)),
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


def decide(made: Plan, config: OllieConfig, stop: float) -> None:
    """Check, compile and measure what was prepared, and choose the winner."""
    if made.reason:
        return
    checks = _Checks(made.operator, config, stop)
    if config.tune == "measure":
        _measure(made, config, checks, stop)
    else:
        _take_cheapest(made, config, checks)
    if not made.reason:
        made.reason = OUT_OF_TIME if made.cut else "no candidate is left"


def _bound(made: Plan, config: OllieConfig, stop: float) -> None:
    """Bound every candidate's time, reject what cannot win, and sort by the bound."""
    operator = made.operator
    layouts = (*operator.inputs.values(), *operator.outputs)
    largest_allowed = MAX_GROWTH * sum(math.prod(layout.shape) for layout in layouts)
    assert made.original_s is not None
    limit = made.original_s * (1 - config.margin)
    made.candidates.sort(key=lambda candidate: work(candidate.program.scope))
    for place, candidate in enumerate(made.candidates):
        program = candidate.program
        if place >= MAX_BOUNDED:
            candidate.rejected = "others need fewer products"
        elif time.perf_counter() > stop:
            candidate.rejected = OUT_OF_TIME
        elif (largest := cost.largest_elements(program.scope)) > largest_allowed:
            candidate.rejected = f"needs {largest * operator.dtype.itemsize / 2**30:.2g} GiB in one tensor"
        else:
            ahead = _ahead(program.scope, operator.parameters) if config.freeze else program.scope
            candidate.bound_s = cost.bound_seconds(
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


def _left(made: Plan) -> list[Candidate]:
    return [candidate for candidate in made.candidates if candidate.rejected is None]


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


def _with_kernels(made: Plan, config: OllieConfig) -> None:
    """The best candidate with eOperators that have other kernels is taken with those as well."""
    if config.portable:
        return
    for place, candidate in enumerate(made.candidates):
        written = with_kernels(candidate.program, made.operator.device) if candidate.rejected is None else []
        if written:
            made.candidates[place + 1 : place + 1] = [replace(candidate, program=one) for one in written]
            return


def _call(made: Plan, config: OllieConfig, stop: float) -> None:
    """Time a few candidates as they are called, without a compiler; the others are rejected."""
    _with_kernels(made, config)
    operator = made.operator
    timed, best = 0, made.original_s or math.inf
    slowest = 0.0
    for candidate in _by_family(_left(made)):
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
            call = tune.called(*_function(operator, candidate, config))
            candidate.operators = call.operators
            candidate.measured_s = cost.median_seconds(call)
            best = min(best, candidate.measured_s)
            _built.update(new)
            slowest = slowest if new else max(slowest, time.perf_counter() - start)


def _kernels(program: Program) -> frozenset[str]:
    """The names of its C++ kernels: the matrices that they are built for, or "" for the additions'."""
    return frozenset(program.scope.constants() or [""]) if program.kernels == "cpp" else frozenset()


_built: set[str] = set()
"""Names of the kernels that this process has built."""


def _layouts(operator: Operator) -> list[Operator]:
    """An operator as it is and, for a convolution of images, channels last: along a chain of them Inductor
    and the kernels of bilinear forms keep that layout."""
    if not isinstance(operator, Convolution) or len(operator.input.shape) != 4:
        return [operator]
    layouts = {name: getattr(operator, name).channels_last() for name in ("input", "output")}
    return [operator, replace(operator, **layouts)]


def _function(
    operator: Operator, candidate: Candidate, config: OllieConfig
) -> tuple[Callable[..., Tensors], tuple[Tensor, ...], list[int]]:
    """A program as a function, its inputs, and those of them that are constant."""
    program = candidate.program
    if _is_one_kernel(program):
        operator = _layouts(operator)[-1]
    values = (
        *operator.example_inputs(),
        *program.constants(operator.dtype, operator.device).values(),
    )
    constant = _constant(operator, config)
    if constant:
        constant += range(len(operator.inputs), len(values))
    return operator.finished(program), values, constant


def _constant(operator: Operator, config: OllieConfig) -> list[int]:
    """The places of an operator's inputs that are the same in every call."""
    names = list(operator.inputs)
    return [names.index(name) for name in operator.parameters if name in names] if config.freeze else []


def _measure(made: Plan, config: OllieConfig, checks: _Checks, stop: float) -> None:
    """Compile what may beat what is known, then measure it, the best call and the original in turn.

    What could not be compiled in all its places before `stop` is left out.
    """
    operator = made.operator
    assert made.original_s is not None
    bar = made.original_s * (1 - config.margin)
    calls: list[tune.Call] = []
    timed: list[Candidate] = []
    if not _is_called(operator):
        stop -= tune.pace.seconds(0)  # the original is compiled too
    for candidate in sorted(_left(made), key=lambda candidate: candidate.measured_s or math.inf):
        if (candidate.measured_s or math.inf) > bar or len(timed) == COMPARED:
            break
        candidate.compile_s = _placed_seconds(candidate)
        if _fits(made, candidate, stop) and checks.passes(candidate):
            calls.append(tune.called(*_function(operator, candidate, config)))
            timed.append(candidate)
    bar = min([bar, *(candidate.measured_s or math.inf for candidate in timed)])
    hopeful = [c for c in _left(made) if c.bound_s < bar and not _is_one_kernel(c.program)]
    hopeful.sort(key=lambda candidate: candidate.bound_s * (candidate.measured_s or math.inf))
    compiled = 0
    for candidate in hopeful:
        if compiled == config.candidates:
            break
        alone_s = tune.pace.seconds(candidate.operators)
        if candidate in timed:
            if time.perf_counter() + alone_s + made.places * candidate.compile_s > stop:
                continue
        else:
            candidate.compile_s = _placed_seconds(candidate)
            if not _fits(made, candidate, stop - alone_s) or not checks.passes(candidate):
                continue
        start = time.perf_counter()
        try:
            call = tune.compiled(*_function(operator, candidate, config))
        except Exception as error:  # whatever a code generator raises: the original still stands
            candidate.rejected = f"did not compile: {error}"
            logger.warning("ollie: %s: %s did not compile: %s", operator, candidate.program, error)
            continue
        compiled += 1
        candidate.compile_s = time.perf_counter() - start
        tune.pace.took(candidate.compile_s, candidate.operators)
        if candidate in timed:
            calls[timed.index(candidate)] = call
        else:
            calls.append(call)
            timed.append(candidate)
    fitting = [place for place, candidate in enumerate(timed) if _fits(made, candidate, stop)]
    if fitting:
        _compare(made, config, [calls[place] for place in fitting], [timed[place] for place in fitting], stop)
    for candidate in _left(made):
        if candidate is not made.winner:
            candidate.rejected = NO_FASTER if candidate.measured_s else LATER
    if not fitting and not made.cut:
        made.reason = "the original measured fastest" if made.candidates else "no candidate is left"


def _placed_seconds(candidate: Candidate) -> float:
    """What Inductor may take for a program in each of its places: a called kernel needs no code."""
    pace = tune.pace
    called = _is_one_kernel(candidate.program)
    return pace.placed_seconds(candidate.operators) if called else pace.seconds(candidate.operators)


def _is_one_kernel(program: Program) -> bool:
    """Whether C++ kernels for matrices compute it: nothing is compiled, and images lie channels last."""
    return program.kernels == "cpp" and bool(program.scope.constants())


def _fits(made: Plan, candidate: Candidate, stop: float) -> bool:
    """Whether a candidate can be compiled in all places of its operator; otherwise it is rejected."""
    if time.perf_counter() + made.places * candidate.compile_s > stop:
        candidate.rejected = OUT_OF_TIME
    return candidate.rejected is None


def _is_called(operator: Operator) -> bool:
    """Whether Inductor leaves an operator as it is: a call of the library."""
    return isinstance(operator, Convolution | Gradient)


def _compare(
    made: Plan, config: OllieConfig, calls: list[tune.Call], timed: list[Candidate], stop: float
) -> None:
    operator = made.operator
    build = tune.called if _is_called(operator) else tune.compiled
    originals = [
        build(same.reference, same.example_inputs(), constant=_constant(same, config))
        for same in _layouts(operator)
    ]
    times = tune.measure([*calls, *originals], stop)
    made.original_s = min(times[len(calls) :])
    for candidate, seconds in zip(timed, times[: len(calls)], strict=True):
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


def _take_cheapest(made: Plan, config: OllieConfig, checks: _Checks) -> None:
    """The candidate with the lowest bound that passes the checks wins unmeasured."""
    _with_kernels(made, config)
    passed = 0
    for candidate in _left(made):
        if passed == config.candidates:
            candidate.rejected = LATER
        elif checks.passes(candidate):
            passed += 1
            if made.winner is None:
                candidate.operators = tune.called(*_function(made.operator, candidate, config)).operators
                candidate.compile_s = _placed_seconds(candidate)
                if _fits(made, candidate, checks.stop):
                    made.winner, made.reason = candidate, "lowest cost bound"
            else:
                candidate.rejected = "another candidate has a lower bound"


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
        return operator.refused(program, self.config)


def _first_wrong_step(expression: Scope, derivation: Derivation) -> str:
    for step in derivation.steps:
        if check_derivation(expression, step.scope) is not None:
            return f", first after the rules {' + '.join(step.rules)}"
    return ""
