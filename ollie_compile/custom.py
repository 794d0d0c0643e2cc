"""Operators of users: functions of tensors with what they compute in index notation."""

from __future__ import annotations

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
_SIZE = 4  # of every dimension, where a notation is read before there are tensors


def operator(notation: str) -> Callable[[FunctionType], CustomOpDef]:
    """Declare what a function of tensors computes, so that the backend may derive something faster.

        @ollie_compile.operator("O[b, m, n] += A[b, m, k] * B[b, k, n]")
        def product(a, b):
            return a @ b

    The function becomes the operator `ollie_user::<its name>` of torch, which torch.compile keeps whole.
    Eager calls run the function. Under backend "ollie" the notation is derived at the shapes of each call;
    candidates are checked against the function itself and timed against it, and it stays where none is
    faster, where the notation says something else than the function computes, with dynamic shapes, where
    the tensors are not all of one floating dtype, and where gradients are computed.

    The operator has no derivative: a backward pass through it raises, and so does compiling for one, unless
    `register_autograd` of what is returned gives it one.

    Args:
        notation: as in `ollie_compile.expr.parse_assignment`. Its tensors are the function's parameters, by
            name where they have the same names, otherwise in the order in which they first appear.

    Raises:
        ValueError: the notation does not parse, its tensors are not the function's parameters, or the name
            is taken; and in a call, shapes that are not those of the notation, of arguments or the result.

    Returns:
        a decorator. What it makes is called like the function, with tensors only; it returns a new
        contiguous tensor.
    """
    assignment = Assignment.of(notation)
    if not assignment.declared:
        raise ValueError(
            f"An operator must have an iterator on the left, got {notation!r}: write `O[o:0..1]`."
        )
    assignment.scope({name: Input(name, (_SIZE,) * rank) for name, rank in assignment.tensors.items()})

    def decorate(function: FunctionType) -> CustomOpDef:
        name = function.__name__
        if not name.isidentifier():
            raise ValueError(
                f"An operator must be a function with a name, got {name!r}: define it with `def`."
            )
        library = getattr(torch.ops, LIBRARY)
        if any(target.name() == f"{LIBRARY}::{name}" for target in DECLARED):
            raise ValueError(
                f"Each operator must have a name of its own, got `{name}` again: rename the function."
            )
        names = _order(assignment, function)

        def made(*tensors: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
            shape = assignment.shape({n: t.shape for n, t in zip(names, tensors, strict=True)})
            dtype = tensors[0].dtype
            for tensor in tensors[1:]:
                dtype = torch.promote_types(dtype, tensor.dtype)
            return shape, dtype

        def run(*tensors: Tensor) -> Tensor:
            shape, dtype = made(*tensors)
            result = function(*tensors)
            if (tuple(result.shape), result.dtype) != (shape, dtype):
                raise ValueError(
                    f"`{name}` must return {dtype} of shape {shape}, by its notation {notation!r}, "
                    f"got {result.dtype} of shape {tuple(result.shape)}."
                )
            return result.contiguous()

        def fake(*tensors: Tensor) -> Tensor:
            shape, dtype = made(*tensors)
            return tensors[0].new_empty(shape, dtype=dtype)

        schema = f"({', '.join(f'Tensor {p}' for p in inspect.signature(function).parameters)}) -> Tensor"
        registered = torch.library.custom_op(f"{LIBRARY}::{name}", run, mutates_args=(), schema=schema)
        registered.register_fake(fake)
        target = getattr(library, name).default
        DECLARED[target] = Declaration(notation, assignment, names, marshal.dumps(function.__code__))
        return registered

    return decorate


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
