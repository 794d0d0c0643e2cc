"""Lowering of constant matrices: Sum[j] C[i, j] * data[.., j ..] as weighted sums of slices.

The matrices are small and mostly zeros, ones and small fractions: each value of the iterators that only a
matrix has is written out, so that Inductor makes a few additions of slices of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ollie_compile.expr import Affine, Constant, Loop, Read, Scope

MAX_WRITTEN = 64  # values of one matrix that are written out; more would take long to compile


def is_transform(scope: Scope) -> bool:
    """Whether a scope applies one constant matrix to one tensor, along one summed iterator."""
    if len(scope.summation) != 1 or len(scope.factors) != 2 or scope.function != "*":
        return False
    if scope.terms() != 1:
        return False
    matrix, read = _parts(scope)
    (row, column) = matrix.index
    used = {name for index in read.index for name in index.iterators()}
    summed = scope.summation[0].name
    return (
        row.iterator in {loop.name for loop in scope.traversal} - used
        and row == Affine.of(row.iterator or "")
        and set(column.iterators()) == {summed}
        and summed in used
        and math.prod(matrix.tensor.box[place][1] for place in (0, 1)) <= MAX_WRITTEN
    )


def _parts(scope: Scope) -> tuple[Read, Read]:
    """The read of the matrix and the other one."""
    first, second = scope.factors
    return (first, second) if isinstance(first.tensor, Constant) else (second, first)


def row_loop(scope: Scope) -> Loop:
    """The traversal iterator that only the matrix has."""
    name = _parts(scope)[0].index[0].iterator
    return next(loop for loop in scope.traversal if loop.name == name)


def data(scope: Scope) -> Read:
    """The read that the matrix is applied to."""
    return _parts(scope)[1]


def apply(scope: Scope, at: Callable[[int, Sequence[Loop]], Tensor]) -> Tensor:
    """The value of a transform.

    Args:
        at: the data over the given loops with the summed iterator at a value.

    Returns:
        a tensor with a dimension for each traversal iterator.
    """
    matrix, _ = _parts(scope)
    assert isinstance(matrix.tensor, Constant)
    (summed,) = scope.summation
    row = row_loop(scope)
    loops = [loop for loop in scope.traversal if loop is not row]
    slices = {value: at(value, loops) for value in range(summed.low, summed.high)}
    results = []
    for place in range(row.low, row.high):
        total: Tensor | None = None
        for value, part in slices.items():
            ranges = {summed.name: (value, value + 1)}
            column = matrix.index[1].substitute({summed.name: Affine.of(value)}, ranges).const
            coefficient = float(matrix.tensor.at(place, column))
            if coefficient:
                term = part if coefficient == 1.0 else part * coefficient
                total = term if total is None else total + term
        assert total is not None, "no row of a Cook-Toom matrix is zero"
        results.append(total.expand([loop.extent for loop in loops]))
    return torch.stack(results, scope.traversal.index(row))
