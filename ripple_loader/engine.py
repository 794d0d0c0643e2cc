"""The online stage: select, look up, read, and compute with neurons, MLP by MLP, within the DRAM budget.

Dimension key: T tokens, N neurons, U of them wanted, R rows of a bundle, B its bytes, S = R - 1 rows that
select, H hidden.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterator
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ripple_loader.access import Places, ReadPlan, waves
from ripple_loader.budget import allocate, needs_sketch
from ripple_loader.bundles import Sidecar, unpack_bundles
from ripple_loader.cache import Slots, make_cache
from ripple_loader.config import RippleConfig, parse_size
from ripple_loader.reader import AlignedBuffer, Prefetch, Reader
from ripple_loader.report import RippleReport
from ripple_loader.selection import Selection, select_active, select_all, select_largest
from ripple_loader.sidecar import Vectors, align

_ROWS_COPIED_AT_ONCE = 32


@dataclass(frozen=True)
class _Fetch:
    """A layer's neurons on their way: the cache slot of each or -1, which are missing, and their reads."""

    layer: int
    slots: Slots
    missing: Slots
    reads: Prefetch


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
        if config.verify:
            sidecar.verify()
        self.allocation = allocate(header, config, dtype)
        self.report = RippleReport(
            directory=str(sidecar.path.parent),
            layers=header.layers // (header.experts or 1),
            neurons=header.neurons,
            budget=self.allocation.budget,
            resident=self.allocation.resident,
            cache_slots=self.allocation.cache_slots,
        )
        self._merge_gap = 0 if config.merge_gap == 0 else parse_size(config.merge_gap, "merge_gap")
        self._reader = Reader(sidecar.path, config.io_threads, self.report)
        self._buffers = (AlignedBuffer(self.allocation.buffer), AlignedBuffer(self.allocation.buffer))
        self._ahead: _Fetch | None = None
        layers, slots = header.layers, self.allocation.cache_slots
        with torch.device("cpu"):  # transformers builds the skeleton, and so this, under the meta device
            self._scratch = torch.empty(self.allocation.scratch, dtype=torch.uint8)
            self._vectors = [self._read_vectors(layer) for layer in range(layers)]
            self._sketches = [self._read_sketch(layer) for layer in range(self.allocation.sketch_layers)]
            self._caches = [
                make_cache(config.cache_policy, header.neurons, count, min(hot, count))
                for count, hot in zip(slots, header.hot, strict=True)
                if any(slots)
            ]
            self._cached = [
                torch.empty(cache.capacity, header.bundle_bytes, dtype=torch.uint8) for cache in self._caches
            ]
        for layer in range(len(self._caches)):
            self._pin(layer)
        self.report.reset()

    def _pin(self, layer: int) -> None:
        """Read the hot neurons of an MLP into the slots where they stay."""
        pinned = self._caches[layer].pinned
        self.report.pinned += pinned
        with self._reads(np.arange(pinned), layer, "bundles", self.header.bundle_bytes) as reads:
            for plan, buffer in reads:
                self._store(layer, plan.places, plan.spots, buffer)

    def _read_vectors(self, layer: int) -> Vectors:
        offset, size = self.sidecar.section(layer, "vectors")
        data = np.fromfile(self.sidecar.path, np.uint8, size, offset=offset)
        return Vectors.unpack(data.data, self.header.rows, self.header.neurons, self.header.hidden)

    def _read_sketch(self, layer: int) -> Tensor:
        """All sketched rows of a layer: int8, shape (S * N, H)."""
        sketch = torch.empty(
            (self.header.rows - 1) * self.header.neurons, self.header.hidden, dtype=torch.int8
        )
        done = 0
        with self._sketch_reads(layer) as reads:
            for plan, buffer in reads:
                count = len(plan.places)
                sketch[done : done + count] = self._sketch_rows(plan, buffer)
                done += count
        return sketch

    def bias(self, layer: int, row: int) -> Tensor:
        """A projection's bias, float32: of a row that selects (N,), or of the last row, the output (H,)."""
        vectors = self._vectors[layer]
        return torch.from_numpy(vectors.down_bias if row == self.header.rows - 1 else vectors.bias[row])

    def select(self, layer: int, x_TH: Tensor, activation: nn.Module) -> Selection:
        """Which neurons of a layer some tokens need, as `RippleConfig.keep` has it."""
        if not needs_sketch(self.header, self.config):
            return select_all(self.header.neurons)
        x_TH = x_TH.float().cpu()
        estimates = self._estimate(layer, x_TH)
        if self.config.keep < 1:
            return select_largest(estimates, activation, self.config.keep)
        vectors = self._vectors[layer]
        error_N, scale_N = torch.from_numpy(vectors.error[0]), torch.from_numpy(vectors.scale[0])
        return select_active(estimates[0], error_N, scale_N, x_TH)

    def _estimate(self, layer: int, x_TH: Tensor) -> list[Tensor]:
        """What the sketch makes of each selecting projection: S tensors, float32, shape (T, N)."""
        S, N = self.header.rows - 1, self.header.neurons
        floats = self._scratch.view(torch.float32)
        floats = floats[: len(floats) // self.header.hidden * self.header.hidden].view(-1, self.header.hidden)
        estimate = torch.empty(len(x_TH), S * N, device="cpu")
        start = 0
        for rows in self._sketch_batches(layer):
            for part in rows.split(len(floats)):
                weight = floats[: len(part)].copy_(part)
                torch.mm(x_TH, weight.T, out=estimate[:, start : start + len(part)])
                start += len(part)
        vectors = self._vectors[layer]
        scaled = (
            estimate.view(-1, S, N).mul_(torch.from_numpy(vectors.scale)).add_(torch.from_numpy(vectors.bias))
        )
        return list(scaled.unbind(1))

    def _sketch_batches(self, layer: int) -> Iterator[Tensor]:
        """The sketched rows of a layer in order: int8, shape (some, H)."""
        if layer < len(self._sketches):
            yield self._sketches[layer]
            return
        with self._sketch_reads(layer) as reads:
            for plan, buffer in reads:
                yield self._sketch_rows(plan, buffer)

    def _sketch_reads(self, layer: int) -> Prefetch:
        self._drop_ahead()
        rows = np.arange((self.header.rows - 1) * self.header.neurons)
        return self._reads(rows, layer, "sketch", self.header.hidden)

    def _sketch_rows(self, plan: ReadPlan, buffer: AlignedBuffer) -> Tensor:
        shape = (len(plan.places), self.header.hidden)
        return buffer.bytes.view(torch.int8).as_strided(shape, (self.header.hidden, 1), int(plan.spots[0]))

    def _reads(self, places: Places, layer: int, kind: str, width: int, first_buffer: int = 0) -> Prefetch:
        base, _ = self.sidecar.section(layer, kind)
        capacity, gap, block = self.allocation.buffer, self._merge_gap, self._reader.block
        plans = waves(places, capacity, base=base, width=width, block=block, merge_gap=gap)
        buffers = (self._buffers[first_buffer], self._buffers[1 - first_buffer])
        return Prefetch(self._reader, list(plans), buffers)

    def _begin(self, layer: int, places: Places, first_buffer: int = 0) -> _Fetch:
        """Look up a layer's neurons and start reading those that are not cached."""
        slots = self._caches[layer].lookup(places) if self._caches else np.full(len(places), -1, np.int64)
        missing = np.flatnonzero(slots < 0)
        reads = self._reads(places[missing], layer, "bundles", self.header.bundle_bytes, first_buffer)
        return _Fetch(layer, slots, missing, reads)

    def _drop_ahead(self) -> None:
        """Wait for reads that nobody came for, so that their buffer can be used."""
        if self._ahead is not None:
            self._ahead.reads.wait()
            self._ahead = None

    def begin(self, tokens: int) -> None:
        """Count the tokens of a forward call."""
        with self._lock:
            self.report.tokens += tokens

    def compute(self, layer: int, x_TH: Tensor, activation: nn.Module, following: int | None) -> Tensor:
        """An MLP's output for T tokens, shape (T, H), batch by batch of neurons as they arrive.

        Args:
            layer: which MLP.
            x_TH: its input.
            activation: the model's own.
            following: the MLP that runs next, if it is known; its first read starts early.
        """
        with self._lock:
            return self._compute(layer, x_TH, activation, following)

    def _compute(self, layer: int, x_TH: Tensor, activation: nn.Module, following: int | None) -> Tensor:
        last = self.header.rows - 1
        selection = self.select(layer, x_TH, activation)
        y_TH = torch.zeros_like(x_TH, dtype=torch.float32)
        with closing(self.fetch(layer, selection.places, following)) as batches:
            for batch, rows in batches:
                *selecting, down_UH = rows.to(x_TH.device).unbind(1)
                places = torch.from_numpy(selection.places[batch])
                factors = [
                    F.linear(x_TH, weight_UH, self.bias(layer, row)[places].to(x_TH))
                    for row, weight_UH in enumerate(selecting)
                ]
                a_TU = activation(factors[0])
                for factor_TU in factors[1:]:
                    a_TU = a_TU * factor_TU
                if selection.mask is not None:
                    a_TU = a_TU * selection.mask[:, torch.from_numpy(batch)].to(a_TU.device)
                y_TH += a_TU @ down_UH
        return (y_TH + self.bias(layer, last).to(y_TH.device)).to(x_TH.dtype)

    def fetch(
        self, layer: int, places: Places, following: int | None = None
    ) -> Generator[tuple[Places, Tensor], None, None]:
        """Hand out an MLP's neurons, from the cache or the file, in batches that fit the buffers; close it.

        When all of its neurons are wanted, those of the next will be too: the first read for `following`
        starts while the last batch is used.

        Args:
            layer: which MLP.
            places: the neurons wanted, ascending, shape (U,).
            following: the MLP that runs next, if it is known.

        Yields:
            Positions in `places`, and their bundles in the model's dtype, shape (positions, R, H); the
            bundles are valid until the next batch.
        """
        everything, most = len(places) == self.header.neurons, self.allocation.rows
        if everything and self._ahead is not None and self._ahead.layer == layer:
            fetch, self._ahead = self._ahead, None
        else:
            self._drop_ahead()
            fetch = self._begin(layer, places)
        found, done = np.flatnonzero(fetch.slots >= 0), 0
        self.report.active += len(places)
        self.report.hits += len(found)
        self.report.misses += len(fetch.missing)
        with fetch.reads as reads:
            for start in range(0, len(found), most):
                batch = found[start : start + most]
                yield batch, self._decoded(self._gather(self._cached[layer], fetch.slots[batch]))
            for plan, buffer in reads:
                batch = fetch.missing[done : done + len(plan.places)]
                done += len(batch)
                if everything and following is not None and done == len(fetch.missing):
                    free = 1 - self._buffers.index(buffer)
                    self._ahead = self._begin(following, places, first_buffer=free)
                for start in range(0, len(batch), most):
                    part = slice(start, start + most)
                    yield batch[part], self._decoded(self._bundles(plan.spots[part], buffer))
                if self._caches:
                    self._admit(layer, plan, buffer)

    def _gather(self, rows: Tensor, index: Slots) -> Tensor:
        """Copy the indexed rows, uint8, to the start of the scratch memory."""
        out = self._scratch[: len(index) * rows.shape[1]].view(len(index), -1)
        return torch.index_select(rows, 0, torch.from_numpy(index), out=out)

    def _everywhere(self, buffer: AlignedBuffer) -> Tensor:
        """The bundles that start at every byte of a buffer, overlapping: uint8, shape (bytes, B)."""
        width = self.header.bundle_bytes
        return buffer.bytes.as_strided((len(buffer.bytes) - width + 1, width), (1, 1))

    def _bundles(self, spots: Places, buffer: AlignedBuffer) -> Tensor:
        """The bundles that lie at `spots` of a buffer: uint8, shape (U, B)."""
        width = self.header.bundle_bytes
        if (np.diff(spots) == width).all():
            return buffer.bytes.as_strided((len(spots), width), (width, 1), int(spots[0]))
        return self._gather(self._everywhere(buffer), spots)

    def _decoded(self, stored_UB: Tensor) -> Tensor:
        """Bundles in the model's dtype, shape (U, R, H)."""
        header, dtype = self.header, self.dtype
        if header.encoding.stores(dtype):
            return unpack_bundles(stored_UB, header, dtype)
        skip, size = (
            align(self.allocation.rows * header.bundle_bytes),
            len(stored_UB) * header.rows * header.hidden,
        )
        rows = self._scratch[skip : skip + size * dtype.itemsize].view(dtype)
        rows = rows.view(len(stored_UB), header.rows, header.hidden)
        for part, out in zip(
            stored_UB.split(_ROWS_COPIED_AT_ONCE), rows.split(_ROWS_COPIED_AT_ONCE), strict=True
        ):
            out.copy_(unpack_bundles(part, header, dtype))
        return rows

    def _admit(self, layer: int, plan: ReadPlan, buffer: AlignedBuffer) -> None:
        cache = self._caches[layer]
        before = cache.evictions
        admission = cache.offer(plan.places)
        self.report.evictions += cache.evictions - before
        self._store(layer, admission.slots, plan.spots[admission.index], buffer)

    def _store(self, layer: int, slots: Slots, spots: Places, buffer: AlignedBuffer) -> None:
        """Copy bundles from a buffer into slots of the cache."""
        everywhere = self._everywhere(buffer)
        for start in range(0, len(slots), _ROWS_COPIED_AT_ONCE):
            part = slice(start, start + _ROWS_COPIED_AT_ONCE)
            index = torch.from_numpy(spots[part])
            self._cached[layer].index_copy_(0, torch.from_numpy(slots[part]), everywhere[index])
