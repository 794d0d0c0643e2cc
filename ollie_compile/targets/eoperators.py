"""eOperators as a target: whatever no library or kernel computes, in plain aten (OLLIE, section 4.4).

The few summed taps are written out as sums of pads, slices and views, which Inductor makes into one kernel.
"""

from __future__ import annotations

import functools
import itertools
import math

import torch
from torch import Tensor

from ollie_compile.expr import ELEMENTWISE, Scope
from ollie_compile.targets.target import Cost, Lowering, ProductLayout, Target
from ollie_compile.targets.views import is_view

MAX_TAPS = 128  # summed terms of one eOperator; more would make kernels that take minutes to compile


class EOperators(Target[int]):
    """Sums of at most `MAX_TAPS` terms that read tensors as views."""

    def match(self, scope: Scope, layout: ProductLayout) -> int | None:
        """The number of taps."""
        taps = math.prod(loop.extent for loop in scope.summation)
        return taps if taps <= MAX_TAPS and all(map(is_view, scope.factors)) else None

    def call(self, match: int, scope: Scope, lowering: Lowering) -> Tensor:
        windows = [lowering.window(read, scope) for read in scope.factors]
        total: Tensor | None = None
        for taps in itertools.product(*(range(loop.low, loop.high) for loop in scope.summation)):
            at = {loop.name: tap for loop, tap in zip(scope.summation, taps, strict=True)}
            term = _combined(scope.function, [window.at(at, scope.traversal) for window in windows])
            total = term if total is None else total + term
        assert total is not None, "a summation has at least one tap"
        return total.expand(scope.shape)

    def cost(self, match: int, scope: Scope, layout: ProductLayout) -> Cost:
        """A view costs nothing."""
        return Cost() if scope.is_view else super().cost(match, scope, layout)


def _combined(function: str, values: list[Tensor]) -> Tensor:
    if function in "*+":
        return functools.reduce(torch.mul if function == "*" else torch.add, values)
    return ELEMENTWISE[function].torch(*values)
