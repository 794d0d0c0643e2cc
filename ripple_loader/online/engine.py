"""The online stage: select, fetch, and compute with neurons, MLP by MLP, within the DRAM budget.

Dimension key: T tokens, N neurons, U of them in a batch, H hidden.
"""

from __future__ import annotations

import functools
import threading
from contextlib import closing

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ripple_loader.config import RippleConfig
from ripple_loader.format.layout import Vectors
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.online.budget import BUFFERS, allocate, needs_sketch
from ripple_loader.online.fetching import Batch, Fetcher
from ripple_loader.online.pace import Pace, measure_pace
from ripple_loader.online.selection import Selection
from ripple_loader.online.selector import Selector
from ripple_loader.online.strategy import decide
from ripple_loader.report import RippleReport
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import Places
from ripple_loader.storage.meter import Meter
from ripple_loader.storage.probing import known_drive
from ripple_loader.storage.reader import Reader


class Engine:
    """Everything that the streaming MLPs of one model share; computes one MLP at a time.

    Args:
        sidecar: the neurons to stream.
        config: the budget and how to spend it.
        dtype: the model's.

    Raises:
        ValueError: the budget is too small, or the sidecar is damaged.
    """

    def __init__(self, sidecar: Sidecar, config: RippleConfig, dtype: torch.dtype) -> None:
        header = sidecar.header
        self.sidecar, self.config, self.header = sidecar, config, header
        self._lock = threading.Lock()
        self._unfinished = False  # true while computing, and after an error or Ctrl-C
        self._foreseen: tuple[int, Places] | None = None
        if config.verify:
            sidecar.verify()
        allocation = allocate(header, config, dtype)
        self.report = RippleReport(
            directory=str(sidecar.path.parent),
            layers=header.layers // (header.experts or 1),
            neurons=header.neurons,
            budget=allocation.budget,
        )
        reader = Reader(sidecar.path, config.queue_depth, self.report, config.io_engine)
        with torch.device("cpu"):  # transformers calls this with the meta device as default
            buffers = [AlignedBuffer(allocation.buffer) for _ in range(BUFFERS)]
            drive = known_drive(reader)
            undecided = config.strategy == "auto" and needs_sketch(header, config)
            pace = measure_pace(header, allocation, dtype, buffers) if undecided else Pace()
            selects, reason = decide(header, config, dtype, drive, pace, block=reader.block)
            self.allocation = allocate(header, config, dtype, selective=selects)
            self._describe(drive.summary(), reason)
            self._meter = reader.meter = Meter(drive)
            self._fetcher = Fetcher(
                sidecar, config, self.allocation, dtype, reader, buffers, self._meter, pace, whole=not selects
            )
            self._vectors = [sidecar.vectors(layer) for layer in range(header.layers)]
            self._biased = [bool(vectors.bias.any()) for vectors in self._vectors]
            self.selector = Selector(
                sidecar, config, self.allocation, self._vectors, self._fetcher, selects=selects
            )
        self.report.reset()

    def _describe(self, drive: str, strategy: str) -> None:
        """Record the memory held and the decisions in the report."""
        self.report.resident, self.report.cache_slots = self.allocation.resident, self.allocation.cache_slots
        self.report.drive, self.report.strategy = drive, strategy

    @property
    def selects(self) -> bool:
        """Whether neurons are selected; if not, all are read in order."""
        return self.selector.selects

    def bias(self, layer: int, row: int) -> Tensor:
        """A projection's bias, float32: of a row that selects (N,), or of the last row, the output (H,)."""
        vectors: Vectors = self._vectors[layer]
        return torch.from_numpy(vectors.down_bias if row == self.header.rows - 1 else vectors.bias[row])

    def begin(self, tokens: int) -> None:
        """Count the tokens of a new forward call."""
        with self._lock:
            self.report.calls += 1
            self.report.tokens += tokens
            self._fetcher.pause()

    def compute(self, layer: int, x_TH: Tensor, activation: nn.Module, following: int | None) -> Tensor:
        """An MLP's output for T tokens, shape (T, H), batch by batch of neurons as they arrive.

        Args:
            layer: which MLP.
            x_TH: its input.
            activation: the model's own.
            following: the MLP that runs next, if it is known; its reads start while this one computes.
        """
        with self._lock:
            if self._unfinished:
                self._fetcher.reset()
            self._unfinished = True
            y_TH = self._compute(layer, x_TH, activation, following)
            self._unfinished = False
            return y_TH

    def _compute(self, layer: int, x_TH: Tensor, activation: nn.Module, following: int | None) -> Tensor:
        selection = self.selector.select(layer, x_TH, activation)
        self._count_foreseen(layer, selection.places)
        then = functools.partial(self._look_ahead, layer, following, selection, x_TH, activation)
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        with closing(self._fetcher.fetch(layer, selection.places, then)) as batches:
            for batch in batches:
                y_TH += self._product(layer, batch, selection, x_TH, activation)
        return (y_TH + self.bias(layer, self.header.rows - 1).to(y_TH.device)).to(x_TH.dtype)

    def _product(
        self, layer: int, batch: Batch, selection: Selection, x_TH: Tensor, activation: nn.Module
    ) -> Tensor:
        """The contribution of a batch of neurons to the output, shape (T, H)."""
        *selecting, down_UH = batch.rows.to(x_TH.device).unbind(1)
        places = torch.from_numpy(batch.places)
        factors = [
            F.linear(x_TH, weight_UH, self.bias(layer, row)[places].to(x_TH))
            if self._biased[layer]
            else F.linear(x_TH, weight_UH)
            for row, weight_UH in enumerate(selecting)
        ]
        a_TU = activation(factors[0])
        for factor_TU in factors[1:]:
            a_TU = a_TU * factor_TU
        if batch.wanted is not None:
            a_TU = a_TU * torch.from_numpy(batch.wanted).to(a_TU.device)
        if selection.mask is not None and len(x_TH) > 1:
            a_TU = a_TU * selection.mask[:, places].to(a_TU.device)
        return a_TU @ down_UH

    def _look_ahead(
        self, layer: int, following: int | None, selection: Selection, x_TH: Tensor, activation: nn.Module
    ) -> None:
        """Start reading for the next MLP: all neurons after an MLP that needed all, else those that this
        input would select there, as many as the drive can read while it would be idle.
        """
        if following is None:
            return
        count = len(selection.places)
        if count == self.header.neurons:
            self._fetcher.read_ahead(following, np.arange(count))
        elif (
            self.config.prefetch and len(x_TH) == 1 and layer < following < self.selector.resident_layers
        ):  # the next token's first MLP cannot be predicted
            score_N = self.selector.scores(following, x_TH, activation)[0]
            best = score_N.topk(count).indices.numpy()
            self._foreseen = following, best
            self._fetcher.read_ahead(following, self._fetcher.most_ahead(following, best))

    def _count_foreseen(self, layer: int, places: Places) -> None:
        if self._foreseen is not None and self._foreseen[0] == layer:
            self.report.asked += len(places)
            self.report.foreseen += len(np.intersect1d(places, self._foreseen[1], assume_unique=True))
        self._foreseen = None
