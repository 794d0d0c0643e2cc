"""Lowering of constant matrices: Sum[j] C[i, j] * data[.., j ..] as a weighted sum of slices.

A slice for each j is multiplied by a column of the matrix. This does more products than writing out every
row without its zeros, but it stays one small kernel, which compiles quickly and is bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ollie_compile.expr import Affine, Constant, Loop, Read, Scope

MAX_COLUMNS = 16  # slices that are written out


def is_transform(scope: Scope) -> bool:
    """Whether a scope applies one constant matrix to one tensor, along one summed iterator."""
    if len(scope.summation) != 1 or len(scope.factors) != 2 or scope.function != "*":
        return False
    if scope.terms() != 1:
        return False
    constant, read = _parts(scope)
    row, column = constant.index
    used = {name for index in read.index for name in index.iterators()}
    summed = scope.summation[0].name
    return (
        row.iterator in {loop.name for loop in scope.traversal} - used
        and row == Affine.of(row.iterator or "")
        and set(column.iterators()) == {summed}
        and summed in used
        and scope.summation[0].extent <= MAX_COLUMNS
    )


def _parts(scope: Scope) -> tuple[Read, Read]:
    """The read of the matrix and the other one."""
    first, second = scope.factors
    return (first, second) if isinstance(first.tensor, Constant) else (second, first)


def matrix(scope: Scope) -> Constant:
    """The constant that is applied."""
    constant = _parts(scope)[0].tensor
    assert isinstance(constant, Constant)
    return constant


def column(scope: Scope) -> Affine:
    """Where the matrix is read along its columns."""
    return _parts(scope)[0].index[1]


def row_loop(scope: Scope) -> Loop:
    """The traversal iterator that only the matrix has."""
    name = _parts(scope)[0].index[0].iterator
    return next(loop for loop in scope.traversal if loop.name == name)


def data(scope: Scope) -> Read:
    """The read that the matrix is applied to."""
    return _parts(scope)[1]


def apply(scope: Scope, values: Tensor, at: Callable[[int, Sequence[Loop]], Tensor]) -> Tensor:
    """The value of a transform.

    Args:
        values: those of the constant.
        at: the data over the given loops with the summed iterator at a value.

    Returns:
        a tensor with a dimension for each traversal iterator.
    """
    read, _ = _parts(scope)
    (summed,) = scope.summation
    row = row_loop(scope)
    place = scope.traversal.index(row)
    loops = [loop for loop in scope.traversal if loop is not row]
    column_shape = [row.extent, *[1] * (len(loops) - place)]
    total: Tensor | None = None
    for value in range(summed.low, summed.high):
        ranges = {summed.name: (value, value + 1)}
        column = read.index[1].substitute({summed.name: Affine.of(value)}, ranges).const
        coefficients = values[row.low : row.high, column].reshape(column_shape)
        term = at(value, loops).unsqueeze(place) * coefficients
        total = term if total is None else total + term
    assert total is not None, "a summation has at least one value"
    return total.expand(scope.shape)
