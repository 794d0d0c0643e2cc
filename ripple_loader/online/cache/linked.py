"""Ripple's policy: S3-FIFO that seldom admits long runs."""

from __future__ import annotations

import numpy as np

from ripple_loader.online.cache.base import Slots
from ripple_loader.online.cache.s3fifo import S3FifoCache
from ripple_loader.registry import CACHE_POLICIES
from ripple_loader.storage.collapse import Places


@CACHE_POLICIES.register("linked")
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

    def choose(self, places: Places) -> Slots:
        free = len(self.free)
        if len(places) <= free:
            return np.arange(len(places))
        run = np.cumsum(np.append(True, np.diff(places) != 1)) - 1
        lengths = np.bincount(run)
        lucky = self._random.random(len(lengths)) < self.LONG_RUN_ADMISSION
        fits = lengths <= max(self.LONG_RUN, self.SMALL_SHARE * self._room)
        wanted = ((lengths < self.LONG_RUN) | (lucky & fits))[run]
        wanted[:free] = True
        return np.flatnonzero(wanted)
