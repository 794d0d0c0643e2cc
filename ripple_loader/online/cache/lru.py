"""The least recently used neuron makes room: the baseline."""

from __future__ import annotations

from ripple_loader.online.cache.base import NeuronCache
from ripple_loader.registry import CACHE_POLICIES
from ripple_loader.storage.collapse import Places


@CACHE_POLICIES.register("lru")
class LruCache(NeuronCache):
    """Admits every neuron and drops the least recently used."""

    def victims(self, count: int) -> Places:
        return self.oldest(self.evictable(), count)
