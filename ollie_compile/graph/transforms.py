"""How the constants of a frozen graph come from its weights, as a function that serves other weights too."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter

import torch
from torch import Tensor, fx, nn

from ollie_compile.measure.isolation import outside_compilation

Function = Callable[..., Sequence[Tensor]]


class Transforms:
    """Records, while a graph is folded, how its constants come from its weights.

    Args:
        gm: the graph.
        weights: the tensors that it gets as constants; its other constants are the same for all weights.
    """

    def __init__(self, gm: fx.GraphModule, weights: Sequence[Tensor]) -> None:
        self._gm, self._graph, self._root = gm, fx.Graph(), nn.Module()
        self._tensors: list[Tensor] = []  # alive, so that no other tensor gets their `id`
        self._nodes: dict[int, fx.Node] = {}
        self._changing: set[fx.Node] = set()  # what differs between weights
        for place, weight in enumerate(weights):
            node = self._graph.placeholder(f"weight_{place}")
            self._changing.add(node)
            self._keep(weight, node)

    def folded(self, gm: fx.GraphModule, node: fx.Node, constant: Tensor) -> None:
        """Record that `constant` takes the place of a node, which depends on constants alone."""
        if gm is not self._gm or id(constant) in self._nodes:
            return
        copies: dict[fx.Node, fx.Node] = {}

        def copied(source: fx.Node) -> fx.Node:
            if source.op == "get_attr":
                return self._constant(attrgetter(str(source.target))(gm))
            if source not in copies:
                copies[source] = made = self._graph.node_copy(source, copied)
                made.meta = {}
                if not self._changing.isdisjoint(made.all_input_nodes):
                    self._changing.add(made)
            return copies[source]

        self._keep(constant, copied(node))

    def changes(self, constant: Tensor) -> bool:
        """Whether a constant differs between weights."""
        return self._nodes.get(id(constant)) in self._changing

    def function(self, constants: Sequence[Tensor]) -> Function:
        """A function of weights that gives these constants; what was recorded goes into it."""
        self._graph.output(tuple(self._nodes[id(constant)] for constant in constants))
        self._graph.eliminate_dead_code()
        return fx.GraphModule(self._root, self._graph)

    def _keep(self, tensor: Tensor, node: fx.Node) -> None:
        self._tensors.append(tensor)
        self._nodes[id(tensor)] = node

    def _constant(self, tensor: Tensor) -> fx.Node:
        if id(tensor) not in self._nodes:
            name = f"constant_{len(self._tensors)}"
            self._root.register_buffer(name, tensor)
            self._keep(tensor, self._graph.get_attr(name))
        return self._nodes[id(tensor)]


def transformed(function: Function, weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """The constants of a frozen graph for these weights."""
    with outside_compilation():
        return function(*(weight.detach() for weight in weights))


def agree(function: Function, weights: Sequence[Tensor], constants: Sequence[Tensor]) -> bool:
    """Whether the function gives these constants, value by value."""
    with outside_compilation():
        return all(map(_equal, transformed(function, weights), constants))


def _equal(one: Tensor, other: Tensor) -> bool:
    layouts = [(t.shape, t.dtype, t.device, t.layout) for t in (one, other)]
    if layouts[0] != layouts[1] or one.is_mkldnn:  # MKL leaves parts of packed weights unwritten
        return layouts[0] == layouts[1]
    same = one.stride() == other.stride()
    return same and bool(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True).all())
