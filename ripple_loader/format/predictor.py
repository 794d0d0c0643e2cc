"""Low-rank predictors of a ReLU's active neurons: what inputs have in common is computed, the rest is slack.

The inputs of an MLP lie close to a subspace of few dimensions K: the leading right singular vectors of some
of them, taken while tracing, span it. A neuron's pre-activation is w.x + b = w.P x + b + w.(x - P x), with
the projection P; the first part takes K products a neuron instead of H, and the last is small. Its deviation
is measured for each neuron on inputs that did not shape P, and so is how many deviations leave how large a
share of the active neurons out. Deja Vu (arXiv 2310.17157) and LLM in a Flash (arXiv 2312.11514, section 3.1)
train such predictors; this one is closed-form.

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

_HELD_BACK = 4  # every fourth sampled token measures what the others' subspace leaves
_MOST, _FEWEST = 4096, 32  # sampled tokens to fit to, and held back to be sure of what they say
_MULTIPLE = 8  # of which ranks are, for the processor
_LEAST = 1e-6  # of the largest pre-activation: floating point leaves as much
MISSES = np.geomspace(1 - RECALLS[1], 1 - RECALLS[0], 12)
"""Shares of the active neurons left out, for which predictors know their slack."""


def rank_of(hidden: int, share: float) -> int:
    """The rank of a predictor for a share of the hidden size; 0 where the share is."""
    return min(hidden, math.ceil(share * hidden / _MULTIPLE) * _MULTIPLE)


@dataclass(frozen=True)
class Predictor:
    """Predicts which neurons of one MLP are active.

    Attributes:
        basis: of the inputs' subspace, float32, shape (K, H).
        rows: the neurons' weights in it, int8, shape (N, K).
        scale: value of one step of each row, float32, shape (N,).
        deviation: of what it leaves out of each pre-activation, float32, shape (N,).
        levels: how many deviations to add for each of `MISSES`, float32, shape (L,).
    """

    basis: Tensor
    rows: Tensor
    scale: Tensor
    deviation: Tensor
    levels: Tensor

    @staticmethod
    def size(rank: int, neurons: int, hidden: int) -> int:
        """Bytes of a packed one; none for rank 0."""
        floats = rank * hidden + 2 * neurons + len(MISSES)
        return 4 * floats + rank * neurons if rank else 0

    @classmethod
    def fit(cls, x_MH: Tensor, weight_NH: Tensor, bias_N: Tensor, rank: int) -> Self:
        """Of an MLP's selecting weights, from some of its inputs; float32.

        Where the inputs are too few to tell, the slack is infinite, and all neurons are taken to be active.
        """
        x_MH = x_MH[x_MH.isfinite().all(1)]
        x_MH = x_MH[:: -(-len(x_MH) // _MOST)] if len(x_MH) else x_MH
        held_back = torch.arange(len(x_MH), device="cpu") % _HELD_BACK == _HELD_BACK - 1
        basis_KH = torch.zeros(rank, x_MH.shape[1], device="cpu")
        found = torch.linalg.svd(x_MH[~held_back], full_matrices=False).Vh[:rank]
        basis_KH[: len(found)] = found
        rows, scale, _ = map(torch.from_numpy, sketch_rows(weight_NH @ basis_KH.T))
        estimate_MN = _products(x_MH[held_back], basis_KH, rows, scale) + bias_N
        exact_MN = x_MH[held_back] @ weight_NH.T + bias_N
        active_MN = exact_MN > 0
        if len(exact_MN) < _FEWEST or not active_MN.any():
            unknown = torch.full((len(MISSES),), torch.inf, device="cpu")
            return cls(basis_KH, rows, scale, torch.ones(len(rows), device="cpu"), unknown)
        left_MN = estimate_MN - exact_MN
        deviation_N = left_MN.square().mean(0).sqrt().clamp_min(_LEAST * float(exact_MN.abs().amax()))
        short = -(estimate_MN / deviation_N)[active_MN].numpy()
        levels = np.quantile(short, 1 - MISSES).astype(np.float32)
        return cls(basis_KH, rows, scale, deviation_N, torch.from_numpy(levels))

    def estimate(self, x_TH: Tensor) -> Tensor:
        """Pre-activations without bias as the subspace has them, float32, shape (T, N)."""
        return _products(x_TH, self.basis, self.rows, self.scale)

    def deviations(self, recall: float) -> float:
        """How many to add to the estimates so that this share of the active neurons is above zero."""
        return float(np.interp(np.log(1 - recall), np.log(MISSES), self.levels.numpy()))

    def pack(self) -> bytes:
        """What `unpack` takes."""
        floats = (self.basis, self.scale, self.deviation, self.levels)
        return b"".join(part.numpy().tobytes() for part in (*floats, self.rows))

    @classmethod
    def unpack(cls, data: Tensor, rank: int, neurons: int, hidden: int) -> Self:
        """Views of a packed one, uint8, shape (`size`,)."""
        sizes = [rank * hidden, neurons, neurons, len(MISSES)]
        numbers, rows = data.split([4 * sum(sizes), rank * neurons])
        basis, scale, deviation, levels = numbers.view(torch.float32).split(sizes)
        return cls(
            basis.view(rank, hidden), rows.view(torch.int8).view(neurons, rank), scale, deviation, levels
        )


def _products(x_TH: Tensor, basis_KH: Tensor, rows_NK: Tensor, scale_N: Tensor) -> Tensor:
    product_TN = torch.empty(len(x_TH), len(rows_NK), device="cpu")
    IntegerInputs.of(x_TH @ basis_KH.T).products(rows_NK, product_TN)
    return product_TN.mul_(scale_N)
