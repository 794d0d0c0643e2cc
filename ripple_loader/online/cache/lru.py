"""The least recently used neuron makes room: the baseline."""

from __future__ import annotations

import numpy as np

from ripple_loader.online.cache.base import NeuronCache
from ripple_loader.registry import CACHE_POLICIES
from ripple_loader.storage.collapse import Places


@CACHE_POLICIES.register("lru")
class LruCache(NeuronCache):
    """Admits every neuron and drops the least recently used."""

    def _touch(self, places: Places) -> None:
        self._stamp[places] = self._now + 1

    def _insert(self, places: Places) -> None:
        pass

    def _victims(self, count: int) -> Places:
        return self._oldest(self.pinned + np.flatnonzero(self._slot[self.pinned :] >= 0), count)
