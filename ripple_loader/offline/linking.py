"""Ripple's greedy linking: a short path through a layer's neurons, the nearest pairs first."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import numpy as np

from ripple_loader.offline.coactivation import Activity, CoActivation, Indices, coactivation


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
        """Join the pairs in turn, except those that would branch or close a path; returns how many."""
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

    def ends(self, members: Indices) -> Indices:
        """The members that have fewer than two links."""
        return np.array([n for n in members.tolist() if len(self.neighbours[n]) < 2], np.int64)

    def walk(self, members: Indices) -> Indices:
        """The members in path order, once all lie on one path."""
        if len(members) < 2:
            return members
        here = next(n for n in members.tolist() if len(self.neighbours[n]) == 1)
        order, before = [here], -1
        while len(order) < len(members):
            here, before = next(n for n in self.neighbours[here] if n != before), here
            order.append(here)
        return np.array(order, np.int64)


def greedy_linking(activity: Activity, members: Indices, partners: int, graph: CoActivation) -> Indices:
    """Link the nearest neurons first, then, round by round, the nearest ends of the resulting paths.

    Paths that were never active together are chained in the model's own order.

    Args:
        activity: the layer's active sets.
        members: the neurons to order, ascending.
        partners: how many partners of each path end are considered in a round.
        graph: of the members, for the first round.
    """
    paths = _Paths(activity.neurons)
    ends = members
    while paths.links < len(members) - 1:
        if not paths.link(zip(graph.first.tolist(), graph.second.tolist(), strict=True)):
            paths.link(itertools.pairwise(ends.tolist()))
        ends = paths.ends(members)
        graph = coactivation(activity, max(partners, 2), ends)
    return paths.walk(members)
