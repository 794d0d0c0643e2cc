"""Selects neurons by sketches or low-rank predictors.

Dimension key: T tokens, N neurons, H hidden, S rows of a bundle that select.
"""

from __future__ import annotations

import math
from contextlib import closing

import numpy as np
import torch
from torch import Tensor, nn

from ripple_loader.config import RippleConfig
from ripple_loader.format.layout import Vectors
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.format.sketch import IntegerInputs
from ripple_loader.model.lowrank import LowRank
from ripple_loader.online.budget import Allocation
from ripple_loader.online.fetching import Fetcher
from ripple_loader.online.selection import (
    Selection,
    contributions,
    margins,
    select_active,
    select_all,
    select_largest,
    shared_by_neighbours,
)
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import ReadPlan

_ADDITIONS_ROUNDING = 1e-5  # relative; a ReLU's bound must hold for low-rank additions as well


class Selector:
    """Decides which neurons of an MLP some tokens need.

    Args:
        sidecar: the neurons to select among.
        config: `keep`, `recall` and `adjacency`.
        allocation: the number of sketches in memory, or the rank of the predictors.
        vectors: of each MLP: biases, and the scales and errors of its sketch.
        fetcher: reads the sketches that are not in memory; its report records predictors that cannot select.
        selects: whether neurons are selected; if not, every token gets all of them.
    """

    def __init__(
        self,
        sidecar: Sidecar,
        config: RippleConfig,
        allocation: Allocation,
        vectors: list[Vectors],
        fetcher: Fetcher,
        *,
        selects: bool,
    ) -> None:
        self.selects = selects
        self._header, self._config, self._vectors, self._fetcher = sidecar.header, config, vectors, fetcher
        layers = sidecar.header.layers
        self._sketches = [self._read_sketch(layer) for layer in range(allocation.sketch_layers)]
        self._predictors = [sidecar.predictor(layer) for layer in range(layers if allocation.rank else 0)]
        self._deviations = [predictor.deviations(config.recall) for predictor in self._predictors]
        if unsure := sum(map(math.isinf, self._deviations)):
            fetcher.report.fall_back(
                f"{unsure} of {layers} MLPs compute all neurons: the trace had too few tokens to fit "
                "their predictors to"
            )

    @property
    def resident_layers(self) -> int:
        """The number of MLPs, from the first, whose sketches or predictors are in memory."""
        return max(len(self._sketches), len(self._predictors))

    def select(
        self, layer: int, x_TH: Tensor, activation: nn.Module, low_rank: tuple[LowRank, ...] = ()
    ) -> Selection:
        """Select the neurons of a layer for some tokens, by `RippleConfig.keep` or `recall`."""
        if not self.selects:
            return select_all(self._header.neurons)
        score_TN = self.scores(layer, x_TH, activation, low_rank)
        if self._config.keep < 1:
            return select_largest(score_TN, self._config.keep)
        return select_active(score_TN, certain=not self._predictors)

    @torch.no_grad()
    def scores(
        self, layer: int, x_TH: Tensor, activation: nn.Module, low_rank: tuple[LowRank, ...] = ()
    ) -> Tensor:
        """Scores to select by, shape (T, N): estimated contributions, or bounds of a ReLU's input."""
        vectors = self._vectors[layer]
        if self._predictors:
            predictor, deviations = self._predictors[layer], self._deviations[layer]
            likely_TN = predictor.estimate(x_TH.float().cpu()).add_(torch.from_numpy(vectors.bias[0]))
            likely_TN = _with_additions(likely_TN, 0, low_rank, x_TH)
            return likely_TN.add_(predictor.deviation, alpha=deviations)
        inputs = IntegerInputs.of(x_TH.float().cpu())
        estimates = [
            _with_additions(estimate_TN, row, low_rank, x_TH)
            for row, estimate_TN in enumerate(self._estimate(layer, inputs))
        ]
        if self._config.keep < 1:
            score_TN = contributions(estimates, activation)
            return shared_by_neighbours(score_TN, self._config.adjacency, self._header.hot[layer])
        error_N, scale_N = torch.from_numpy(vectors.error[0]), torch.from_numpy(vectors.scale[0])
        return margins(estimates[0], error_N, scale_N, inputs)

    def _estimate(self, layer: int, inputs: IntegerInputs) -> list[Tensor]:
        """The selecting projections by the sketch: S tensors, float32, shape (T, N)."""
        S, N = self._header.rows - 1, self._header.neurons
        estimate = torch.empty(len(inputs.norm), S * N, dtype=torch.float32, device="cpu")
        if layer < len(self._sketches):
            inputs.products(self._sketches[layer], estimate)
        else:
            reads = self._fetcher.read(layer, "sketch", np.arange(S * N), self._header.hidden)
            with closing(reads):
                for plan, buffer in reads:
                    part = estimate[:, plan.places[0] : plan.places[-1] + 1]
                    inputs.products(self._sketch_rows(plan, buffer), part)
        vectors = self._vectors[layer]
        scaled = (
            estimate.view(-1, S, N).mul_(torch.from_numpy(vectors.scale)).add_(torch.from_numpy(vectors.bias))
        )
        return list(scaled.unbind(1))

    def _read_sketch(self, layer: int) -> Tensor:
        """All sketched rows of a layer: int8, shape (S * N, H)."""
        rows, hidden = (self._header.rows - 1) * self._header.neurons, self._header.hidden
        sketch = torch.empty(rows, hidden, dtype=torch.int8)
        with closing(self._fetcher.read(layer, "sketch", np.arange(rows), hidden)) as reads:
            for plan, buffer in reads:
                sketch[plan.places[0] : plan.places[-1] + 1] = self._sketch_rows(plan, buffer)
        return sketch

    def _sketch_rows(self, plan: ReadPlan, buffer: AlignedBuffer) -> Tensor:
        shape = (len(plan.places), self._header.hidden)
        return buffer.bytes.view(torch.int8).as_strided(shape, (self._header.hidden, 1), int(plan.spots[0]))


def _with_additions(estimate_TN: Tensor, row: int, low_rank: tuple[LowRank, ...], x_TH: Tensor) -> Tensor:
    """An estimated projection with its low-rank additions, which are exact up to float32's rounding."""
    for addition in low_rank:
        if addition.row == row:
            added_TN = addition.on_neurons(x_TH).float().cpu()
            estimate_TN = estimate_TN + added_TN + _ADDITIONS_ROUNDING * added_TN.abs()
    return estimate_TN
