"""The base of all cache policies: the table from neurons to slots, pinned neurons, and admission.

Every operation is a few numpy calls on arrays over the layer's neurons, never a loop over neurons. Each layer
has its own cache: a pass visits the layers in turn, which a shared LRU would turn into a scan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from ripple_loader.registry import CACHE_POLICIES
from ripple_loader.storage.collapse import Places

Slots = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Admission:
    """Neurons to copy into the cache: positions in the offered array, and the slot for each."""

    index: Slots
    slots: Slots


class NeuronCache(ABC):
    """Maps one MLP's neurons to slots. A policy chooses in `victims` which neurons make room for others.

    Args:
        neurons: N.
        capacity: slots, at most N.
        pinned: this many first places, at most `capacity`, permanently hold the slots of the same number.

    Attributes:
        slot: of each neuron, -1 where it is not cached, int32, shape (N,).
        stamp: the time at which each was last used or admitted, int64, shape (N,).
        now: the time: the number of calls of `offer`.
        free: slots without a neuron, int32.
        evictions: neurons that made room.
        index_bytes: of all arrays of a cache, by neuron, cached or not; the DRAM budget counts them.
    """

    index_bytes: ClassVar[int] = 32

    def __init__(self, neurons: int, capacity: int, pinned: int = 0) -> None:
        self.capacity, self.pinned, self.evictions = capacity, pinned, 0
        self.slot = np.full(neurons, -1, np.int32)
        self.slot[:pinned] = np.arange(pinned)
        self.stamp = np.zeros(neurons, np.int64)
        self.free = np.arange(pinned, capacity, dtype=np.int32)
        self.now = 0

    def lookup(self, places: Places) -> Slots:
        """The slot of each place, -1 where it is not cached; counts as a use."""
        slots = self.slot[places]
        self.used(places[slots >= 0])
        return slots.astype(np.int64)

    def absent(self, places: Places) -> Places:
        """The places that are not cached; does not count as a use of the others."""
        return places[self.slot[places] < 0]

    def offer(self, places: Places) -> Admission:
        """Admit some of the neurons that were just read (ascending, not cached)."""
        self.now += 1
        index = self.choose(places)[: self.capacity - self.pinned]
        chosen = places[index]
        if (short := len(chosen) - len(self.free)) > 0:
            self._evict(self.victims(short))
        slots, self.free = self.free[: len(chosen)], self.free[len(chosen) :]
        self.slot[chosen] = slots
        self.admitted(chosen)
        return Admission(index, slots.astype(np.int64))

    def _evict(self, victims: Places) -> None:
        self.free = np.concatenate([self.free, self.slot[victims]])
        self.slot[victims] = -1
        self.evictions += len(victims)

    def evictable(self) -> Places:
        """The cached neurons that are not pinned."""
        return self.pinned + np.flatnonzero(self.slot[self.pinned :] >= 0)

    def oldest(self, members: Places, count: int) -> Places:
        """The `count` members with the smallest stamps."""
        if count >= len(members):
            return members
        return members[np.argpartition(self.stamp[members], count)[:count]]

    def choose(self, places: Places) -> Slots:
        """Positions in `places`, which were just read, of the neurons to admit: by default all."""
        return np.arange(len(places))

    def used(self, places: Places) -> None:
        """Note that cached neurons, pinned ones among them, were used: by default in their stamps."""
        self.stamp[places] = self.now + 1

    def admitted(self, places: Places) -> None:
        """Note that neurons have a slot now: by default in their stamps."""
        self.stamp[places] = self.now

    @abstractmethod
    def victims(self, count: int) -> Places:
        """Choose `count` of the `evictable` neurons to make room."""


def make_cache(policy: str, neurons: int, capacity: int, pinned: int = 0) -> NeuronCache:
    """One MLP's cache of the named policy."""
    cache: NeuronCache = CACHE_POLICIES[policy](neurons, capacity, pinned)
    return cache
