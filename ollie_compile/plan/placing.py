"""Candidates as they will stand in a graph: in which layouts, with which constants, at what compile time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from ollie_compile.config import OllieConfig
from ollie_compile.lower.layouts import with_kernels
from ollie_compile.measure.machine import Machine
from ollie_compile.plan.candidates import OUT_OF_TIME, Candidate, Plan
from ollie_compile.problems.gradients import Gradient
from ollie_compile.problems.operators import Convolution, Operator, Tensors

LATER = "cheaper candidates came first"


def add_kernels(plan: Plan, config: OllieConfig) -> None:
    """Try the best candidate that has eOperators with other kernels by these kernels too."""
    if config.portable:
        return
    for place, candidate in enumerate(plan.candidates):
        written = with_kernels(candidate.program, plan.operator.device) if candidate.rejected is None else []
        if written:
            plan.candidates[place + 1 : place + 1] = [replace(candidate, program=one) for one in written]
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
    """A candidate's program as a function, its inputs, and the positions of those that are constant."""
    program = candidate.program
    if program.standalone:
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
    """The positions of an operator's inputs that are the same in every call."""
    names = list(operator.inputs)
    return [names.index(name) for name in operator.parameters if name in names] if config.freeze else []


def seconds_in_graph(candidate: Candidate, machine: Machine) -> float:
    """Seconds that Inductor is expected to take for a candidate at each of its occurrences in a graph."""
    if candidate.program.standalone:  # calls, for which no code is generated
        return machine.pace.seconds_in_graph(candidate.operators)
    return machine.pace.seconds(candidate.operators)


def fits(plan: Plan, candidate: Candidate, machine: Machine, deadline: float) -> bool:
    """Whether a candidate can be compiled at all its occurrences in time; otherwise it is rejected."""
    if machine.now() + plan.occurrences * candidate.compile_s > deadline:
        candidate.rejected = OUT_OF_TIME
    return candidate.rejected is None


def is_library_call(operator: Operator) -> bool:
    """Whether Inductor leaves an operator as it is: a call of the library."""
    return isinstance(operator, Convolution | Gradient)
