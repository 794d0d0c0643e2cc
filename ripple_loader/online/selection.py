"""The choice of a token's neurons, by scores or bounds that are known before anything is read.

Dimension key: T tokens, N neurons, H hidden, S sketched rows a neuron (gate and up, or fc1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ripple_loader.format.sketch import (
    IntegerInputs,
)
from ripple_loader.storage.collapse import Places

_ROUNDING = 1e-5


@dataclass(frozen=True)
class Selection:
    """The neurons to compute for some tokens.

    Attributes:
        places: neurons that at least one token needs, ascending, shape (U,).
        mask: the neurons of each token, bool, shape (T, N); None if every token may use all of them.
    """

    places: Places
    mask: Tensor | None


def select_all(neurons: int) -> Selection:
    """Every neuron for every token."""
    return Selection(np.arange(neurons), None)


def margins(estimate_TN: Tensor, error_N: Tensor, scale_N: Tensor, inputs: IntegerInputs) -> Tensor:
    """An upper bound on each pre-activation, shape (T, N).

    |w.x - sketch.y| <= |w - sketch| |x| + |sketch| |x - y| bounds the error of rounding weights and inputs.

    Args:
        estimate_TN: the sketch's pre-activations of the rounded inputs y, float32.
        error_N: norm of each row's rounding error.
        scale_N: value of a sketch step; 127 steps bound every weight, and thus floating-point rounding.
        inputs: x and y.
    """
    largest_N = 127 * scale_N * inputs.parts[0].shape[1] ** 0.5
    slack_TN = inputs.norm[:, None] * (error_N + _ROUNDING * largest_N)
    return estimate_TN + slack_TN.addcmul_(inputs.error[:, None], largest_N)


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
        certain: whether the bounds are exact; if not, each token computes its own selection only, so that
            it does not depend on the batch.
    """
    needed_TN = ~(margin_TN <= 0)  # a NaN bound cannot rule a neuron out
    return Selection(needed_TN.any(0).nonzero().flatten().cpu().numpy(), None if certain else needed_TN)


def shared_by_neighbours(score_TN: Tensor, share: float, first: int) -> Tensor:
    """Mix the scores of neighbours on the drive, so that more neurons are selected in pairs.

    Args:
        score_TN: in the order of the drive.
        share: of the pair's mean in each score; 0 keeps the scores, with 1 both neighbours have the same.
        first: the place at which pairs begin; neurons before it are in memory.
    """
    pairs = (score_TN.shape[1] - first) // 2
    if not share or not pairs:
        return score_TN
    mixed_TN = score_TN.clone()
    pairs_TP2 = mixed_TN[:, first : first + 2 * pairs].unflatten(1, (pairs, 2))
    pairs_TP2.lerp_(pairs_TP2.mean(2, keepdim=True), share)
    return mixed_TN


def select_largest(score_TN: Tensor, keep: float) -> Selection:
    """Each token's `keep` share of the neurons, those of the largest score."""
    count = max(1, round(keep * score_TN.shape[1]))
    mask_TN = torch.zeros_like(score_TN, dtype=torch.bool)
    mask_TN.scatter_(1, score_TN.topk(count, dim=1).indices, True)
    return Selection(mask_TN.any(0).nonzero().flatten().cpu().numpy(), mask_TN)
