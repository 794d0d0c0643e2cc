"""Candidates as they will stand in a graph: in which layouts, with which constants, at what compile time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ollie_compile.config import OllieConfig
from ollie_compile.lower.layouts import with_kernels
from ollie_compile.lower.lowering import Program
from ollie_compile.measure import pace
from ollie_compile.plan.candidates import OUT_OF_TIME, Candidate, Plan
from ollie_compile.problems.gradients import Gradient
from ollie_compile.problems.operators import Convolution, Operator, Tensors

LATER = "cheaper candidates came first"


def left_open(made: Plan) -> list[Candidate]:
    return [candidate for candidate in made.candidates if candidate.rejected is None]


def add_kernels(made: Plan, config: OllieConfig) -> None:
    """The best candidate with eOperators that have other kernels is taken with those as well."""
    if config.portable:
        return
    for place, candidate in enumerate(made.candidates):
        written = with_kernels(candidate.program, made.operator.device) if candidate.rejected is None else []
        if written:
            made.candidates[place + 1 : place + 1] = [replace(candidate, program=one) for one in written]
            return


def memory_layouts(operator: Operator) -> list[Operator]:
    """An operator as it is and, for a convolution of images, channels last: along a chain of them Inductor
    and the kernels of bilinear forms keep that layout."""
    if not isinstance(operator, Convolution) or len(operator.input.shape) != 4:
        return [operator]
    layouts = {name: getattr(operator, name).channels_last() for name in ("input", "output")}
    return [operator, replace(operator, **layouts)]


def as_function(
    operator: Operator, candidate: Candidate, config: OllieConfig
) -> tuple[Callable[..., Tensors], tuple[Tensor, ...], list[int]]:
    """A program as a function, its inputs, and those of them that are constant."""
    program = candidate.program
    if is_one_kernel(program):
        operator = memory_layouts(operator)[-1]
    values = (
        *operator.example_inputs(),
        *program.constants(operator.dtype, operator.device).values(),
    )
    constant = constant_inputs(operator, config)
    if constant:
        constant += range(len(operator.inputs), len(values))
    return operator.finished(program), values, constant


def constant_inputs(operator: Operator, config: OllieConfig) -> list[int]:
    """The places of an operator's inputs that are the same in every call."""
    names = list(operator.inputs)
    return [names.index(name) for name in operator.parameters if name in names] if config.freeze else []


def placed_seconds(candidate: Candidate) -> float:
    """What Inductor may take for a program in each of its places: a called kernel needs no code."""
    called = is_one_kernel(candidate.program)
    return pace.pace.placed_seconds(candidate.operators) if called else pace.pace.seconds(candidate.operators)


def is_one_kernel(program: Program) -> bool:
    """Whether C++ kernels for matrices compute it: nothing is compiled, and images lie channels last."""
    return program.kernels == "cpp" and bool(program.scope.constants())


def is_library_call(operator: Operator) -> bool:
    """Whether Inductor leaves an operator as it is: a call of the library."""
    return isinstance(operator, Convolution | Gradient)


def fits(made: Plan, candidate: Candidate, stop: float) -> bool:
    """Whether a candidate can be compiled in all places of its operator; otherwise it is rejected."""
    if time.perf_counter() + made.places * candidate.compile_s > stop:
        candidate.rejected = OUT_OF_TIME
    return candidate.rejected is None
