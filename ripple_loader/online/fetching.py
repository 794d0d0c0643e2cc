"""Hands out an MLP's neurons from the cache, from reads that were started ahead, and from the file.

Dimension key: N neurons, U of them wanted, R rows of a bundle, B its bytes, H hidden.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from crc32c import crc32c
from torch import Tensor

from ripple_loader.config import RippleConfig, parse_size
from ripple_loader.format.checks import SECTIONS, numbers_of
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.online.budget import BUFFERS, Allocation
from ripple_loader.online.cache import Slots
from ripple_loader.online.cached import CachedNeurons
from ripple_loader.online.pace import Pace
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import Mask, Places, ReadPlan, cheapest, fixed_gap, waves
from ripple_loader.storage.meter import Meter
from ripple_loader.storage.pipeline import Pipeline, Ticket
from ripple_loader.storage.reader import Reader

_IDLE_MEMORY = 0.9  # weight of earlier values in the mean idle time of the drive between two layers


@dataclass(frozen=True)
class _Ahead:
    """Neurons that are being read before their layer asks for them; `sure` if these are all that it lacks."""

    layer: int
    ticket: Ticket
    sure: bool


@dataclass(frozen=True)
class Batch:
    """Some neurons of an MLP, as they are stored.

    Attributes:
        places: the neurons, shape (U,).
        memory: where their bundles lie, uint8, flat.
        offsets: the byte at which each bundle begins, shape (U,).
        wanted: which of them to compute with, bool, shape (U,); the others lie in gaps. None for all.
    """

    places: Places
    memory: Tensor
    offsets: Places
    wanted: Mask | None

    def without_gaps(self) -> Batch:
        """The wanted ones alone."""
        if self.wanted is None:
            return self
        return Batch(self.places[self.wanted], self.memory, self.offsets[self.wanted], None)


class Fetcher:
    """The neuron caches and the reads of one model's MLPs; hands out one MLP at a time.

    Args:
        sidecar: where the neurons lie.
        config: cache policy and how gaps between reads are chosen.
        allocation: the budget's division.
        reader: of the sidecar.
        buffers: for reads, `budget.BUFFERS` of `allocation.buffer` bytes.
        meter: the cost of reads on this drive.
        pace: the cost of computing on this processor.
        whole: whether every MLP always needs all neurons, see `CachedNeurons`.
    """

    def __init__(
        self,
        sidecar: Sidecar,
        config: RippleConfig,
        allocation: Allocation,
        reader: Reader,
        buffers: list[AlignedBuffer],
        meter: Meter,
        pace: Pace,
        *,
        whole: bool,
    ) -> None:
        assert len(buffers) == BUFFERS
        self.header, self.report, self.pace, self.meter = sidecar.header, reader.report, pace, meter
        self._sidecar, self._capacity = sidecar, allocation.buffer
        self._fixed = None if config.merge_gap == "auto" else fixed_gap(_bytes(config.merge_gap))
        self._reader, self._buffers = reader, buffers
        self._pipeline = Pipeline(reader, buffers)
        self._ahead: _Ahead | None = None
        self._drained, self._idle = 0.0, 0.0
        self._cached = CachedNeurons(self.header, allocation, config.cache_policy, whole=whole)
        self._checks = [
            sidecar.checks(layer) for layer in range(self.header.layers if config.check_reads else 0)
        ]
        for layer, pinned in enumerate(self._cached.pinned):
            self._pin(layer, pinned)

    def reset(self) -> None:
        """Start anew after a fetch that an error or Ctrl-C ended anywhere; pinned neurons stay."""
        self._reader.restart()
        self._pipeline = Pipeline(self._reader, self._buffers)
        self._cached.reset()
        self._ahead = None

    def _pin(self, layer: int, pinned: int) -> None:
        """Read the neurons of an MLP that stay in memory into their slots."""
        self.report.pinned += min(pinned, self.header.hot[layer])
        for plan, buffer in self.read(layer, "bundles", np.arange(pinned), self.header.bundle_bytes):
            self._check(layer, plan.places, plan.spots, buffer)
            self._cached.store(layer, plan.places, plan.spots, buffer)

    def read(
        self, layer: int, kind: str, places: Places, width: int
    ) -> Generator[tuple[ReadPlan, AlignedBuffer], None, None]:
        """Read rows of a section, in order; each batch is valid until the next. Close the generator.

        A section that is checked as a whole, such as a sketch, must be read whole; a wrong checksum shows at
        the end.
        """
        self.drop_ahead()
        ticket = self._pipeline.add(self._plans(layer, kind, places, width, 0.0, 0.0))
        number = 0
        with self._dropping(ticket):
            for plan, buffer in self._pipeline.take(ticket):
                first = int(plan.spots[0])
                if kind in SECTIONS and self._checks:
                    number = crc32c(buffer.memory[first : first + width * len(plan.places)], number)
                yield plan, buffer
        if kind in SECTIONS and self._checks and number != self._checks[layer].sections[kind]:
            raise self._sidecar.damaged(layer, kind)

    def _check(self, layer: int, places: Places, spots: Places, buffer: AlignedBuffer) -> None:
        """ValueError if bundles in a buffer do not match their checksums."""
        if not self._checks:
            return
        width = self.header.bundle_bytes
        wrong = numbers_of(buffer.memory, spots, width) != self._checks[layer].bundles[places]
        if wrong.any():
            raise self._sidecar.damaged(layer, "bundles", int(places[wrong][0]) * width)

    @contextmanager
    def _dropping(self, *tickets: Ticket) -> Iterator[None]:
        """Release the buffers of some tickets at the end, used or not."""
        try:
            yield
        finally:
            self._pipeline.drop(*tickets)

    def _plans(
        self, layer: int, kind: str, places: Places, width: int, scattered: float, in_order: float
    ) -> Iterator[ReadPlan]:
        """Reads of some rows, which take `scattered` or `in_order` seconds to compute with."""
        collapse = self._fixed or cheapest(self.meter.next_model(), computing=(scattered, in_order))
        base, _ = self._sidecar.section(layer, kind)
        block, capacity = self._reader.block, self._capacity
        return waves(places, capacity, base=base, width=width, block=block, collapse=collapse)

    def _bundle_plans(self, layer: int, places: Places) -> list[ReadPlan]:
        if not len(places):
            return []
        span = int(places[-1] - places[0]) + 1
        scattered = len(places) * (self.pace.compute + self.pace.gather)
        in_order, width = span * self.pace.compute, self.header.bundle_bytes
        return list(self._plans(layer, "bundles", places, width, scattered, in_order))

    def pause(self) -> None:
        """Leave the time until the next fetch out of the drive's idle time, because it is the user's."""
        self._drained = 0.0

    def drop_ahead(self) -> None:
        """Forget reads that were started ahead and are not wanted; their buffers can be used again."""
        if self._ahead is not None:
            self._pipeline.drop(self._ahead.ticket)
            self._ahead = None

    def read_ahead(self, layer: int, places: Places) -> None:
        """Start reading those of a layer's neurons that are not cached, behind all other reads."""
        assert self._ahead is None
        absent = self._cached.absent(layer, places)
        if len(absent):
            ticket = self._pipeline.add(self._bundle_plans(layer, absent))
            self._ahead = _Ahead(layer, ticket, sure=len(places) == self.header.neurons)

    def most_ahead(self, layer: int, places: Places) -> Places:
        """The first of some neurons, best first, that the drive can read while it would otherwise be idle."""
        absent = self._cached.absent(layer, places)
        each = self.meter.model.seconds(1, self.header.bundle_bytes)
        return np.sort(absent[: int(self._idle / each)])

    def fetch(
        self, layer: int, places: Places, then: Callable[[], None] | None = None
    ) -> Generator[Batch, None, None]:
        """Hand out an MLP's neurons, those of a buffer at a time; close the generator.

        Args:
            layer: which MLP.
            places: the neurons wanted, ascending, shape (U,).
            then: called once all reads of this MLP are queued, to read ahead for the next.

        Yields:
            Each wanted neuron once, as it is stored, in batches that are valid until the next.
        """
        if self._ahead is not None and self._ahead.layer != layer:
            self.drop_ahead()
        slots = self._cached.lookup(layer, places)
        missing = places[slots < 0]
        ahead, rest = self._take_ahead(missing, whole=len(places) == self.header.neurons)
        self._count(wanted=len(places), missing=len(missing))
        tickets = [*ahead, self._queue(layer, rest)]
        wanted_N = np.zeros(self.header.neurons, bool)
        wanted_N[missing] = True
        with self._dropping(*tickets):
            if then is not None:
                then()
            yield from self._from_cache(layer, places[slots >= 0], slots[slots >= 0])
            for ticket in tickets:
                yield from self._from_file(layer, ticket, wanted_N)
        self._drained = time.perf_counter()

    def _take_ahead(self, missing: Places, *, whole: bool) -> tuple[list[Ticket], Places]:
        """The reads that were started for this MLP, and which of the missing neurons they do not bring."""
        if self._ahead is None:
            return [], missing
        ahead, self._ahead = self._ahead, None
        if ahead.sure and whole:
            return [ahead.ticket], missing[:0]
        return [ahead.ticket], self._not_coming(ahead.ticket, missing)

    def _not_coming(self, ticket: Ticket, missing: Places) -> Places:
        """The missing neurons that a ticket's reads do not bring; those not started yet never start."""
        self._pipeline.keep_started(ticket)
        coming_N = np.zeros(self.header.neurons, bool)
        for plan, _, _ in ticket.started:
            coming_N[plan.places] = True
            self.report.read_ahead += len(plan.places)
        return missing[~coming_N[missing]]

    def _count(self, *, wanted: int, missing: int) -> None:
        """Record the cache's hits in the report, and how long the drive was idle."""
        if self._drained:
            self._idle += (1 - _IDLE_MEMORY) * (time.perf_counter() - self._drained - self._idle)
            self._drained = 0.0
        self.report.active += wanted
        self.report.hits += wanted - missing
        self.report.misses += missing

    def _queue(self, layer: int, places: Places) -> Ticket:
        plans = self._bundle_plans(layer, places)
        self.report.whole += bool(plans) and all(len(plan.offsets) == 1 for plan in plans)
        return self._pipeline.add(plans)

    def _from_cache(self, layer: int, places: Places, slots: Slots) -> Iterator[Batch]:
        if len(slots):
            bundles = self._cached.bundles[layer]
            yield Batch(places, bundles.view(-1), slots * bundles.shape[1], None)

    def _from_file(self, layer: int, ticket: Ticket, wanted_N: Mask) -> Iterator[Batch]:
        """The wanted neurons of a ticket's reads, some of which go to the cache as well."""
        for plan, buffer in self._pipeline.take(ticket):
            wanted = wanted_N[plan.places]
            self.report.read_in_vain += int(len(wanted) - wanted.sum())
            if wanted.any():
                places, spots = plan.places[wanted], plan.spots[wanted]
                yield self._from_buffer(layer, plan, places, spots, buffer)
                self.report.evictions += self._cached.admit(layer, places, spots, buffer)

    def _from_buffer(
        self, layer: int, plan: ReadPlan, places: Places, spots: Places, buffer: AlignedBuffer
    ) -> Batch:
        """Some neurons of a buffer; with those between them where one read brought all in order."""
        width, span = self.header.bundle_bytes, int(places[-1] - places[0]) + 1
        wanted = None
        if len(plan.offsets) == 1 and len(places) < span <= 2 * len(places):
            wanted = np.zeros(span, bool)
            wanted[places - places[0]] = True
            among = np.arange(span)
            places, spots = places[0] + among, spots[0] + among * width
        self._check(layer, places, spots, buffer)
        return Batch(places, buffer.bytes, spots, wanted)


def _bytes(gap: int | str) -> int:
    return 0 if gap == 0 else parse_size(gap, "merge_gap")
