"""Which neurons a token needs, decided from int8 weights in memory before anything is read.

Dimension key: T tokens, N neurons, H hidden, S sketched rows a neuron (gate and up, or fc1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ripple_loader.access import Places

Array = npt.NDArray[Any]
_ROUNDING = 1e-5
_FEW_TOKENS = 4
_FLOATS_AT_ONCE = 1 << 16
_PARTS = 3
_LEAST = 1e-30  # of a token's largest input; its finest step is still a normal number


@dataclass(frozen=True)
class Selection:
    """The neurons to compute for some tokens.

    Attributes:
        places: neurons that at least one token needs, ascending, shape (U,).
        mask: which token needs which, bool, shape (T, N); None where any may have all of them.
    """

    places: Places
    mask: Tensor | None


def select_all(neurons: int) -> Selection:
    """Every neuron for every token."""
    return Selection(np.arange(neurons), None)


@dataclass(frozen=True)
class IntegerInputs:
    """Inputs as sums of int8 parts, each of what those before it leave: products with a sketch need no float.

    Where one of a token's inputs is hundreds of times as large as the others, as some models have it, two
    parts would leave too much of those.

    Attributes:
        parts: int8, each (T, H).
        steps: the value of one in each part, (T, 1).
        norm: of the inputs, (T,).
        left: norm of what all parts leave of them, (T,).
    """

    parts: list[Tensor]
    steps: list[Tensor]
    norm: Tensor
    left: Tensor

    @classmethod
    def of(cls, x_TH: Tensor) -> IntegerInputs:
        """Of float32 inputs (T, H)."""
        step_T1 = x_TH.abs().amax(1, keepdim=True).clamp(min=_LEAST) / 127
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

        Processors without units for them multiply the integers as floats, and so do all for many tokens: some
        rows at a time, for the memory that this takes is beyond the DRAM budget.
        """
        if len(self.norm) <= _FEW_TOKENS and torch.cpu._is_vnni_supported():
            products_STR = torch._int_mm(torch.cat(self.parts), sketch_RH.T).unflatten(0, (_PARTS, -1))
            torch.sum(products_STR * torch.stack(self.steps), 0, out=out_TR)
            return
        y_TH = torch.stack([p * step for p, step in zip(self.parts, self.steps, strict=True)]).sum(0)
        rows = max(1, _FLOATS_AT_ONCE // sketch_RH.shape[1])
        for rows_RH, found_TR in zip(sketch_RH.split(rows), out_TR.split(rows, 1), strict=True):
            torch.mm(y_TH, rows_RH.T.float(), out=found_TR)


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


def margins(estimate_TN: Tensor, error_N: Tensor, scale_N: Tensor, inputs: IntegerInputs) -> Tensor:
    """An upper bound on each pre-activation, shape (T, N).

    |w.x - sketch.y| <= |w - sketch| |x| + |sketch| |x - y| bounds what rounding of weights and inputs hides.

    Args:
        estimate_TN: the sketch's pre-activations of the rounded inputs y, float32.
        error_N: norm of each row's rounding error.
        scale_N: value of a sketch step; 127 of them bound every weight, and so floating-point rounding.
        inputs: x and y.
    """
    largest_N = 127 * scale_N * inputs.parts[0].shape[1] ** 0.5
    slack_TN = inputs.norm[:, None] * (error_N + _ROUNDING * largest_N)
    return estimate_TN + slack_TN.addcmul_(inputs.left[:, None], largest_N)


def contributions(estimates_STN: list[Tensor], activation: nn.Module) -> Tensor:
    """The estimated |act(gate) up|, or |act(fc1)|, shape (T, N)."""
    score_TN = activation(estimates_STN[0])
    for estimate_TN in estimates_STN[1:]:
        score_TN = score_TN * estimate_TN
    return score_TN.abs()


def select_active(margin_TN: Tensor, *, certain: bool) -> Selection:
    """All neurons that a ReLU may leave above zero.

    Args:
        margin_TN: upper bounds of their pre-activations.
        certain: whether the bounds are; if not, a token leaves out the same neurons in any batch.
    """
    needed_TN = ~(margin_TN <= 0)  # NaN is neither: what is not known to be inactive is computed
    return Selection(needed_TN.any(0).nonzero().flatten().cpu().numpy(), None if certain else needed_TN)


def shared_by_neighbours(score_TN: Tensor, share: float, first: int) -> Tensor:
    """Scores of which a share is the mean of two neighbours on the drive, so that more of them come in pairs.

    Args:
        score_TN: in the order of the drive.
        share: 0 leaves the scores as they are, with 1 both neighbours have the same.
        first: the place where pairs begin; neurons before it are in memory.
    """
    pairs = (score_TN.shape[1] - first) // 2
    if not share or not pairs:
        return score_TN
    found_TN = score_TN.clone()
    pairs_TP2 = found_TN[:, first : first + 2 * pairs].unflatten(1, (pairs, 2))
    pairs_TP2.lerp_(pairs_TP2.mean(2, keepdim=True), share)
    return found_TN


def select_largest(score_TN: Tensor, keep: float) -> Selection:
    """Each token's `keep` share of the neurons, those of the largest score."""
    count = max(1, round(keep * score_TN.shape[1]))
    mask_TN = torch.zeros_like(score_TN, dtype=torch.bool)
    mask_TN.scatter_(1, score_TN.topk(count, dim=1).indices, True)
    return Selection(mask_TN.any(0).nonzero().flatten().cpu().numpy(), mask_TN)
