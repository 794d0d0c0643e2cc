"""What batches of neurons add to an MLP's output: from their stored bytes, or decoded in working memory.

Dimension key: T tokens, N neurons, U of them in a batch, R rows of a bundle, S those that select, H hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ripple_loader.format.layout import SidecarHeader, Vectors
from ripple_loader.kernels.bundles import MOST_TOKENS, StoredProducts, stored_products
from ripple_loader.model.lowrank import LowRank, added_to
from ripple_loader.online.fetching import Batch
from ripple_loader.online.scratch import Scratch
from ripple_loader.report import RippleReport

_MOST_TOKENS_DECODED = 4 * MOST_TOKENS  # four passes still take half the time of decoding
_SUMMED_IN_FLOAT32 = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Inputs:
    """What an MLP is called with.

    Attributes:
        layer: which MLP.
        x: its input, shape (T, H).
        activation: the model's own.
        low_rank: additions to its projections.
        mask: which neurons each token selects, shape (T, N); None if all tokens take all that are fetched.
    """

    layer: int
    x: Tensor
    activation: nn.Module
    low_rank: tuple[LowRank, ...]
    mask: Tensor | None

    @functools.cached_property
    def x_float32(self) -> Tensor:
        """The input for products with stored neurons."""
        return self.x.float().contiguous()


def compiled_products(
    header: SidecarHeader, dtype: torch.dtype, report: RippleReport
) -> StoredProducts | None:
    """Products with stored bundles, which are in float32.

    None for a model of another dtype and, with a note in the report, where they cannot be compiled.
    """
    if dtype not in _SUMMED_IN_FLOAT32:
        return None
    try:
        return stored_products(header.dtype, header.row_bytes, header.hidden, header.rows - 1)
    except OSError as error:
        report.fall_back(f"neurons are decoded before they are computed with, which is slower: {error}")
        return None


class Products:
    """Computes with the neurons that a `Fetcher` hands out.

    Args:
        header: of their sidecar.
        vectors: the biases of each MLP.
        scratch: where neurons are decoded.
        stored: products with neurons as they are stored, if this processor has them.
    """

    def __init__(
        self, header: SidecarHeader, vectors: list[Vectors], scratch: Scratch, stored: StoredProducts | None
    ) -> None:
        self._vectors, self._scratch, self._stored = vectors, scratch, stored
        self._encoding, self._down = header.encoding, header.rows - 1
        self._biased = [bool(one.bias.any()) for one in vectors]

    def bias(self, layer: int, row: int) -> Tensor:
        """A projection's bias, float32: of a row that selects (N,), or of the last row, the output (H,)."""
        vectors = self._vectors[layer]
        return torch.from_numpy(vectors.down_bias if row == self._down else vectors.bias[row])

    def add(self, y_TH: Tensor, batch: Batch, inputs: Inputs) -> None:
        """Add what a batch contributes to `y_TH`, which is in float32, or in float64 for such inputs."""
        if self._stored is None or not self._few(inputs.x):
            for part_TH in self.decoded(batch, inputs):
                y_TH += part_TH
            return
        batch = batch.without_gaps()
        places = torch.from_numpy(batch.places)
        factors_STU = self._stored.project(batch.memory, batch.offsets, inputs.x_float32)
        for row, factor_TU in enumerate(factors_STU if self._biased[inputs.layer] else ()):
            factor_TU += self.bias(inputs.layer, row)[places]
        a_TU = self._activated(list(factors_STU), places, inputs)
        self._stored.accumulate(batch.memory, batch.offsets, a_TU.float().contiguous(), y_TH)
        for part_TH in self._low_rank(a_TU, places, inputs):
            y_TH += part_TH

    def _few(self, x_TH: Tensor) -> bool:
        """Whether products with stored neurons are faster than decoding these and a library's product."""
        most = MOST_TOKENS if self._encoding.stores(x_TH.dtype) else _MOST_TOKENS_DECODED
        return len(x_TH) <= most and x_TH.device.type == "cpu"

    def decoded(self, batch: Batch, inputs: Inputs) -> Iterator[Tensor]:
        """What parts of a batch contribute, each of shape (T, H); gradients flow to the inputs."""
        x_TH = inputs.x
        for numbers, rows_URH, wanted in self._scratch.decoded(batch):
            *selecting, down_UH = rows_URH.to(x_TH.device).unbind(1)
            places = torch.from_numpy(numbers)
            factors = []
            for row, weight_UH in enumerate(selecting):
                biased = self._biased[inputs.layer]
                bias_U = self.bias(inputs.layer, row)[places].to(x_TH) if biased else None
                factors.append(F.linear(x_TH, weight_UH, bias_U))
            a_TU = self._activated(factors, places, inputs)
            if wanted is not None:
                a_TU = a_TU * torch.from_numpy(wanted).to(a_TU.device)
            y_TH = a_TU @ down_UH
            for part_TH in self._low_rank(a_TU, places, inputs):
                y_TH = y_TH + part_TH
            yield y_TH

    def _activated(self, factors: Sequence[Tensor], places: Tensor, inputs: Inputs) -> Tensor:
        """Neurons, shape (T, U), from their projections."""
        factors = [
            added_to(factor_TU, row, inputs.low_rank, inputs.x, places)
            for row, factor_TU in enumerate(factors)
        ]
        a_TU: Tensor = inputs.activation(factors[0])
        for factor_TU in factors[1:]:
            a_TU = a_TU * factor_TU
        if inputs.mask is not None and len(inputs.x) > 1:
            a_TU = a_TU * inputs.mask[:, places].to(a_TU.device)
        return a_TU

    def _low_rank(self, a_TU: Tensor, places: Tensor, inputs: Inputs) -> Iterator[Tensor]:
        """What neurons add to the output through adapters of the last row."""
        for addition in inputs.low_rank:
            if addition.row == self._down:
                yield addition.of_neurons(a_TU, places)
