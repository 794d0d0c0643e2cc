"""The online stage: select, fetch, and compute with neurons, MLP by MLP, within the DRAM budget.

Dimension key: T tokens, N neurons, U of them in a batch, H hidden.
"""

from __future__ import annotations

import functools
import os
import threading
import weakref
from contextlib import closing
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ripple_loader.checkpoint.hub import base_directory
from ripple_loader.checkpoint.mapped import StoredWeights
from ripple_loader.config import RippleConfig
from ripple_loader.format.layout import SIDECAR
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.lowrank import LowRank, tensors_of, with_tensors
from ripple_loader.online.budget import BUFFERS, allocate, needs_sketch
from ripple_loader.online.fetching import Fetcher
from ripple_loader.online.pace import Pace, measure_pace
from ripple_loader.online.products import Inputs, Products, compiled_products
from ripple_loader.online.scratch import Scratch
from ripple_loader.online.selection import Selection
from ripple_loader.online.selector import Selector
from ripple_loader.online.strategy import decide
from ripple_loader.report import RippleReport
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import Places
from ripple_loader.storage.meter import Meter
from ripple_loader.storage.probing import known_drive
from ripple_loader.storage.reader import Reader

_ENGINES: weakref.WeakSet[Engine] = weakref.WeakSet()


def _after_fork() -> None:
    for engine in _ENGINES:
        engine.after_fork()


os.register_at_fork(after_in_child=_after_fork)


class Engine:
    """Everything that the streaming MLPs of one model share; computes one MLP at a time.

    A copy, by `copy.deepcopy` or pickle, opens the directory again, with a budget of its own. So does a
    forked child, when it computes for the first time, because threads and the kernel's queues stay with the
    parent.

    Args:
        sidecar: the neurons to stream.
        config: the budget and how to spend it.
        dtype: the model's; inputs of another dtype are computed with in theirs from then on.

    Raises:
        ValueError: the budget is too small, or the sidecar is damaged.
    """

    def __init__(self, sidecar: Sidecar, config: RippleConfig, dtype: torch.dtype) -> None:
        if config.verify:
            sidecar.verify()
        report = RippleReport(
            directory=str(sidecar.path.parent),
            layers=sidecar.header.layers // (sidecar.header.experts or 1),
            neurons=sidecar.header.neurons,
            budget=0,
        )
        self._begin(sidecar, config, dtype, report, None)

    def _begin(
        self,
        sidecar: Sidecar,
        config: RippleConfig,
        dtype: torch.dtype,
        report: RippleReport,
        strategy: tuple[bool, str] | None,
    ) -> None:
        self.sidecar, self.config, self.header, self.report = sidecar, config, sidecar.header, report
        self._strategy = strategy
        self._lock = threading.Lock()
        self._unfinished = False  # true while computing, and after an error or Ctrl-C
        self._weights: StoredWeights | None = None
        self._open(dtype)
        self.report.reset()
        _ENGINES.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {
            "directory": self.sidecar.path.parent,
            "header": self.header,
            "config": self.config,
            "dtype": self._dtype,
            "report": self.report,
            "strategy": self._strategy,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        sidecar = Sidecar(state["directory"])
        if sidecar.header != state["header"]:
            raise ValueError(f"{sidecar.path} must be as it was when the model was copied, but was replaced.")
        self._begin(sidecar, state["config"], state["dtype"], state["report"], state["strategy"])

    def after_fork(self) -> None:
        """In a forked child: no thread that held the lock runs here, and the reader is the parent's."""
        self._lock = threading.Lock()
        self._stale = True

    @torch.inference_mode(False)
    def _open(self, dtype: torch.dtype) -> None:
        """Take the memory, the threads and the file, after giving up those held before."""
        header, config = self.header, self.config
        for held in ("_fetcher", "selector", "_meter", "_products"):
            self.__dict__.pop(held, None)
        self._dtype, self._stale, self._unfinished = dtype, False, False
        self._foreseen: tuple[int, Places] | None = None
        self._places: dict[int, Tensor] = {}
        allocation = allocate(header, config, dtype)
        self.report.budget, self.report.pinned = allocation.budget, 0
        reader = Reader(self.sidecar.path, config.queue_depth, self.report, config.io_engine)
        with torch.device("cpu"):  # transformers calls this with the meta device as default
            buffers = [AlignedBuffer(allocation.buffer) for _ in range(BUFFERS)]
            drive = known_drive(reader)
            undecided = self._strategy is None and config.strategy == "auto" and needs_sketch(header, config)
            stored = compiled_products(header, dtype, self.report)
            pace = measure_pace(header, allocation, dtype, buffers, stored) if undecided else Pace()
            if self._strategy is None:  # a copy must select as the original does
                self._strategy = decide(header, config, dtype, drive, pace, block=reader.block)
            selects, reason = self._strategy
            self.allocation = allocate(header, config, dtype, selective=selects)
            self._describe(drive.summary(), reason)
            self._meter = reader.meter = Meter(drive)
            self._fetcher = Fetcher(
                self.sidecar,
                config,
                self.allocation,
                reader,
                buffers,
                self._meter,
                pace,
                whole=not selects,
            )
            vectors = [self.sidecar.vectors(layer) for layer in range(header.layers)]
            scratch = Scratch(header, self.allocation, dtype, self.report)
            self._products = Products(header, vectors, scratch, stored)
            self.selector = Selector(
                self.sidecar, config, self.allocation, vectors, self._fetcher, selects=selects
            )

    def _ready(self, dtype: torch.dtype) -> None:
        """Open anew in a forked child, and for inputs of another dtype; recover after an error."""
        if self._stale or dtype != self._dtype:
            self._open(dtype)
        elif self._unfinished:
            self._fetcher.reset()

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
        return self._products.bias(layer, row)

    def begin(self, tokens: int, layers: int) -> None:
        """Count the tokens of a new forward call of a stack of layers."""
        with self._lock:
            self.report.calls += 1
            self.report.layer_calls += layers
            self.report.tokens += tokens
            self._fetcher.pause()

    def permutation(self, layer: int) -> Tensor:
        """The model's own index of the neuron at each place, int64, shape (N,); held from then on."""
        if layer not in self._places:
            self._places[layer] = torch.from_numpy(self.sidecar.permutation(layer)).long()
        return self._places[layer]

    def is_own(self, base: str) -> bool:
        """Whether an adapter's base holds the permuted weight files that are streamed, here or copied.

        Raises:
            FileNotFoundError: it is a directory that is gone, so that its order of neurons is unknown.
        """
        if self.header.in_original_order:
            return False
        directory = base_directory(base)
        if directory is None:
            self.report.fall_back(
                f"an adapter's base, {base}, is neither a directory nor in the cache of the hub: its order "
                "of neurons is taken for the original model's, as it is unless the base is a reordered copy"
            )
            return False
        if not (directory / SIDECAR).is_file():
            return False
        return Sidecar(directory).header.files == self.header.files

    def file_order(self, layer: int) -> Tensor:
        """The model's own index of the neuron at each place in the weight files, int64, shape (N,)."""
        if self.header.in_original_order:
            return torch.arange(self.header.neurons, device="cpu")
        return self.permutation(layer)

    @property
    def _stored(self) -> StoredWeights:
        if self._weights is None:
            self.sidecar.check_weights()
            self._weights = StoredWeights(self.sidecar.path.parent)
        return self._weights

    def stored(self, layer: int) -> dict[tuple[str, str], Tensor]:
        """The weights of an MLP, mapped from the directory's weight files."""
        return self._stored.linears(layer)

    def stored_as(self, first: int, count: int) -> dict[str, Tensor]:
        """The tensors of some MLPs by the checkpoint's own names, from behind the layer's number."""
        return self._stored.named(first, count)

    def compute(
        self,
        layer: int,
        x_TH: Tensor,
        activation: nn.Module,
        following: int | None,
        low_rank: tuple[LowRank, ...] = (),
    ) -> Tensor:
        """An MLP's output for T tokens, shape (T, H), batch by batch of neurons as they arrive.

        Args:
            layer: which MLP.
            x_TH: its input.
            activation: the model's own.
            following: the MLP that runs next, if it is known; its reads start while this one computes.
            low_rank: additions to its projections.
        """
        with self._lock:
            self._ready(x_TH.dtype)
            self._unfinished = True
            y_TH = self._compute(layer, x_TH, activation, following, low_rank)
            self._unfinished = False
            return y_TH

    def _compute(
        self,
        layer: int,
        x_TH: Tensor,
        activation: nn.Module,
        following: int | None,
        low_rank: tuple[LowRank, ...],
    ) -> Tensor:
        selection = self.selector.select(layer, x_TH, activation, low_rank)
        self._count_foreseen(layer, selection.places)
        then = functools.partial(self._look_ahead, layer, following, selection, x_TH, activation)
        y_TH = torch.zeros_like(x_TH, dtype=_summed_in(x_TH))
        inputs = Inputs(layer, x_TH, activation, low_rank, selection.mask)
        with closing(self._fetcher.fetch(layer, selection.places, then)) as batches:
            for batch in batches:
                self._products.add(y_TH, batch, inputs)
        return (y_TH + self.bias(layer, self.header.rows - 1).to(y_TH.device)).to(x_TH.dtype)

    def gradients(
        self, layer: int, x_TH: Tensor, activation: nn.Module, low_rank: tuple[LowRank, ...], grad_TH: Tensor
    ) -> list[Tensor]:
        """Gradients of an MLP's input and of the tensors of `low_rank`; streams the neurons once more.

        Args:
            layer: which MLP.
            x_TH: its input, for which the same neurons are selected as before.
            activation: the model's own.
            low_rank: additions to its projections.
            grad_TH: the gradient of its output.
        """
        with self._lock:
            self._ready(x_TH.dtype)
            self._unfinished = True
            selection = self.selector.select(layer, x_TH, activation, low_rank)
            leaves = [leaf.detach().requires_grad_() for leaf in (x_TH, *tensors_of(low_rank))]
            additions = with_tensors(low_rank, leaves[1:])
            inputs = Inputs(layer, leaves[0], activation, additions, selection.mask)
            sums = [torch.zeros_like(leaf, dtype=_summed_in(leaf)) for leaf in leaves]
            with closing(self._fetcher.fetch(layer, selection.places)) as batches, torch.enable_grad():
                for batch in batches:
                    for y_TH in self._products.decoded(batch, inputs):
                        _add_gradients(sums, y_TH, leaves, grad_TH)
            self._unfinished = False
            return [total.to(leaf.dtype) for total, leaf in zip(sums, leaves, strict=True)]

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


def _add_gradients(sums: list[Tensor], y_TH: Tensor, leaves: list[Tensor], grad_TH: Tensor) -> None:
    parts = torch.autograd.grad(y_TH, leaves, grad_TH.to(y_TH.dtype), allow_unused=True)
    with torch.no_grad():
        for total, part in zip(sums, parts, strict=True):
            if part is not None:
                total += part


def _summed_in(tensor: Tensor) -> torch.dtype:
    """The dtype to add up parts of a tensor in."""
    return torch.promote_types(tensor.dtype, torch.float32)
