"""Operators of users: functions of tensors, with their index notation."""

from __future__ import annotations

import functools
import inspect
import marshal
from collections.abc import Callable, Sequence
from types import FunctionType

import torch
from torch import Tensor
from torch.library import CustomOpDef

from ollie_compile.expr import Assignment, Input
from ollie_compile.lift.declared import DECLARED, Declaration

LIBRARY = "ollie_user"
_SIZE = 4  # of every dimension, when a notation is checked before there are tensors


def operator(notation: str) -> Callable[[FunctionType], CustomOpDef]:
    """Declare the index notation of a function of tensors, so that the backend may derive something faster.

        @ollie_compile.operator("O[b, m, n] += A[b, m, k] * B[b, k, n]")
        def product(a, b):
            return a @ b

    The function becomes the operator `ollie_user::<its name>` of torch, which torch.compile keeps whole.
    Eager calls run the function. Under backend "ollie" the notation is derived at the shapes of each call,
    and candidates are checked against the function and timed against it. The function is kept when

    - no candidate is faster,
    - the notation differs from the function's results,
    - shapes are dynamic,
    - the tensors are not all of one floating dtype, or
    - gradients are computed.

    The operator has no derivative, unless `register_autograd` of the result gives it one: a backward pass
    through it raises, and so does compiling for one.

    Args:
        notation: as in `ollie_compile.expr.parse_assignment`. Its tensors are the function's parameters: by
            name if the names are the same, otherwise in the order in which they first appear.

    Raises:
        ValueError: the notation does not parse, its tensors are not the function's parameters, or the name
            is taken; and in a call, shapes of arguments or of the result that are not those of the notation.

    Returns:
        a decorator. The decorated function is called as before, with tensors only, and returns a new
        contiguous tensor.
    """
    assignment = Assignment.of(notation)
    if not assignment.declared:
        raise ValueError(
            f"An operator must have an iterator on the left, got {notation!r}: write `O[o:0..1]`."
        )
    assignment.scope({name: Input(name, (_SIZE,) * rank) for name, rank in assignment.tensors.items()})
    return lambda function: _declare(function, assignment, notation)


def _declare(function: FunctionType, assignment: Assignment, notation: str) -> CustomOpDef:
    name = function.__name__
    if not name.isidentifier():
        raise ValueError(f"An operator must be a function with a name, got {name!r}: define it with `def`.")
    if any(target.name() == f"{LIBRARY}::{name}" for target in DECLARED):
        raise ValueError(
            f"Each operator must have a name of its own, got `{name}` again: rename the function."
        )
    names = _order(assignment, function)

    def result_of(*tensors: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
        shape = assignment.shape({n: t.shape for n, t in zip(names, tensors, strict=True)})
        return shape, functools.reduce(torch.promote_types, (tensor.dtype for tensor in tensors))

    def run(*tensors: Tensor) -> Tensor:
        shape, dtype = result_of(*tensors)
        result = function(*tensors)
        if (tuple(result.shape), result.dtype) != (shape, dtype):
            raise ValueError(
                f"`{name}` must return {dtype} of shape {shape}, by its notation {notation!r}, "
                f"got {result.dtype} of shape {tuple(result.shape)}."
            )
        return result.contiguous()

    def fake(*tensors: Tensor) -> Tensor:
        shape, dtype = result_of(*tensors)
        return tensors[0].new_empty(shape, dtype=dtype)

    schema = f"({', '.join(f'Tensor {p}' for p in inspect.signature(function).parameters)}) -> Tensor"
    registered = torch.library.custom_op(f"{LIBRARY}::{name}", run, mutates_args=(), schema=schema)
    registered.register_fake(fake)
    target = getattr(getattr(torch.ops, LIBRARY), name).default
    DECLARED[target] = Declaration(notation, assignment, names, marshal.dumps(function.__code__))
    return registered


def _order(assignment: Assignment, function: FunctionType) -> Sequence[str]:
    """The tensors of a notation in the order of the function's parameters."""
    parameters = inspect.signature(function).parameters
    tensors = assignment.tensors
    plain = all(
        parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.default is parameter.empty
        for parameter in parameters.values()
    )
    named = bool(parameters.keys() & tensors.keys())
    if not plain or len(parameters) != len(tensors) or (named and parameters.keys() != tensors.keys()):
        raise ValueError(
            f"The parameters of `{function.__name__}` must be the tensors of its notation, "
            f"{', '.join(tensors)}, got {', '.join(map(str, parameters.values())) or 'none'}: give it one "
            "for each, without defaults, and the same names or all others."
        )
    return list(parameters if named else tensors)
