"""Offline step 3: an order on disk in which co-activated neurons lie together.

The order is a Hamiltonian path through a layer's neurons that should be short in the distance of
`coactivation`. Greedy linking joins the nearest pair first, gives no neuron more than two neighbours and
never closes a circle; 2-opt then turns pieces of the path around. Hot neurons, which are active so often that
they are everyone's nearest, come first and stay out of the path: they are pinned in memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ripple_loader.cache import cache_shares
from ripple_loader.coactivation import Activity, CoActivation, Indices, coactivation
from ripple_loader.config import ReorderConfig
from ripple_loader.trace import BitSets, unpack
from ripple_loader.two_opt import two_opt

_TOKENS_AT_ONCE = 1024
_LEAST_FOR_LOBPCG, _LOBPCG_ROUNDS = 6, 60
_GROUPS = 16

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

    def ends(self, members: Order) -> Order:
        """Members that can still be linked."""
        return np.array([n for n in members.tolist() if len(self.neighbours[n]) < 2], np.int64)

    def walk(self, members: Order) -> Order:
        """The members in path order, once all lie on one path."""
        if len(members) < 2:
            return members
        here = next(n for n in members.tolist() if len(self.neighbours[n]) == 1)
        order, before = [here], -1
        while len(order) < len(members):
            here, before = next(n for n in self.neighbours[here] if n != before), here
            order.append(here)
        return np.array(order, np.int64)


def greedy_linking(activity: Activity, members: Order, partners: int, graph: CoActivation) -> Order:
    """Link the nearest neurons first, then, round by round, the nearest ends of the paths this leaves.

    Paths that nothing in the trace connects are chained in the model's own order.

    Args:
        activity: the layer's active sets.
        members: the neurons to order, ascending.
        partners: how many are kept of each path end, round by round.
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


def spectral_order(graph: CoActivation, members: Order) -> Order:
    """Sort neurons by the second eigenvector of the normalised co-activation graph (the Fiedler vector).

    Neurons without partners come last, in the model's own order.
    """
    first, second = np.searchsorted(members, graph.first), np.searchsorted(members, graph.second)
    ends, count = np.concatenate([[first, second], [second, first]], axis=1), np.tile(graph.count, 2)
    degree = np.bincount(ends[0], weights=count, minlength=len(members))
    linked = np.flatnonzero(degree)
    if len(linked) < _LEAST_FOR_LOBPCG:
        return members
    number = np.searchsorted(linked, ends)
    scale = 1 / np.sqrt(degree[linked])
    weights = torch.from_numpy(count * scale[number[0]] * scale[number[1]])
    size = (len(linked), len(linked))
    normalised = torch.sparse_coo_tensor(
        torch.from_numpy(number), weights, size, device="cpu", check_invariants=True
    )
    start = np.stack([1 / scale, np.random.default_rng(0).standard_normal(len(linked))], axis=1)
    _, vectors = torch.lobpcg(normalised.coalesce(), X=torch.from_numpy(start), niter=_LOBPCG_ROUNDS)
    fiedler = vectors[:, 1].numpy() * scale
    alone = np.flatnonzero(degree == 0)
    return members[np.concatenate([linked[np.argsort(fiedler, kind="stable")], alone])]


@dataclass(frozen=True)
class Placed:
    """One layer's order.

    Attributes:
        order: the permutation.
        hot: how many of its first places hold neurons that stay in memory.
    """

    order: Order
    hot: int = 0


def place(sets: BitSets, neurons: int, layer: int, config: ReorderConfig, hot: int) -> Placed:
    """Order one layer's neurons by `config.placement`.

    Args:
        sets: active sets to order by.
        neurons: of the layer.
        layer: its number, for the random order.
        config: how to place.
        hot: so many neurons, the most active, come first where the order is by activity, see `hot_neurons`.
    """
    match config.placement:
        case "identity":
            return Placed(np.arange(neurons))
        case "random":
            return Placed(np.random.default_rng((config.seed, layer)).permutation(neurons))
    activity = Activity(sets, neurons)
    by_frequency = np.argsort(-activity.counts, kind="stable")
    if config.placement == "frequency":
        return Placed(by_frequency, hot)
    members = np.sort(by_frequency[hot:])
    graph = coactivation(activity, config.partners, members)
    if config.placement == "spectral":
        order = spectral_order(graph, members)
    else:
        order = greedy_linking(activity, members, config.partners, graph)
    if config.two_opt:
        order = two_opt(order, activity, graph)
    return Placed(np.concatenate([by_frequency[:hot], order]), hot)


def hot_neurons(uses: list[Indices], share: float) -> list[int]:
    """How many neurons of each MLP are hot: of those of all MLPs, the share that is active most often.

    Args:
        uses: for how many tokens each neuron is active, shape (N,), by MLP; one that never is cannot be hot.
        share: from 0 to 1.
    """
    active = sum(int(np.count_nonzero(one)) for one in uses)
    return cache_shares(uses, min(active, round(share * sum(len(one) for one in uses))))


def most_active(counts: Indices, hot: int) -> npt.NDArray[np.bool_]:
    """Which neurons are the so many most active ones; of equals the first."""
    found = np.zeros(len(counts), bool)
    found[np.argsort(-counts, kind="stable")[:hot]] = True
    return found


def grouped_uses(counts: Indices) -> list[float]:
    """How much of the activity falls to the most active sixteenth of a layer's neurons, the next, and so on.

    Args:
        counts: tokens each neuron is active for, shape (N,).
    """
    groups = np.array_split(-np.sort(-counts), min(_GROUPS, len(counts)))
    return [float(group.sum()) for group in groups]


def expected_reads(sets: BitSets, order: Order, left_out: npt.NDArray[np.bool_] | None = None) -> float:
    """Reads per token that `order` needs: the mean number of runs of active neurons, without merging.

    Args:
        sets: active sets to count on.
        order: a permutation of the layer's neurons.
        left_out: neurons that are in memory, by their own index, bool of shape (N,).
    """
    total = 0
    for start in range(0, len(sets), _TOKENS_AT_ONCE):
        active_TN = unpack(sets[start : start + _TOKENS_AT_ONCE], len(order))
        if left_out is not None:
            active_TN[:, left_out] = 0
        starts: Any = np.diff(active_TN[:, order].astype(np.int8), axis=1, prepend=np.int8(0)) == 1
        total += int(starts.sum())
    return total / len(sets) if len(sets) else 0.0


@dataclass(frozen=True)
class Plan:
    """An order for every MLP and what it is expected to cost.

    Attributes:
        orders: one permutation an MLP.
        hot: how many of its first places hold neurons that stay in memory.
        exact_zeros: whether inactive neurons are exactly zero.
        bundles: how the sidecar stores weights, see `ReorderConfig`.
        rank: of the predictors, 0 for none.
        profile: placement, tokens, share of neurons active, share of them hot, and reads per token and MLP in
            the model's own order and in this one, without the hot neurons, counted on tokens that did not
            shape it; "uses", for each MLP: see `grouped_uses`.
    """

    orders: list[Order]
    hot: list[int]
    exact_zeros: bool
    bundles: str
    rank: int
    profile: dict[str, Any]
