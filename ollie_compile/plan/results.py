"""What an operator and its programs give for the same inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ollie_compile.lower.lowering import Program
from ollie_compile.problems.operators import Operator, Tensors


def run(operator: Operator, program: Program, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of a program of an operator, in the dtype of the inputs."""
    constants = program.constants(inputs[0].dtype, operator.device)
    return each(operator.finished(program)(*inputs, *constants.values()))


def original(operator: Operator, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The results of an operator as torch computes it."""
    return each(operator.reference(*inputs))


def in_float64(operator: Operator) -> tuple[Tensor, ...]:
    """The example inputs of an operator in float64."""
    return tuple(value.double() for value in operator.example_inputs())


def exact_results(operator: Operator) -> tuple[Tensor, ...]:
    """The results of an operator in float64 for its example inputs."""
    return original(operator, in_float64(operator))


def each(tensors: Tensors) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def together(operator: Operator, results: Sequence[Tensor]) -> Tensor:
    """Results side by side, as one tensor of the shape of the operator's expression."""
    subprogram: Any = getattr(operator, "base", operator)  # of a dynamic one
    return results[0] if len(results) == 1 else torch.cat(list(results), subprogram.side)
