"""Lowering: a derived expression becomes plain aten calls.

Matched scopes become matrix products. Every other scope is an eOperator (OLLIE, section 4.4): its few
summed taps are written out as sums of pads, slices and views, which Inductor makes into one kernel.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ollie_compile.expr import Input, Read, Scope
from ollie_compile.matching import Matmul, match_matmul
from ollie_compile.views import Window, is_view

MAX_TAPS = 128  # summed terms of one eOperator; more would make kernels that take minutes to compile

Layout = Literal["rows", "columns", "batched"]
"""How products are written: rows A @ B; columns B^T @ A^T; batched like columns, one product for each
value of the first row iterator, which keeps a batch of images apart."""


@dataclass(frozen=True)
class Program:
    """An expression and the layout of its products: one way to compute it.

    Called with a tensor for each input, it gives a tensor of the scope's shape.
    """

    scope: Scope
    layout: Layout

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return _Lowering(inputs, self.layout).scope(self.scope)


def is_lowerable(scope: Scope) -> bool:
    """Whether every scope is a matrix product or an eOperator of at most `MAX_TAPS` taps."""
    return all(match_matmul(inner) is not None or _is_eoperator(inner) for inner in scope.scopes())


def programs(scope: Scope) -> list[Program]:
    """The different ways to write a lowerable expression."""
    matches = [(inner, match) for inner in scope.scopes() if (match := match_matmul(inner))]
    layouts: list[Layout] = list(get_args(Layout)) if matches else ["rows"]
    if not any(_batched(inner, match) for inner, match in matches):
        layouts = layouts[:2]
    return [Program(scope, layout) for layout in layouts]


def _batched(scope: Scope, match: Matmul) -> bool:
    """Whether the layout "batched" differs from "columns"."""
    low, high = scope.ranges[match.rows[0]] if len(match.rows) > 1 else (0, 1)
    return not match.batch and high - low > 1


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product as it is called: [apart, left, contracted] @ [apart, contracted, right]."""

    apart: tuple[str, ...]
    left: tuple[str, ...]
    right: tuple[str, ...]
    contracted: tuple[str, ...]
    swapped: bool  # whether the second factor of the scope is on the left
    shared: bool  # whether the left operand is the same for every `apart`

    @classmethod
    def of(cls, scope: Scope, layout: Layout) -> Product | None:
        """The product that `scope` is written as, or None where it is no matrix product."""
        match = match_matmul(scope)
        if match is None:
            return None
        if layout == "rows":
            return cls(match.batch, match.rows, match.columns, match.contracted, False, False)
        if layout == "batched" and _batched(scope, match):
            return cls(match.rows[:1], match.columns, match.rows[1:], match.contracted, True, True)
        return cls(match.batch, match.columns, match.rows, match.contracted, True, False)

    def shape(self, scope: Scope) -> tuple[int, int, int, int]:
        """Extents of (apart, left, contracted, right)."""
        groups = (self.apart, self.left, self.contracted, self.right)
        apart, left, contracted, right = (math.prod(extents(scope, group)) for group in groups)
        return apart, left, contracted, right


def extents(scope: Scope, names: Sequence[str]) -> list[int]:
    return [scope.ranges[name][1] - scope.ranges[name][0] for name in names]


def _is_eoperator(scope: Scope) -> bool:
    taps = math.prod(loop.extent for loop in scope.summation)
    return taps <= MAX_TAPS and all(is_view(read, scope.traversal) for read in scope.factors)


class _Lowering:
    def __init__(self, inputs: Mapping[str, Tensor], layout: Layout) -> None:
        self.inputs, self.layout = inputs, layout
        self.done: dict[Scope, Tensor] = {}

    def scope(self, scope: Scope) -> Tensor:
        """The value on the scope's box, dimensions in the order of its traversal."""
        if scope not in self.done:
            product = Product.of(scope, self.layout)
            self.done[scope] = self._eoperator(scope) if product is None else self._product(scope, product)
        return self.done[scope]

    def _window(self, read: Read, scope: Scope) -> Window:
        tensor = read.tensor
        value = self.inputs[tensor.name] if isinstance(tensor, Input) else self.scope(tensor)
        return Window.of(read, value, scope.ranges)

    def _eoperator(self, scope: Scope) -> Tensor:
        windows = [self._window(read, scope) for read in scope.factors]
        total: Tensor | None = None
        for taps in itertools.product(*(range(loop.low, loop.high) for loop in scope.summation)):
            at = {loop.name: tap for loop, tap in zip(scope.summation, taps, strict=True)}
            views = [window.at(at, scope.traversal) for window in windows]
            term = functools.reduce(torch.mul, views)
            total = term if total is None else total + term
        assert total is not None, "a summation has at least one tap"
        return total.expand(scope.shape)

    def _product(self, scope: Scope, product: Product) -> Tensor:
        left, right = reversed(scope.factors) if product.swapped else scope.factors
        apart, rows, columns = product.apart, product.left, product.right
        first = self._operand(left, scope, (() if product.shared else apart, rows, product.contracted))
        second = self._operand(right, scope, (apart, product.contracted, columns))
        if apart:
            value = torch.bmm(first.expand(len(second), -1, -1), second)
        else:
            value = torch.mm(first[0], second[0])
        order = (*apart, *rows, *columns)
        return value.view(extents(scope, order)).permute([order.index(loop.name) for loop in scope.traversal])

    def _operand(self, read: Read, scope: Scope, groups: Sequence[tuple[str, ...]]) -> Tensor:
        """A factor with one dimension for each group of iterators."""
        loops = {loop.name: loop for loop in scope.traversal + scope.summation}
        value = self._window(read, scope).at({}, [loops[name] for group in groups for name in group])
        return value.reshape([math.prod(extents(scope, group)) for group in groups])
