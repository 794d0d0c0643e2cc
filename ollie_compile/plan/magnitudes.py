"""Rounding next to large values: inputs whose values have magnitudes 1, 1e4 and 1e-4 side by side.

Constant matrices combine values that the original keeps apart. On noise of one magnitude that costs a few
digits; next to a large value the digits of a small one may be lost. So the error of each result is compared
with the sum of the |products| that the original adds up for that result, whatever values lie elsewhere.
"""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from ollie_compile.expr import evaluate
from ollie_compile.lower.lowering import Program
from ollie_compile.plan.results import original, run, together
from ollie_compile.problems.operators import Operator
from ollie_compile.search.proof import terms_summed

LARGE = 1e4
MOST_POINTS, MOST_TERMS = 4096, 1 << 19  # results that are compared, and products that they sum together


class MixedMagnitudes:
    """Inputs of mixed magnitude for an operator, some of its exact results, and their sums of |products|."""

    def __init__(self, operator: Operator) -> None:
        self.operator = operator
        self.inputs = _mixed(operator)

    def error(self, program: Program | None) -> float:
        """The largest error of a program, relative to each result's own sum of |products|.

        Args:
            program: None is the operator itself, as torch computes it.
        """
        operator = self.operator
        results = original(operator, self.inputs) if program is None else run(operator, program, self.inputs)
        got = together(operator, results).double().cpu().numpy()[tuple(self._positions.T)]
        exact, sums = self._exact
        errors = np.abs(got - exact)
        relative = np.divide(errors, sums, out=np.where(errors > 0, np.inf, 0.0), where=sums > 0)
        return float(relative.max())  # NaN where a result is no number

    @functools.cached_property
    def _points(self) -> np.ndarray:
        """The places in the expression's box that are compared."""
        scope = self.operator.expression()
        box = np.array(scope.box, dtype=np.int64)
        count = max(1, min(MOST_POINTS, MOST_TERMS // terms_summed(scope)))
        return np.random.default_rng(0).integers(box[:, 0], box[:, 1], size=(count, len(box)))

    @property
    def _positions(self) -> np.ndarray:
        box = np.array(self.operator.expression().box, dtype=np.int64)
        return self._points - box[:, 0]

    @functools.cached_property
    def _exact(self) -> tuple[np.ndarray, np.ndarray]:
        """The results at the points and their sums of |products|, in float64."""
        scope = self.operator.expression()
        named = zip(self.operator.inputs, self.inputs, strict=True)
        values = {name: value.double().cpu().numpy() for name, value in named}
        subprogram = getattr(self.operator, "base", self.operator)  # of a dynamic one
        for name, number in getattr(subprogram, "numbers", ()):
            values[name] = np.array(number)
        sizes = {name: np.abs(value) for name, value in values.items()}
        return evaluate(scope, values, self._points), evaluate(scope, sizes, self._points)


def _mixed(operator: Operator) -> tuple[Tensor, ...]:
    """Example inputs, each value of those that are no parameters at a magnitude of its own."""
    large = min(LARGE, torch.finfo(operator.dtype).max ** 0.5 / 16)  # sums of float16 overflow soon
    magnitudes = torch.tensor([1.0, large, 1 / large], dtype=operator.dtype, device=operator.device)
    generator = torch.Generator().manual_seed(1)
    inputs = []
    for name, value in zip(operator.inputs, operator.example_inputs(), strict=True):
        if name not in operator.parameters:
            chosen = torch.randint(3, value.shape, generator=generator).to(operator.device)
            value = value * magnitudes[chosen]
        inputs.append(value)
    return tuple(inputs)
