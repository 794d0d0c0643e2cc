"""Matrix products as a target of matching, by their iterator mapping table (OLLIE, section 4.3).

Each iterator of a contraction has a role by the tensors it occurs in, its row of the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ollie_compile.compat import has_onednn
from ollie_compile.expr import Read, Scope, once
from ollie_compile.kernels import library
from ollie_compile.targets.target import (
    CONVOLVED,
    Cost,
    Lowering,
    ProductLayout,
    Target,
    Timed,
    extents,
    multiplications,
)


@dataclass(frozen=True, slots=True)
class Matmul:
    """O[batch, rows, columns] = Sum[contracted] A[batch, rows, contracted] * B[batch, contracted, columns].

    Each field names iterators: `rows` in the order of the first factor's dimensions, `columns` in the
    order of the scope's traversal.
    """

    batch: tuple[str, ...]
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    contracted: tuple[str, ...]


OUTPUT = -1  # beside the positions of the factors
_ROLES = {
    frozenset((0, 1, OUTPUT)): "batch",
    frozenset((0, OUTPUT)): "rows",
    frozenset((1, OUTPUT)): "columns",
    frozenset((0, 1)): "contracted",
}


def mapping_table(scope: Scope) -> dict[str, frozenset[int]]:
    """For each iterator the factors it occurs in, by position, and `OUTPUT` where it is traversed."""
    table = {loop.name: {OUTPUT} for loop in scope.traversal} | {loop.name: set() for loop in scope.summation}
    for position, read in enumerate(scope.factors):
        for index in read.index:
            for name in index.iterators():
                table[name].add(position)
    return {name: frozenset(row) for name, row in table.items()}


@once
def match_matmul(scope: Scope) -> Matmul | None:
    """The matrix product that `scope` is, or None."""
    if not scope.is_contraction or len(scope.factors) != 2:
        return None
    first, second = map(_iterators, scope.factors)
    if first is None or second is None:
        return None
    roles = {name: _ROLES.get(row) for name, row in mapping_table(scope).items()}
    if None in roles.values():
        return None
    by_first = {name: place for place, name in enumerate(first)}
    rows = sorted((name for name in roles if roles[name] == "rows"), key=by_first.__getitem__)
    batch, columns, contracted = (
        tuple(name for name in roles if roles[name] == role) for role in ("batch", "columns", "contracted")
    )
    return Matmul(batch, tuple(rows), columns, contracted)


def _iterators(read: Read) -> list[str] | None:
    """The iterator of each dimension that has one, or None where one is compound or occurs twice."""
    names = [index.iterator for index in read.index if index.terms]
    if None in names or len(set(names)) < len(names):
        return None
    return [name for name in names if name is not None]


def is_batched(scope: Scope) -> bool:
    """Whether it is a product that the layout "batched" writes differently from "columns"."""
    match = match_matmul(scope)
    low, high = scope.ranges[match.rows[0]] if match is not None and len(match.rows) > 1 else (0, 1)
    return match is not None and not match.batch and high - low > 1


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product as it is called: [apart, left, contracted] @ [apart, contracted, right].

    Args:
        swapped: whether the second factor of the scope is on the left.
        shared: whether the left operand is the same for every `apart`.
    """

    apart: tuple[str, ...]
    left: tuple[str, ...]
    right: tuple[str, ...]
    contracted: tuple[str, ...]
    swapped: bool
    shared: bool

    def shape(self, scope: Scope) -> tuple[int, int, int, int]:
        """Extents of (apart, left, contracted, right)."""
        groups = (self.apart, self.left, self.contracted, self.right)
        apart, left, contracted, right = (math.prod(extents(scope, group)) for group in groups)
        return apart, left, contracted, right


class Products(Target[Product]):
    """The libraries' matrix products, batched or not."""

    def match(self, scope: Scope, layout: ProductLayout) -> Product | None:
        match = match_matmul(scope)
        if match is None:
            return None
        if layout in ("rows", *CONVOLVED):
            return Product(match.batch, match.rows, match.columns, match.contracted, False, False)
        if layout == "batched" and is_batched(scope):
            return Product(match.rows[:1], match.columns, match.rows[1:], match.contracted, True, True)
        return Product(match.batch, match.columns, match.rows, match.contracted, True, False)

    def call(self, match: Product, scope: Scope, lowering: Lowering) -> Tensor:
        left, right = reversed(scope.factors) if match.swapped else scope.factors
        apart, rows, columns = match.apart, match.left, match.right
        groups = (() if match.shared else apart, rows, match.contracted)
        first = lowering.operand(left, scope, groups)
        second = lowering.operand(right, scope, (apart, match.contracted, columns))
        if apart:
            value = torch.bmm(first.expand(len(second), -1, -1), second)
        else:
            value = torch.mm(first[0], second[0])
        order = (*apart, *rows, *columns)
        return value.view(extents(scope, order)).permute([order.index(loop.name) for loop in scope.traversal])

    def cost(self, match: Product, scope: Scope, layout: ProductLayout) -> Cost:
        return Cost(multiplications(scope), timed=timed_product(*match.shape(scope), shared=match.shared))


def timed_product(apart: int, left: int, contracted: int, right: int, *, shared: bool = False) -> Timed:
    """The calls of a [apart, left, contracted] @ [apart, contracted, right] product, by each library.

    Args:
        shared: whether the left operand is the same for every `apart`.
    """

    def calls(dtype: torch.dtype, device: torch.device) -> Sequence[Callable[[], object]]:
        first = torch.zeros(1 if shared else apart, left, contracted, dtype=dtype, device=device)
        second = torch.zeros(apart, contracted, right, dtype=dtype, device=device)
        if apart > 1:
            return [lambda: torch.bmm(first.expand(apart, -1, -1), second)]
        offered: list[Callable[[], object]] = [lambda: torch.mm(first[0], second[0])]
        if has_onednn() and library.has_libraries(first):
            offered.append(lambda: library.product(first[0], second[0]))
        return offered

    return Timed(f"product {apart}x{left}x{contracted}x{right}{' shared' if shared else ''}", calls)
