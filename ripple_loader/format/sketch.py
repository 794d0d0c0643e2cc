"""The int8 sketch of the rows that select, and products of it with inputs.

Dimension key: T tokens, N neurons, H hidden, R rows of a sketch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from ripple_loader.compat import has_integer_units, integer_product

Array = npt.NDArray[Any]
_FEW_TOKENS = 4
_FLOATS_AT_ONCE = 1 << 16
_PARTS = 3
_LEAST_INPUT = 1e-30  # a token's largest input is at least this, so that the finest step is a normal number


@dataclass(frozen=True)
class IntegerInputs:
    """Inputs as sums of int8 parts, each the rounded remainder of those before it.

    In some models one of a token's inputs is hundreds of times as large as the others. Two parts would round
    the others too coarsely, so there are three.

    Attributes:
        parts: int8, each (T, H).
        steps: the value of one in each part, (T, 1).
        norm: of the inputs, (T,).
        error: norm of the remainder after all parts, (T,).
    """

    parts: list[Tensor]
    steps: list[Tensor]
    norm: Tensor
    error: Tensor

    @classmethod
    def of(cls, x_TH: Tensor) -> IntegerInputs:
        """Split float32 inputs (T, H)."""
        step_T1 = x_TH.abs().amax(1, keepdim=True).clamp(min=_LEAST_INPUT) / 127
        rest_TH = x_TH / step_T1  # norms are of these, whose squares neither overflow nor vanish
        norm_T = step_T1[:, 0] * rest_TH.norm(dim=1)
        parts, steps = [], []
        for finer in range(_PARTS):
            if finer:
                rest_TH, step_T1 = rest_TH * 254, step_T1 / 254
            part_TH = rest_TH.round().clamp_(-127, 127)
            rest_TH = rest_TH - part_TH
            parts.append(part_TH.to(torch.int8))
            steps.append(step_T1)
        return cls(parts, steps, norm_T, step_T1[:, 0] * rest_TH.norm(dim=1))

    def products(self, sketch_RH: Tensor, out_TR: Tensor) -> None:
        """Products with the rows of a sketch, int8 (R, H), into float32 (T, R).

        Processors without integer units, and all processors for many tokens, multiply the integers as floats:
        some rows at a time, because the DRAM budget does not cover this memory.
        """
        if len(self.norm) <= _FEW_TOKENS and has_integer_units():
            products_STR = integer_product(torch.cat(self.parts), sketch_RH.T).unflatten(0, (_PARTS, -1))
            torch.sum(products_STR * torch.stack(self.steps), 0, out=out_TR)
            return
        y_TH = torch.stack([p * step for p, step in zip(self.parts, self.steps, strict=True)]).sum(0)
        rows = max(1, _FLOATS_AT_ONCE // sketch_RH.shape[1])
        for rows_RH, products_TR in zip(sketch_RH.split(rows), out_TR.split(rows, 1), strict=True):
            torch.mm(y_TH, rows_RH.T.float(), out=products_TR)


def sketch_rows(weight_NH: Tensor) -> tuple[Array, Array, Array]:
    """Round each row to int8 with one scale.

    Returns:
        The rounded rows (int8, NH), the value of a step (float32, N), and the norm of the rounding error
        (float32, N), by which |w.x - sketch.x| <= error |x| (Cauchy-Schwarz).
    """
    weight_NH = weight_NH.float()
    scale_N = weight_NH.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    rounded_NH = (weight_NH / scale_N[:, None]).round()
    error_N = (weight_NH - rounded_NH * scale_N[:, None]).norm(dim=1)
    return rounded_NH.to(torch.int8).numpy(), scale_N.numpy(), error_N.numpy()
