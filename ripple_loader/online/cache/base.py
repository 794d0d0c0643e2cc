"""The neuron cache of one layer: which neurons are in memory, and which make room for new ones.

Every operation is a few numpy calls on arrays over the layer's neurons, never a loop over neurons. Each layer
has its own cache: a pass visits the layers in turn, which a shared LRU would turn into a scan.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ripple_loader.registry import CACHE_POLICIES
from ripple_loader.storage.collapse import Places

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


def make_cache(policy: str, neurons: int, capacity: int, pinned: int = 0) -> NeuronCache:
    """One MLP's cache of the named policy."""
    cache: NeuronCache = CACHE_POLICIES[policy](neurons, capacity, pinned)
    return cache
