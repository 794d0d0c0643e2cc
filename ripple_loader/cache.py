"""The neuron cache of one layer: which neurons are in memory, and which make room for new ones.

Every operation is a few numpy calls on arrays over the layer's neurons, never a loop over neurons. Each layer
has its own cache: a pass visits the layers in turn, which a shared LRU would turn into a scan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ripple_loader.access import Places
from ripple_loader.config import CachePolicy

INDEX_BYTES = 32
"""Bookkeeping bytes a neuron, cached or not; an upper bound for both policies."""

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Admission:
    """Neurons to copy into the cache: positions in the offered array, and the slot for each."""

    index: Slots
    slots: Slots


class NeuronCache(ABC):
    """Maps neurons to slots.

    Args:
        neurons: N.
        capacity: slots, at most N.
        pinned: the first places, at most `capacity`, hold the slots of the same number for good.
    """

    def __init__(self, neurons: int, capacity: int, pinned: int = 0) -> None:
        self.capacity, self.pinned, self.evictions = capacity, pinned, 0
        self._slot = np.full(neurons, -1, np.int32)
        self._slot[:pinned] = np.arange(pinned)
        self._stamp = np.zeros(neurons, np.int64)
        self._free = np.arange(pinned, capacity, dtype=np.int32)
        self._now = 0

    def lookup(self, places: Places) -> Slots:
        """The slot of each place, -1 where it is not cached; counts as a use."""
        slots = self._slot[places]
        self._touch(places[slots >= 0])
        return slots.astype(np.int64)

    def absent(self, places: Places) -> Places:
        """Those that are not cached; no use of the others."""
        return places[self._slot[places] < 0]

    def offer(self, places: Places) -> Admission:
        """Admit some of the neurons that were just read (ascending, none of them cached)."""
        self._now += 1
        index = self._choose(places)[: self.capacity - self.pinned]
        chosen = places[index]
        if (short := len(chosen) - len(self._free)) > 0:
            self._drop(self._victims(short))
        slots, self._free = self._free[: len(chosen)], self._free[len(chosen) :]
        self._slot[chosen] = slots
        self._stamp[chosen] = self._now
        self._insert(chosen)
        return Admission(index, slots.astype(np.int64))

    def _drop(self, victims: Places) -> None:
        self._free = np.concatenate([self._free, self._slot[victims]])
        self._slot[victims] = -1
        self.evictions += len(victims)

    def _oldest(self, members: Places, count: int) -> Places:
        """The `count` members that were stamped first."""
        if count >= len(members):
            return members
        return members[np.argpartition(self._stamp[members], count)[:count]]

    def _choose(self, places: Places) -> Slots:
        """Positions in `places` of the neurons to admit."""
        return np.arange(len(places))

    @abstractmethod
    def _touch(self, places: Places) -> None: ...

    @abstractmethod
    def _insert(self, places: Places) -> None: ...

    @abstractmethod
    def _victims(self, count: int) -> Places:
        """`count` cached neurons to drop."""


class LruCache(NeuronCache):
    """Admits every neuron and drops the least recently used."""

    def _touch(self, places: Places) -> None:
        self._stamp[places] = self._now + 1

    def _insert(self, places: Places) -> None:
        pass

    def _victims(self, count: int) -> Places:
        return self._oldest(self.pinned + np.flatnonzero(self._slot[self.pinned :] >= 0), count)


class S3FifoCache(NeuronCache):
    """S3-FIFO (Yang et al., SOSP 2023).

    New neurons enter a small queue, a tenth of the slots; those used again move to the main queue, the others
    leave and are remembered for a while, so that they enter the main queue when they come back.
    """

    SMALL_SHARE = 0.1

    _ABSENT, _SMALL, _MAIN = range(3)

    def __init__(self, neurons: int, capacity: int, pinned: int = 0) -> None:
        super().__init__(neurons, capacity, pinned)
        self._room = capacity - pinned
        self._queue = np.zeros(neurons, np.uint8)
        self._uses = np.zeros(neurons, np.uint8)
        self._left_at = np.full(neurons, -1, np.int64)
        self._left = 0

    def _touch(self, places: Places) -> None:
        self._uses[places] = np.minimum(self._uses[places] + 1, 3)

    def _insert(self, places: Places) -> None:
        known = (self._left_at[places] >= 0) & (self._left - self._left_at[places] < self._room)
        self._queue[places] = np.where(known, self._MAIN, self._SMALL)
        self._uses[places] = 0

    def _victims(self, count: int) -> Places:
        limit = int(self.SMALL_SHARE * self._room)
        small = np.flatnonzero(self._queue == self._SMALL)
        in_main = np.count_nonzero(self._queue == self._MAIN)
        passed = small[np.argsort(self._stamp[small], kind="stable")]
        passed = passed[: max(len(small) - limit, count - in_main, 0)]
        used = self._uses[passed] > 0
        self._queue[passed[used]], self._stamp[passed[used]] = self._MAIN, self._now
        leaving = passed[~used][:count]
        self._queue[leaving] = self._ABSENT
        self._left_at[leaving] = self._left
        self._left += len(leaving)
        if len(leaving) == count:
            return leaving
        return np.concatenate([leaving, self._from_main(count - len(leaving))])

    def _from_main(self, count: int) -> Places:
        """What leaves the main queue, which turns until `count` came up unused; a turn takes one use."""
        main = np.flatnonzero(self._queue == self._MAIN)
        rank = (self._uses[main].astype(np.int64) << 48) + self._stamp[main]
        leaving = main[np.argpartition(rank, count - 1)[:count]]
        turns = self._uses[leaving].max()
        self._uses[main] = np.maximum(self._uses[main], turns) - turns
        self._queue[leaving] = self._ABSENT
        return leaving


class LinkedCache(S3FifoCache):
    """S3-FIFO with linking-aligned admission (arXiv 2410.19274, section 5.2).

    Once the cache is full, a long run is admitted as a whole with a low probability, and never if the small
    queue does not hold it: such a run is cheap to read, and a cached neuron in its middle would not make it
    shorter.
    """

    LONG_RUN = 16
    LONG_RUN_ADMISSION = 0.1

    def __init__(self, neurons: int, capacity: int, pinned: int = 0) -> None:
        super().__init__(neurons, capacity, pinned)
        self._random = np.random.default_rng(0)

    def _choose(self, places: Places) -> Slots:
        free = len(self._free)
        if len(places) <= free:
            return np.arange(len(places))
        run = np.cumsum(np.append(True, np.diff(places) != 1)) - 1
        lengths = np.bincount(run)
        lucky = self._random.random(len(lengths)) < self.LONG_RUN_ADMISSION
        fits = lengths <= max(self.LONG_RUN, self.SMALL_SHARE * self._room)
        wanted = ((lengths < self.LONG_RUN) | (lucky & fits))[run]
        wanted[:free] = True
        return np.flatnonzero(wanted)


_POLICIES: dict[CachePolicy, type[NeuronCache]] = {
    "linked": LinkedCache,
    "s3fifo": S3FifoCache,
    "lru": LruCache,
}


def make_cache(policy: CachePolicy, neurons: int, capacity: int, pinned: int = 0) -> NeuronCache:
    """One MLP's cache of the named policy."""
    return _POLICIES[policy](neurons, capacity, pinned)


def cache_shares(uses: list[Slots], slots: int) -> list[int]:
    """How many slots each MLP should have: a slot goes where the next most used neuron is.

    Args:
        uses: for how many tokens of the trace each neuron is active, shape (N,), by MLP.
        slots: for all MLPs together; what no neuron could use stays free.
    """
    sizes = np.array([len(one) for one in uses])
    if slots >= sizes.sum():
        return sizes.tolist()
    pooled = np.concatenate(uses)
    chosen = np.argsort(-pooled, kind="stable")[:slots]
    return np.bincount(np.repeat(np.arange(len(uses)), sizes)[chosen], minlength=len(uses)).tolist()
