"""Offline step 3: an order on disk in which co-activated neurons lie together.

The order is a Hamiltonian path through a layer's neurons that should be short in the distance of
`coactivation`: greedy linking finds one, and 2-opt turns pieces of it around. Hot neurons, which are active
so often that they are everyone's nearest, come first and stay out of the path: they are pinned in memory.

A new placement is a function from a `LayerActivity` to a `Placed` order that registers its name.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from ripple_loader.config import ReorderConfig
from ripple_loader.offline.active_sets import BitSets
from ripple_loader.offline.coactivation import Activity, CoActivation, Indices, coactivation
from ripple_loader.offline.linking import greedy_linking
from ripple_loader.offline.spectral import spectral_order
from ripple_loader.offline.two_opt import two_opt
from ripple_loader.registry import PLACEMENTS

Order = npt.NDArray[np.int64]
"""A permutation of one layer's neurons, shape (N,): the model's own index of the neuron at each place."""


@dataclass(frozen=True)
class Placed:
    """One layer's order.

    Attributes:
        order: the permutation.
        hot: the number of its first places, whose neurons stay in memory.
    """

    order: Order
    hot: int = 0


@dataclass(frozen=True)
class LayerActivity:
    """The activity of one layer, to order its neurons by; slow parts are computed when they are first used.

    Attributes:
        sets: the active sets to order by.
        neurons: N.
        layer: its number.
        config: how to place.
        hot: how many of the most active neurons to put first in an order by activity.
    """

    sets: BitSets
    neurons: int
    layer: int
    config: ReorderConfig
    hot: int

    @cached_property
    def activity(self) -> Activity:
        """The active sets by neuron."""
        return Activity(self.sets, self.neurons)

    @cached_property
    def by_frequency(self) -> Order:
        """All neurons, the most active first."""
        return np.argsort(-self.activity.counts, kind="stable")

    @cached_property
    def linkable(self) -> Indices:
        """All neurons but the hot ones, ascending."""
        return np.sort(self.by_frequency[self.hot :])

    @cached_property
    def graph(self) -> CoActivation:
        """How often linkable neurons are active together."""
        return coactivation(self.activity, self.config.partners, self.linkable)

    def hot_first(self, path: Indices) -> Placed:
        """The hot neurons, then a path through the others, improved by 2-opt if the configuration says so."""
        if self.config.two_opt:
            path = two_opt(path, self.activity, self.graph)
        return Placed(np.concatenate([self.by_frequency[: self.hot], path]), self.hot)


@PLACEMENTS.register("linked")
def place_linked(layer: LayerActivity) -> Placed:
    """Ripple's greedy linking of co-activated neurons."""
    return layer.hot_first(greedy_linking(layer.activity, layer.linkable, layer.config.partners, layer.graph))


@PLACEMENTS.register("spectral")
def place_spectral(layer: LayerActivity) -> Placed:
    """Sorted by the Fiedler vector of the co-activation graph."""
    return layer.hot_first(spectral_order(layer.graph, layer.linkable))


@PLACEMENTS.register("frequency")
def place_by_frequency(layer: LayerActivity) -> Placed:
    """Sorted by how often each neuron is active."""
    return Placed(layer.by_frequency, layer.hot)


@PLACEMENTS.register("identity")
def place_as_in_model(layer: LayerActivity) -> Placed:
    """The model's own order; no neuron is pinned."""
    return Placed(np.arange(layer.neurons))


@PLACEMENTS.register("random")
def place_at_random(layer: LayerActivity) -> Placed:
    """A random order, by the configuration's seed; no neuron is pinned."""
    return Placed(np.random.default_rng((layer.config.seed, layer.layer)).permutation(layer.neurons))


def place(sets: BitSets, neurons: int, layer: int, config: ReorderConfig, hot: int) -> Placed:
    """Order one layer's neurons by `config.placement`; the arguments are those of `LayerActivity`."""
    placed: Placed = PLACEMENTS[config.placement](LayerActivity(sets, neurons, layer, config, hot))
    return placed
