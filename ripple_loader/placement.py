"""Offline step 3: an order on disk in which co-activated neurons lie together.

The order is a Hamiltonian path through a layer's neurons that should be short in the distance of
`coactivation`. Greedy linking joins the nearest pair first, gives no neuron more than two neighbours and
never closes a circle.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ripple_loader.coactivation import coactivation
from ripple_loader.config import ReorderConfig
from ripple_loader.trace import BitSets, unpack

Order = npt.NDArray[np.int64]
"""A permutation of one layer's neurons, shape (N,): the model's own index of the neuron at each place."""


class _Paths:
    """Disjoint paths over N neurons: union-find plus the neighbours of each neuron."""

    def __init__(self, neurons: int) -> None:
        self.neighbours: list[list[int]] = [[] for _ in range(neurons)]
        self.links = 0
        self._parent = list(range(neurons))

    def _root(self, neuron: int) -> int:
        parent = self._parent
        while parent[neuron] != neuron:
            parent[neuron] = parent[parent[neuron]]
            neuron = parent[neuron]
        return neuron

    def link(self, pairs: Iterable[tuple[int, int]]) -> int:
        """Join the pairs in turn, leaving out those that would branch a path or close it; how many joined."""
        neighbours, before = self.neighbours, self.links
        for first, second in pairs:
            if len(neighbours[first]) < 2 and len(neighbours[second]) < 2:
                a, b = self._root(first), self._root(second)
                if a != b:
                    self._parent[a] = b
                    neighbours[first].append(second)
                    neighbours[second].append(first)
                    self.links += 1
        return self.links - before

    def ends(self) -> npt.NDArray[np.int64]:
        """Neurons that can still be linked."""
        return np.array([n for n, near in enumerate(self.neighbours) if len(near) < 2], np.int64)

    def walk(self) -> Order:
        """The neurons in path order, once all lie on one path."""
        if len(self.neighbours) == 1:
            return np.zeros(1, np.int64)
        here = next(n for n, near in enumerate(self.neighbours) if len(near) == 1)
        order, before = [here], -1
        while len(order) < len(self.neighbours):
            here, before = next(n for n in self.neighbours[here] if n != before), here
            order.append(here)
        return np.array(order, np.int64)


def greedy_linking(sets: BitSets, neurons: int, partners: int) -> Order:
    """Link the nearest neurons first, then, round by round, the nearest ends of the paths this leaves.

    Paths that nothing in the trace connects are chained in the model's own order.
    """
    paths = _Paths(neurons)
    ends = np.arange(neurons)
    while paths.links < neurons - 1:
        graph = coactivation(sets, neurons, max(partners, 2), among=ends)
        if not paths.link(zip(graph.first.tolist(), graph.second.tolist(), strict=True)):
            paths.link(itertools.pairwise(ends.tolist()))
        ends = paths.ends()
    return paths.walk()


def place(sets: BitSets, neurons: int, layer: int, config: ReorderConfig) -> Order:
    """Order one layer's neurons by `config.placement`."""
    match config.placement:
        case "identity":
            return np.arange(neurons)
        case "random":
            return np.random.default_rng((config.seed, layer)).permutation(neurons)
        case "frequency":
            return np.argsort(-unpack(sets, neurons).sum(0, dtype=np.int64), kind="stable")
        case "linked":
            return greedy_linking(sets, neurons, config.partners)


def expected_reads(sets: BitSets, order: Order) -> float:
    """Reads per token that `order` needs: the mean number of runs of active neurons, without merging."""
    active_TN = unpack(sets, len(order))[:, order].astype(np.int8)
    starts: Any = np.diff(active_TN, axis=1, prepend=np.int8(0)) == 1
    return float(starts.sum(1).mean()) if len(sets) else 0.0
