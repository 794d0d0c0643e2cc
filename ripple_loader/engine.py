"""The online stage: select, fetch, and compute with neurons, MLP by MLP, within the DRAM budget.

Dimension key: T tokens, N neurons, U of them in a batch, R rows of a bundle, S = R - 1 rows that select, H
hidden.
"""

from __future__ import annotations

import functools
import math
import threading
import time
from collections.abc import Callable
from contextlib import closing

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ripple_loader.access import Places, ReadPlan
from ripple_loader.budget import BUFFERS, Allocation, allocate, needs_sketch
from ripple_loader.bundles import Sidecar, unpack_bundles
from ripple_loader.config import RippleConfig
from ripple_loader.drive import Meter
from ripple_loader.fetching import Fetcher, Pace
from ripple_loader.probe import known_drive
from ripple_loader.reader import AlignedBuffer, Reader
from ripple_loader.report import RippleReport
from ripple_loader.selection import (
    IntegerInputs,
    Selection,
    contributions,
    margins,
    select_active,
    select_all,
    select_largest,
    shared_by_neighbours,
)
from ripple_loader.sidecar import Vectors
from ripple_loader.strategy import expect


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
        self.sidecar, self.config, self.header, self.dtype = sidecar, config, header, dtype
        self._lock = threading.Lock()
        self._unfinished = False  # set while computing, and left so by an error or Ctrl-C
        self._foreseen: tuple[int, Places] | None = None
        if config.verify:
            sidecar.verify()
        self.allocation = allocate(header, config, dtype)
        self.report = RippleReport(
            directory=str(sidecar.path.parent),
            layers=header.layers // (header.experts or 1),
            neurons=header.neurons,
            budget=self.allocation.budget,
        )
        reader = Reader(sidecar.path, config.queue_depth, self.report, config.io_engine)
        with torch.device("cpu"):  # transformers builds the skeleton, and so this, under the meta device
            buffers = [AlignedBuffer(self.allocation.buffer) for _ in range(BUFFERS)]
            model = known_drive(reader)
            undecided = config.strategy == "auto" and needs_sketch(header, config)
            pace = measure_pace(sidecar, self.allocation, dtype, buffers) if undecided else Pace()
            self._meter = Meter(model)
            self.selects = self._decide(pace, reader.block)
            self.allocation = allocate(header, config, dtype, selective=self.selects)
            self.report.resident = self.allocation.resident
            self.report.cache_slots = self.allocation.cache_slots
            self.report.drive = model.summary()
            reader.meter = self._meter
            self._fetcher = Fetcher(
                sidecar,
                config,
                self.allocation,
                dtype,
                reader,
                buffers,
                self._meter,
                pace,
                whole=not self.selects,
            )
            self._vectors = [self._read_vectors(layer) for layer in range(header.layers)]
            self._biased = [bool(vectors.bias.any()) for vectors in self._vectors]
            self._sketches = [self._read_sketch(layer) for layer in range(self.allocation.sketch_layers)]
            held = range(header.layers if self.allocation.rank else 0)
            self._predictors = [sidecar.predictor(layer) for layer in held]
            self._deviations = [predictor.deviations(config.recall) for predictor in self._predictors]
        if unsure := sum(map(math.isinf, self._deviations)):
            self.report.fall_back(
                f"{unsure} of {header.layers} MLPs compute all neurons: the trace had too few tokens to fit "
                "their predictors to"
            )
        self.report.reset()

    def _decide(self, pace: Pace, block: int) -> bool:
        """Whether neurons are selected; says why in the report."""
        header, config = self.header, self.config
        share = config.keep if config.keep < 1 else header.profile.get("activity")
        if not needs_sketch(header, config):
            self.report.strategy = "reads all neurons, in order: `keep` is 1"
        elif config.strategy != "auto":
            self.report.strategy = f"{config.strategy}, as `strategy` says"
        elif share is None:
            self.report.strategy = "selects neurons: how many are active is not known beforehand"
        else:
            dense = allocate(header, config, self.dtype, selective=False)
            expected = expect(
                header, dense, self.allocation, self._meter.model, pace, block=block, share=float(share)
            )
            self.report.strategy = expected.summary()
            return expected.selects
        return needs_sketch(header, config) and config.strategy != "dense"

    @property
    def drive_factors(self) -> tuple[float, float]:
        """By how much requests and bytes cost more at present than the drive's model says."""
        return self._meter.factors

    def _read_vectors(self, layer: int) -> Vectors:
        offset, size = self.sidecar.section(layer, "vectors")
        data = np.fromfile(self.sidecar.path, np.uint8, size, offset=offset)
        return Vectors.unpack(data.data, self.header.rows, self.header.neurons, self.header.hidden)

    def _read_sketch(self, layer: int) -> Tensor:
        """All sketched rows of a layer: int8, shape (S * N, H)."""
        rows = self._sketched
        sketch = torch.empty(rows, self.header.hidden, dtype=torch.int8)
        with closing(self._fetcher.read(layer, "sketch", np.arange(rows), self.header.hidden)) as reads:
            for plan, buffer in reads:
                sketch[plan.places[0] : plan.places[-1] + 1] = self._sketch_rows(plan, buffer)
        return sketch

    @property
    def _sketched(self) -> int:
        return (self.header.rows - 1) * self.header.neurons

    def bias(self, layer: int, row: int) -> Tensor:
        """A projection's bias, float32: of a row that selects (N,), or of the last row, the output (H,)."""
        vectors = self._vectors[layer]
        return torch.from_numpy(vectors.down_bias if row == self.header.rows - 1 else vectors.bias[row])

    def select(self, layer: int, x_TH: Tensor, activation: nn.Module) -> Selection:
        """Which neurons of a layer some tokens need, as `RippleConfig.keep` has it."""
        if not self.selects:
            return select_all(self.header.neurons)
        score_TN = self._scores(layer, x_TH, activation)
        if self.config.keep < 1:
            return select_largest(score_TN, self.config.keep)
        return select_active(score_TN, certain=not self._predictors)

    def _scores(self, layer: int, x_TH: Tensor, activation: nn.Module) -> Tensor:
        """What neurons are selected by, (T, N): estimated contributions, or bounds of a ReLU's input."""
        vectors = self._vectors[layer]
        if self._predictors:
            predictor, deviations = self._predictors[layer], self._deviations[layer]
            likely_TN = predictor.estimate(x_TH.float().cpu()).add_(torch.from_numpy(vectors.bias[0]))
            return likely_TN.add_(predictor.deviation, alpha=deviations)
        inputs = IntegerInputs.of(x_TH.float().cpu())
        estimates = self._estimate(layer, inputs)
        if self.config.keep < 1:
            score_TN = contributions(estimates, activation)
            return shared_by_neighbours(score_TN, self.config.adjacency, self.header.hot[layer])
        error_N, scale_N = torch.from_numpy(vectors.error[0]), torch.from_numpy(vectors.scale[0])
        return margins(estimates[0], error_N, scale_N, inputs)

    def _estimate(self, layer: int, inputs: IntegerInputs) -> list[Tensor]:
        """What the sketch makes of each selecting projection: S tensors, float32, shape (T, N)."""
        S, N = self.header.rows - 1, self.header.neurons
        estimate = torch.empty(len(inputs.norm), S * N, device="cpu")
        if layer < len(self._sketches):
            inputs.products(self._sketches[layer], estimate)
        else:
            reads = self._fetcher.read(layer, "sketch", np.arange(S * N), self.header.hidden)
            with closing(reads):
                for plan, buffer in reads:
                    part = estimate[:, plan.places[0] : plan.places[-1] + 1]
                    inputs.products(self._sketch_rows(plan, buffer), part)
        vectors = self._vectors[layer]
        scaled = (
            estimate.view(-1, S, N).mul_(torch.from_numpy(vectors.scale)).add_(torch.from_numpy(vectors.bias))
        )
        return list(scaled.unbind(1))

    def _sketch_rows(self, plan: ReadPlan, buffer: AlignedBuffer) -> Tensor:
        shape = (len(plan.places), self.header.hidden)
        return buffer.bytes.view(torch.int8).as_strided(shape, (self.header.hidden, 1), int(plan.spots[0]))

    def begin(self, tokens: int) -> None:
        """Count the tokens of a forward call."""
        with self._lock:
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
        last = self.header.rows - 1
        selection = self.select(layer, x_TH, activation)
        self._count_foreseen(layer, selection.places)
        then = functools.partial(self._look_ahead, layer, following, selection, x_TH, activation)
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        with closing(self._fetcher.fetch(layer, selection.places, then)) as batches:
            for batch in batches:
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
                y_TH += a_TU @ down_UH
        return (y_TH + self.bias(layer, last).to(y_TH.device)).to(x_TH.dtype)

    def _look_ahead(
        self, layer: int, following: int | None, selection: Selection, x_TH: Tensor, activation: nn.Module
    ) -> None:
        """Start reading what the next MLP will want: all of it after one that wants all, else what this one's
        input would select there, as far as the drive would be idle.
        """
        if following is None:
            return
        count = len(selection.places)
        if count == self.header.neurons:
            self._fetcher.read_ahead(following, np.arange(count))
        elif (
            self.config.prefetch
            and len(x_TH) == 1
            and layer < following < max(len(self._sketches), len(self._predictors))
        ):  # the next token's first MLP cannot be foreseen
            score_N = self._scores(following, x_TH, activation)[0]
            best = score_N.topk(count).indices.numpy()
            self._foreseen = following, best
            self._fetcher.read_ahead(following, self._fetcher.most_ahead(following, best))

    def _count_foreseen(self, layer: int, places: Places) -> None:
        if self._foreseen is not None and self._foreseen[0] == layer:
            self.report.asked += len(places)
            self.report.foreseen += len(np.intersect1d(places, self._foreseen[1], assume_unique=True))
        self._foreseen = None


def measure_pace(
    sidecar: Sidecar, allocation: Allocation, dtype: torch.dtype, buffers: list[AlignedBuffer]
) -> Pace:
    """What this processor needs to compute with neurons, to gather them, and to select them, for one token.

    Args:
        sidecar: whose sizes and encoding count; nothing is read of it.
        allocation: how many neurons are computed with at once.
        dtype: the model's.
        buffers: memory to do it in.
    """
    header, rows = sidecar.header, allocation.rows
    width, H = header.bundle_bytes, header.hidden
    x_1H, index = torch.ones(1, H, dtype=dtype), torch.arange(rows)
    stored = buffers[0].bytes[: rows * width].view(rows, width)
    gathered = buffers[1].bytes[: rows * width].view(rows, width)
    width_K = allocation.rank or H
    sketched = allocation.buffer // width_K
    integers = buffers[2].bytes[: width_K * sketched].view(torch.int8).view(sketched, width_K)
    estimates = torch.empty(1, sketched)

    def compute() -> Tensor:
        *selecting, down_UH = unpack_bundles(stored, header, dtype).unbind(1)
        return sum((F.linear(x_1H, weight_UH) for weight_UH in selecting), torch.zeros(())) @ down_UH

    basis_KH = torch.zeros(allocation.rank, H, device="cpu")

    def select() -> None:
        x = x_1H.float() @ basis_KH.T if allocation.rank else x_1H.float()
        IntegerInputs.of(x).products(integers, estimates)

    return Pace(
        compute=_seconds(compute) / rows,
        gather=_seconds(lambda: torch.index_select(stored, 0, index, out=gathered)) / rows,
        select=_seconds(select) / sketched * (1 if allocation.rank else header.rows - 1) * header.neurons,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The best time of a few runs."""
    times = []
    for _ in range(4):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
