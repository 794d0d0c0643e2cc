"""Hands out neurons: from the cache, from what was read ahead, and from the file, MLP by MLP.

Dimension key: N neurons, U of them wanted, R rows of a bundle, B its bytes, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ripple_loader.config import RippleConfig, parse_size
from ripple_loader.format.bundles import unpack_bundles
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.online.budget import BUFFERS, Allocation
from ripple_loader.online.cache import NeuronCache, Slots, make_cache
from ripple_loader.online.pace import Pace
from ripple_loader.report import RippleReport
from ripple_loader.storage.blocks import AlignedBuffer, align
from ripple_loader.storage.collapse import Mask, Places, ReadPlan, cheapest, fixed_gap, waves
from ripple_loader.storage.meter import Meter
from ripple_loader.storage.pipeline import Pipeline, Ticket
from ripple_loader.storage.reader import Reader

_ROWS_COPIED_AT_ONCE = 32
_ROWS_DECODED_AT_ONCE = 64  # what int4 takes for them is beyond the budget
_IDLE_MEMORY = 0.9  # of the mean of how long the drive has nothing to do between two layers


@dataclass(frozen=True)
class _Ahead:
    """Neurons of a layer that are being read before it asks for them; `sure` if all that it lacks."""

    layer: int
    ticket: Ticket
    sure: bool


@dataclass(frozen=True)
class Batch:
    """Some neurons of an MLP.

    Attributes:
        places: which, shape (U,).
        rows: their bundles in the model's dtype, shape (U, R, H).
        wanted: those that count, bool, shape (U,); others only lie between them. None for all.
    """

    places: Places
    rows: Tensor
    wanted: Mask | None


def staging(size: int, report: RippleReport) -> Tensor:
    """Memory for gathered neurons, uint8: pinned where there is a GPU, which then reads it directly."""
    if torch.cuda.is_available():
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # such as a limit on locked memory
            reason = str(error).partition("\n")[0]
            report.fall_back(f"neurons are copied to the GPU from pageable memory: {reason}")
    return torch.empty(size, dtype=torch.uint8)


class Fetcher:
    """The neuron caches and the reads of one model's MLPs; hands out one MLP at a time.

    Args:
        sidecar: where the neurons lie.
        config: cache policy and how gaps between reads are chosen.
        allocation: the budget's division.
        dtype: the model's, which neurons are handed out in.
        reader: of the sidecar.
        buffers: what is read into, `budget.BUFFERS` of `allocation.buffer` bytes.
        meter: what reads cost on this drive.
        pace: what computing costs on this processor.
        whole: whether all neurons are always wanted; the cache then keeps what it was filled with.
    """

    def __init__(
        self,
        sidecar: Sidecar,
        config: RippleConfig,
        allocation: Allocation,
        dtype: torch.dtype,
        reader: Reader,
        buffers: list[AlignedBuffer],
        meter: Meter,
        pace: Pace,
        *,
        whole: bool,
    ) -> None:
        assert len(buffers) == BUFFERS
        header = sidecar.header
        self.header, self.report, self.pace, self.meter = header, reader.report, pace, meter
        self._sidecar, self._allocation, self._dtype = sidecar, allocation, dtype
        self._fixed = None if config.merge_gap == "auto" else fixed_gap(_bytes(config.merge_gap))
        self._reader, self._buffers, self._policy = reader, buffers, config.cache_policy
        self._pipeline = Pipeline(reader, buffers)
        self._ahead: _Ahead | None = None
        self._drained, self._idle = 0.0, 0.0
        self._scratch = staging(allocation.scratch, self.report)
        slots = allocation.cache_slots
        self._sizes = [
            (count, count if whole else min(hot, count))
            for count, hot in zip(slots, header.hot, strict=True)
            if any(slots)
        ]
        self._caches = self._empty_caches()
        self._cached = [
            torch.empty(count, header.bundle_bytes, dtype=torch.uint8) for count, _ in self._sizes
        ]
        self._cached_rows = [cached.numpy() for cached in self._cached]
        for layer in range(len(self._caches)):
            self._pin(layer)

    def _empty_caches(self) -> list[NeuronCache]:
        """One for each MLP, which holds its pinned neurons and no others."""
        return [make_cache(self._policy, self.header.neurons, *sizes) for sizes in self._sizes]

    def reset(self) -> None:
        """Start anew after a fetch that an error or Ctrl-C ended anywhere; pinned neurons stay."""
        self._reader.restart()
        self._pipeline = Pipeline(self._reader, self._buffers)
        self._caches = self._empty_caches()
        self._ahead = None

    def _pin(self, layer: int) -> None:
        """Read the neurons of an MLP that stay in memory into their slots."""
        pinned = self._caches[layer].pinned
        self.report.pinned += min(pinned, self.header.hot[layer])
        for plan, buffer in self.read(layer, "bundles", np.arange(pinned), self.header.bundle_bytes):
            self._store(layer, plan.places, plan.spots, buffer)

    def read(
        self, layer: int, kind: str, places: Places, width: int
    ) -> Generator[tuple[ReadPlan, AlignedBuffer], None, None]:
        """Read rows of a section, in order; each batch holds until the next. Close it."""
        self.drop_ahead()
        with self._reading(self._pipeline.add(self._plans(layer, kind, places, width, 0.0, 0.0))) as (
            ticket,
        ):
            yield from self._pipeline.take(ticket)

    @contextmanager
    def _reading(self, *tickets: Ticket) -> Iterator[tuple[Ticket, ...]]:
        try:
            yield tickets
        finally:
            self._pipeline.drop(*tickets)

    def _plans(
        self, layer: int, kind: str, places: Places, width: int, scattered: float, in_order: float
    ) -> Iterator[ReadPlan]:
        """Reads of some rows, which take so many seconds to compute with scattered or in order."""
        collapse = self._fixed or cheapest(self.meter.next_model(), computing=(scattered, in_order))
        base, _ = self._sidecar.section(layer, kind)
        block, capacity = self._reader.block, self._allocation.buffer
        return waves(places, capacity, base=base, width=width, block=block, collapse=collapse)

    def _bundle_plans(self, layer: int, places: Places) -> list[ReadPlan]:
        if not len(places):
            return []
        span = int(places[-1] - places[0]) + 1
        scattered = len(places) * (self.pace.compute + self.pace.gather)
        in_order, width = span * self.pace.compute, self.header.bundle_bytes
        return list(self._plans(layer, "bundles", places, width, scattered, in_order))

    def _absent(self, layer: int, places: Places) -> Places:
        return self._caches[layer].absent(places) if self._caches else places

    def pause(self) -> None:
        """Note that the time until the next fetch is not the model's."""
        self._drained = 0.0

    def drop_ahead(self) -> None:
        """Forget reads that nobody came for; their buffers can be used again."""
        if self._ahead is not None:
            self._pipeline.drop(self._ahead.ticket)
            self._ahead = None

    def read_ahead(self, layer: int, places: Places) -> None:
        """Start reading those of a layer's neurons that are not cached, behind all other reads."""
        assert self._ahead is None
        absent = self._absent(layer, places)
        if len(absent):
            ticket = self._pipeline.add(self._bundle_plans(layer, absent))
            self._ahead = _Ahead(layer, ticket, sure=len(places) == self.header.neurons)

    def most_ahead(self, layer: int, places: Places) -> Places:
        """The first of some neurons, best first, that the drive can read while it would be idle."""
        absent = self._absent(layer, places)
        each = self.meter.model.seconds(1, self.header.bundle_bytes)
        return np.sort(absent[: int(self._idle / each)])

    def fetch(
        self, layer: int, places: Places, then: Callable[[], None] | None = None
    ) -> Generator[Batch, None, None]:
        """Hand out an MLP's neurons in batches that fit the buffers; close it.

        Args:
            layer: which MLP.
            places: the neurons wanted, ascending, shape (U,).
            then: called once all reads of this MLP are queued, to read ahead for the next.

        Yields:
            Each wanted neuron once, in batches that are valid until the next.
        """
        report, pipeline = self.report, self._pipeline
        if self._ahead is not None and self._ahead.layer != layer:
            self.drop_ahead()
        slots = self._caches[layer].lookup(places) if self._caches else np.full(len(places), -1, np.int64)
        missing = places[slots < 0]
        tickets, rest = [], missing
        if self._ahead is not None:
            ahead, self._ahead = self._ahead, None
            tickets = [ahead.ticket]
            if ahead.sure and len(places) == self.header.neurons:
                rest = missing[:0]
            else:
                rest = self._not_coming(ahead.ticket, missing)
        if self._drained:
            self._idle += (1 - _IDLE_MEMORY) * (time.perf_counter() - self._drained - self._idle)
            self._drained = 0.0
        report.active += len(places)
        report.hits += len(places) - len(missing)
        report.misses += len(missing)
        wanted_N = np.zeros(self.header.neurons, bool)
        wanted_N[missing] = True
        plans = self._bundle_plans(layer, rest)
        report.whole += bool(plans) and all(len(plan.offsets) == 1 for plan in plans)
        tickets.append(pipeline.add(plans))
        with self._reading(*tickets):
            if then is not None:
                then()
            yield from self._from_cache(layer, places[slots >= 0], slots[slots >= 0])
            for ticket in tickets:
                for plan, buffer in pipeline.take(ticket):
                    wanted = wanted_N[plan.places]
                    report.read_in_vain += int(len(wanted) - wanted.sum())
                    if wanted.any():
                        yield from self._from_buffer(plan, wanted, buffer)
                        self._admit(layer, plan.places[wanted], plan.spots[wanted], buffer)
        self._drained = time.perf_counter()

    def _not_coming(self, ticket: Ticket, missing: Places) -> Places:
        """What is to be read beside a ticket's reads; those that were not started never are."""
        self._pipeline.keep_started(ticket)
        coming_N = np.zeros(self.header.neurons, bool)
        for plan, _, _ in ticket.started:
            coming_N[plan.places] = True
            self.report.read_ahead += len(plan.places)
        return missing[~coming_N[missing]]

    def _from_cache(self, layer: int, places: Places, slots: Slots) -> Iterator[Batch]:
        in_order = bool((np.diff(slots) == 1).all())
        rows = self._batch_rows(len(slots), copied=not in_order)
        for start in range(0, len(slots), rows):
            part, cached = slots[start : start + rows], self._cached[layer]
            stored = cached[int(part[0]) : int(part[-1]) + 1] if in_order else self._gather(cached, part)
            yield Batch(places[start : start + rows], self._decoded(stored), None)

    def _batch_rows(self, count: int, *, copied: bool = True) -> int:
        """Neurons that are handed out at once: all, where they are used as they lie."""
        if copied or not self.header.encoding.stores(self._dtype):
            return self._allocation.rows
        return max(1, count)

    def _from_buffer(self, plan: ReadPlan, wanted: Mask, buffer: AlignedBuffer) -> Iterator[Batch]:
        """The wanted neurons of a buffer; with those between them where one read brought all in order."""
        places, spots = plan.places[wanted], plan.spots[wanted]
        width, span = self.header.bundle_bytes, int(places[-1] - places[0]) + 1
        if len(plan.offsets) == 1 and span <= 2 * len(places):
            mine = np.zeros(span, bool)
            mine[places - places[0]] = True
            rows = self._batch_rows(span, copied=False)
            for start in range(0, span, rows):
                count = min(rows, span - start)
                stored = buffer.bytes.as_strided((count, width), (width, 1), int(spots[0]) + start * width)
                among = np.arange(count) + places[0] + start
                everyone = span == len(places)
                yield Batch(among, self._decoded(stored), None if everyone else mine[start : start + count])
            return
        rows = self._allocation.rows
        for start in range(0, len(places), rows):
            part = slice(start, start + rows)
            yield Batch(
                places[part], self._decoded(self._gather(self._everywhere(buffer), spots[part])), None
            )

    def _gather(self, rows: Tensor, index: Slots) -> Tensor:
        """Copy the indexed rows, uint8, to the start of the scratch memory."""
        out = self._scratch[: len(index) * rows.shape[1]].view(len(index), -1)
        return torch.index_select(rows, 0, torch.from_numpy(index), out=out)

    def _everywhere(self, buffer: AlignedBuffer) -> Tensor:
        """The bundles that start at every byte of a buffer, overlapping: uint8, shape (bytes, B)."""
        width = self.header.bundle_bytes
        return buffer.bytes.as_strided((len(buffer.bytes) - width + 1, width), (1, 1))

    def _decoded(self, stored_UB: Tensor) -> Tensor:
        """Bundles in the model's dtype, shape (U, R, H)."""
        header, dtype = self.header, self._dtype
        if header.encoding.stores(dtype):
            return unpack_bundles(stored_UB, header, dtype)
        skip = align(self._allocation.rows * header.bundle_bytes)
        size = len(stored_UB) * header.rows * header.hidden
        rows = self._scratch[skip : skip + size * dtype.itemsize].view(dtype)
        rows = rows.view(len(stored_UB), header.rows, header.hidden)
        parts = stored_UB.split(_ROWS_DECODED_AT_ONCE), rows.split(_ROWS_DECODED_AT_ONCE)
        for part, out in zip(*parts, strict=True):
            unpack_bundles(part, header, dtype, out)
        return rows

    def _admit(self, layer: int, places: Places, spots: Places, buffer: AlignedBuffer) -> None:
        if not self._caches or self._caches[layer].pinned == self._caches[layer].capacity:
            return
        cache = self._caches[layer]
        before = cache.evictions
        admission = cache.offer(places)
        self.report.evictions += cache.evictions - before
        self._store(layer, admission.slots, spots[admission.index], buffer)

    def _store(self, layer: int, slots: Slots, spots: Places, buffer: AlignedBuffer) -> None:
        """Copy bundles from a buffer into slots of the cache."""
        # numpy copies whole rows where torch's index_copy_ goes byte by byte, which takes 40 times as long.
        cached, width = self._cached_rows[layer], self.header.bundle_bytes
        everywhere = np.lib.stride_tricks.sliding_window_view(np.frombuffer(buffer.memory, np.uint8), width)
        for start in range(0, len(slots), _ROWS_COPIED_AT_ONCE):
            part = slice(start, start + _ROWS_COPIED_AT_ONCE)
            cached[slots[part]] = everywhere[spots[part]]


def _bytes(gap: int | str) -> int:
    return 0 if gap == 0 else parse_size(gap, "merge_gap")
