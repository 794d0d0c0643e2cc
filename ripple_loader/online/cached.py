"""The cached neurons: a cache for each MLP, and the bundles in its slots.

Dimension key: N neurons, B bytes of a bundle.
"""

from __future__ import annotations

import numpy as np
import torch

from ripple_loader.format.layout import SidecarHeader
from ripple_loader.online.budget import Allocation
from ripple_loader.online.cache import NeuronCache, Slots, make_cache
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import Places

_ROWS_COPIED_AT_ONCE = 32


class CachedNeurons:
    """The caches of all MLPs; a budget without memory for neurons has no caches.

    Args:
        header: of the sidecar.
        allocation: the slots of each MLP.
        policy: of the caches.
        whole: whether every MLP always needs all neurons; each slot then keeps its first neuron.

    Attributes:
        bundles: of each MLP, in its slots, uint8, shape (slots, B).
    """

    def __init__(self, header: SidecarHeader, allocation: Allocation, policy: str, *, whole: bool) -> None:
        self._neurons, self._policy = header.neurons, policy
        slots = allocation.cache_slots
        self._sizes = [
            (count, count if whole else min(hot, count))
            for count, hot in zip(slots, header.hot, strict=True)
            if any(slots)
        ]
        self.bundles = [
            torch.empty(count, header.bundle_bytes, dtype=torch.uint8) for count, _ in self._sizes
        ]
        self._rows = [bundles.numpy() for bundles in self.bundles]
        self.reset()

    def reset(self) -> None:
        """Forget all neurons but the pinned ones."""
        self._caches: list[NeuronCache] = [
            make_cache(self._policy, self._neurons, *sizes) for sizes in self._sizes
        ]

    @property
    def pinned(self) -> list[int]:
        """For each MLP, how many of its first neurons permanently hold the slots of the same number."""
        return [cache.pinned for cache in self._caches]

    def lookup(self, layer: int, places: Places) -> Slots:
        """The slot of each neuron, -1 where it is not cached; counts as a use."""
        return self._caches[layer].lookup(places) if self._caches else np.full(len(places), -1, np.int64)

    def absent(self, layer: int, places: Places) -> Places:
        """The neurons that are not cached; does not count as a use of the others."""
        return self._caches[layer].absent(places) if self._caches else places

    def admit(self, layer: int, places: Places, spots: Places, buffer: AlignedBuffer) -> int:
        """Copy some of the neurons that were just read into the cache; returns how many others made room.

        Args:
            layer: which MLP.
            places: the neurons, not cached, ascending.
            spots: the offsets of their bundles in the buffer.
            buffer: the buffer that they were read into.
        """
        if not self._caches or self._caches[layer].pinned == self._caches[layer].capacity:
            return 0
        cache = self._caches[layer]
        before = cache.evictions
        admission = cache.offer(places)
        self.store(layer, admission.slots, spots[admission.index], buffer)
        return cache.evictions - before

    def store(self, layer: int, slots: Slots, spots: Places, buffer: AlignedBuffer) -> None:
        """Copy bundles from a buffer into slots."""
        # numpy copies whole rows where torch's index_copy_ goes byte by byte, which takes 40 times as long.
        rows = self._rows[layer]
        memory = np.frombuffer(buffer.memory, np.uint8)
        everywhere = np.lib.stride_tricks.sliding_window_view(memory, rows.shape[1])
        for start in range(0, len(slots), _ROWS_COPIED_AT_ONCE):
            part = slice(start, start + _ROWS_COPIED_AT_ONCE)
            rows[slots[part]] = everywhere[spots[part]]
