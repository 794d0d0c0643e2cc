"""Low-rank predictors of a ReLU's active neurons: products in the inputs' main subspace, plus a margin.

The inputs of an MLP lie close to a subspace of few dimensions K: the leading right singular vectors of
inputs that were sampled while tracing span it. With the projection P to it, a neuron's pre-activation is
w.x + b = w.P x + b + w.(x - P x): the first part takes K products a neuron instead of H, and the last is
small. The standard deviation of the last part is measured for each neuron on held-out inputs. They also
calibrate recall against the number of deviations added. Deja Vu (arXiv 2310.17157) and LLM in a Flash (arXiv
2312.11514, section 3.1) train such predictors; this one is closed-form.

Dimension key: T tokens, M sampled tokens, N neurons, H hidden, K rank, L levels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ripple_loader.config import RECALLS
from ripple_loader.format.sketch import IntegerInputs, sketch_rows

_CALIBRATED_EVERY = 4  # sampled tokens; every fourth is held out from the fit, to calibrate on
_MOST_TOKENS, _FEWEST_HELD_OUT = 4096, 32  # to fit to, and to calibrate on
_RANK_MULTIPLE = 8  # for the processor
_LEAST_DEVIATION = 1e-6  # of the largest pre-activation: the error of floating point
MISSES = np.geomspace(1 - RECALLS[1], 1 - RECALLS[0], 12)
"""Shares of the active neurons missed, for each of which a predictor stores how many deviations to add."""


def rank_of(hidden: int, share: float) -> int:
    """The rank of a predictor for a share of the hidden size; 0 for a share of 0."""
    return min(hidden, math.ceil(share * hidden / _RANK_MULTIPLE) * _RANK_MULTIPLE)


@dataclass(frozen=True)
class Predictor:
    """Predicts which neurons of one MLP are active.

    Attributes:
        basis: of the inputs' subspace, float32, shape (K, H).
        rows: the neurons' weights in it, int8, shape (N, K).
        scale: value of one step of each row, float32, shape (N,).
        deviation: of each pre-activation's part outside the subspace, float32, shape (N,).
        levels: how many deviations to add for each of `MISSES`, float32, shape (L,).
    """

    basis: Tensor
    rows: Tensor
    scale: Tensor
    deviation: Tensor
    levels: Tensor

    @staticmethod
    def size(rank: int, neurons: int, hidden: int) -> int:
        """Bytes of a packed predictor; 0 for rank 0."""
        floats = rank * hidden + 2 * neurons + len(MISSES)
        return 4 * floats + rank * neurons if rank else 0

    @classmethod
    def fit(cls, x_MH: Tensor, weight_NH: Tensor, bias_N: Tensor, rank: int) -> Self:
        """Fit a predictor of an MLP's selecting weights to some of its inputs; all float32.

        With too few inputs the number of deviations is infinite, so that all neurons count as active.
        """
        x_MH = x_MH[x_MH.isfinite().all(1)]
        x_MH = x_MH[:: -(-len(x_MH) // _MOST_TOKENS)] if len(x_MH) else x_MH
        held_out = torch.arange(len(x_MH), device="cpu") % _CALIBRATED_EVERY == _CALIBRATED_EVERY - 1
        basis_KH = torch.zeros(rank, x_MH.shape[1], dtype=torch.float32, device="cpu")
        singular = torch.linalg.svd(x_MH[~held_out], full_matrices=False).Vh[:rank]
        basis_KH[: len(singular)] = singular
        rows, scale, _ = map(torch.from_numpy, sketch_rows(weight_NH @ basis_KH.T))
        estimate_MN = _products(x_MH[held_out], basis_KH, rows, scale) + bias_N
        exact_MN = x_MH[held_out] @ weight_NH.T + bias_N
        active_MN = exact_MN > 0
        if len(exact_MN) < _FEWEST_HELD_OUT or not active_MN.any():
            unknown = torch.full((len(MISSES),), torch.inf, dtype=torch.float32, device="cpu")
            return cls(basis_KH, rows, scale, torch.ones_like(bias_N), unknown)
        error_MN = estimate_MN - exact_MN
        deviation_N = (
            error_MN.square().mean(0).sqrt().clamp_min(_LEAST_DEVIATION * float(exact_MN.abs().amax()))
        )
        short = -(estimate_MN / deviation_N)[active_MN].numpy()
        levels = np.quantile(short, 1 - MISSES).astype(np.float32)
        return cls(basis_KH, rows, scale, deviation_N, torch.from_numpy(levels))

    def estimate(self, x_TH: Tensor) -> Tensor:
        """Pre-activations without bias, of the inputs' part in the subspace, float32, shape (T, N)."""
        return _products(x_TH, self.basis, self.rows, self.scale)

    def deviations(self, recall: float) -> float:
        """The number of deviations to add so that this share of the active neurons is above zero."""
        return float(np.interp(np.log(1 - recall), np.log(MISSES), self.levels.numpy()))

    def pack(self) -> bytes:
        """All arrays as the bytes of a section."""
        floats = (self.basis, self.scale, self.deviation, self.levels)
        return b"".join(part.numpy().tobytes() for part in (*floats, self.rows))

    @classmethod
    def unpack(cls, data: Tensor, rank: int, neurons: int, hidden: int) -> Self:
        """A predictor of views into packed bytes, uint8, shape (`size`,)."""
        sizes = [rank * hidden, neurons, neurons, len(MISSES)]
        numbers, rows = data.split([4 * sum(sizes), rank * neurons])
        basis, scale, deviation, levels = numbers.view(torch.float32).split(sizes)
        return cls(
            basis.view(rank, hidden), rows.view(torch.int8).view(neurons, rank), scale, deviation, levels
        )


def _products(x_TH: Tensor, basis_KH: Tensor, rows_NK: Tensor, scale_N: Tensor) -> Tensor:
    product_TN = torch.empty(len(x_TH), len(rows_NK), dtype=torch.float32, device="cpu")
    IntegerInputs.of(x_TH @ basis_KH.T).products(rows_NK, product_TN)
    return product_TN.mul_(scale_N)
