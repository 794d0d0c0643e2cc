"""Evaluation of a scope at chosen points: over the integers, over a prime field, or in float64."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from ollie_compile.expr.elementwise import combine
from ollie_compile.expr.index import Affine, Quotient
from ollie_compile.expr.scope import Constant, Input, Scope, Tensor

Columns = dict[str, np.ndarray]
UNKNOWN = 1_000_003  # coefficient of the square in the polynomial that stands for an unknown function


def evaluate(
    tensor: Tensor,
    values: Mapping[str, np.ndarray],
    points: np.ndarray,
    modulus: int | None = None,
    *,
    distributive: bool = True,
) -> np.ndarray:
    """Values of `tensor` at `points`.

    Args:
        tensor: the expression; reads outside a box give 0.
        values: an array for each input, of the input's shape: int64, or float64 for all that follows to be
            computed in float64, functions as torch does.
        points: int64 [points, dimensions], indices that may lie outside the box.
        modulus: reduce after every product and sum by this prime below 2**31; None computes in int64,
            which is exact modulo 2**64.
        distributive: False, with a modulus, takes a product for an unknown function of it that keeps 0: two
            expressions are then equal only if they add up the same products.

    Returns:
        [points] in the dtype of the values.

    Raises:
        ValueError: the expression holds fractions, the values are integers and `modulus` is None.
    """
    dtype = np.result_type(np.int64, *(value.dtype for value in values.values()))
    box = np.array(tensor.box, dtype=np.int64).reshape(-1, 2)
    inside = ((points >= box[:, 0]) & (points < box[:, 1])).all(axis=1)
    result = np.zeros(len(points), dtype=dtype)
    if inside.any():
        at = points[inside]
        if isinstance(tensor, Input):
            result[inside] = values[tensor.name][tuple(at.T)]
        elif isinstance(tensor, Constant):
            result[inside] = _constant_values(tensor, modulus, dtype)[tuple(at.T)]
        else:
            result[inside] = _scope_values(tensor, values, at, modulus, distributive)
    return result


def _scope_values(
    scope: Scope,
    values: Mapping[str, np.ndarray],
    points: np.ndarray,
    modulus: int | None,
    distributive: bool,
) -> np.ndarray:
    steps = [np.arange(loop.low, loop.high, dtype=np.int64) for loop in scope.summation]
    grid = [axis.ravel() for axis in np.meshgrid(*steps, indexing="ij")] if steps else []
    taps = len(grid[0]) if grid else 1
    columns = {loop.name: np.repeat(points[:, place], taps) for place, loop in enumerate(scope.traversal)} | {
        loop.name: np.tile(axis, len(points)) for loop, axis in zip(scope.summation, grid, strict=True)
    }
    count = len(points) * taps
    factors = []
    for read in scope.factors:
        at = np.empty((count, len(read.index)), dtype=np.int64)
        for place, index in enumerate(read.index):
            at[:, place] = _index_values(index, columns, count)
        # Inner scopes are shared by many taps: evaluate each distinct point once.
        distinct, back = _distinct(at)
        inner = evaluate(read.tensor, values, distinct, modulus, distributive=distributive)
        factors.append(inner[back])
    terms = combine(scope.function, factors, modulus)
    if not distributive and scope.function == "*" and len(factors) > 1:
        assert modulus is not None, "an unknown function of products has values in a field"
        terms = (terms * terms % modulus * UNKNOWN + terms) % modulus
    total = terms.reshape(len(points), taps).sum(axis=1)
    return total if modulus is None else total % modulus


def _distinct(points: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The distinct rows, and which of them each row is."""
    low = points.min(axis=0, initial=0)
    sizes = [int(size) for size in points.max(axis=0, initial=0) - low + 1]
    if not points.size or math.prod(sizes) > np.iinfo(np.int64).max:
        rows, back = np.unique(points, axis=0, return_inverse=True)
        return rows, back.ravel()
    # One number for each row sorts several times faster than the rows.
    keys = np.ravel_multi_index(tuple((points - low).T), sizes)
    _, first, back = np.unique(keys, return_index=True, return_inverse=True)
    return points[first], back


def _constant_values(constant: Constant, modulus: int | None, dtype: np.dtype) -> np.ndarray:
    if dtype == np.float64:
        return np.array(constant.values, dtype=dtype).reshape(constant.shape)
    if modulus is None and any(value.denominator != 1 for value in constant.values):
        raise ValueError(f"{constant.name} holds fractions, which need a `modulus` to be exact, got None.")
    values = [
        v.numerator if modulus is None else v.numerator * pow(v.denominator, -1, modulus) % modulus
        for v in constant.values
    ]
    return np.array(values, dtype=np.int64).reshape(constant.shape)


def _index_values(index: Affine, columns: Columns, count: int) -> np.ndarray:
    total = np.full(count, index.const, dtype=np.int64)
    for atom, coefficient in index.terms:
        if isinstance(atom, str):
            part = columns[atom]
        else:
            inner = _index_values(atom.of, columns, count)
            part = inner // atom.by if isinstance(atom, Quotient) else inner % atom.by
        total += coefficient * part
    return total
