"""S3-FIFO: neurons that are used once pass through a small queue, so that a scan drops no others."""

from __future__ import annotations

import numpy as np

from ripple_loader.online.cache.base import NeuronCache
from ripple_loader.registry import CACHE_POLICIES
from ripple_loader.storage.collapse import Places


@CACHE_POLICIES.register("s3fifo")
class S3FifoCache(NeuronCache):
    """S3-FIFO (Yang et al., SOSP 2023).

    New neurons enter a small queue, a tenth of the slots. Neurons that are used again there move to the main
    queue; the others leave, and enter the main queue directly if they come back soon.
    """

    SMALL_SHARE = 0.1

    _ABSENT, _SMALL, _MAIN = range(3)

    def __init__(self, neurons: int, capacity: int, pinned: int = 0) -> None:
        super().__init__(neurons, capacity, pinned)
        self._room = capacity - pinned
        self._queue = np.zeros(neurons, np.uint8)
        self._uses = np.zeros(neurons, np.uint8)
        self._left_at = np.full(neurons, -1, np.int64)
        self._departures = 0

    def used(self, places: Places) -> None:
        self._uses[places] = np.minimum(self._uses[places] + 1, 3)

    def admitted(self, places: Places) -> None:
        super().admitted(places)
        known = (self._left_at[places] >= 0) & (self._departures - self._left_at[places] < self._room)
        self._queue[places] = np.where(known, self._MAIN, self._SMALL)
        self._uses[places] = 0

    def victims(self, count: int) -> Places:
        limit = int(self.SMALL_SHARE * self._room)
        small = np.flatnonzero(self._queue == self._SMALL)
        in_main = np.count_nonzero(self._queue == self._MAIN)
        passed = small[np.argsort(self.stamp[small], kind="stable")]
        passed = passed[: max(len(small) - limit, count - in_main, 0)]
        used = self._uses[passed] > 0
        self._queue[passed[used]], self.stamp[passed[used]] = self._MAIN, self.now
        leaving = passed[~used][:count]
        self._queue[leaving] = self._ABSENT
        self._left_at[leaving] = self._departures
        self._departures += len(leaving)
        if len(leaving) == count:
            return leaving
        return np.concatenate([leaving, self._from_main(count - len(leaving))])

    def _from_main(self, count: int) -> Places:
        """`count` neurons of the main queue, which turns until as many came up unused; a turn takes a use."""
        main = np.flatnonzero(self._queue == self._MAIN)
        rank = (self._uses[main].astype(np.int64) << 48) + self.stamp[main]
        leaving = main[np.argpartition(rank, count - 1)[:count]]
        turns = self._uses[leaving].max()
        self._uses[main] = np.maximum(self._uses[main], turns) - turns
        self._queue[leaving] = self._ABSENT
        return leaving
