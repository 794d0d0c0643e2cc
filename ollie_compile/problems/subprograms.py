"""Subprograms of an aten graph: linear operators whose products may be derived together (OLLIE, section 5.1).

The graph is split where an operator is not linear, or where a value is used more than once. Two kinds of
subprograms are kept: a tree with several products, or with one that reads windows; and products of one
tensor side by side, whose results lie in one. A user's operator is a subprogram of its own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from ollie_compile.compat import FakeTensorMode
from ollie_compile.expr import Input, Read, Scope, Tensor
from ollie_compile.lift import movement
from ollie_compile.lift.aten import (
    Terms,
    UnliftableError,
    constant_of,
    contractions,
    lift_node,
    reads_windows,
    unsupported,
)
from ollie_compile.lift.declared import DECLARED
from ollie_compile.lift.products import shape_of
from ollie_compile.problems.operators import Layout, Subprogram

logger = logging.getLogger(__name__)

MOST_PRODUCTS = 8  # of one subprogram; more would take a search out of its budget
MOST_NODES = 64  # of one subprogram

aten = torch.ops.aten
_SIDES = {aten.mm.default: -1, aten.addmm.default: -1, aten.convolution.default: 1}


@dataclass(frozen=True, slots=True)
class Site:
    """Where an operator or a subprogram stands in a graph.

    Args:
        nodes: its nodes in the graph's order.
        roots: the nodes that give its results.
        inputs: the nodes outside that it reads, in the order of its expression's inputs.
    """

    nodes: tuple[fx.Node, ...]
    roots: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]

    def reading(self, replaced: Mapping[fx.Node, fx.Node]) -> Site:
        """The site with the inputs that now give the values of replaced ones."""
        return replace(self, inputs=tuple(replaced.get(source, source) for source in self.inputs))


@dataclass(frozen=True, slots=True)
class _Tree:
    """A node's value over what comes from outside the nodes of its tree."""

    terms: Terms
    nodes: frozenset[fx.Node]


def find(graph: fx.Graph, fixed: frozenset[fx.Node]) -> list[tuple[Subprogram, Site]]:
    """The subprograms of an inference graph, no two with a node in common.

    Args:
        fixed: nodes whose values are the same in every call.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    trees = _trees(graph)
    taken = {node for tree in trees.values() for node in tree.nodes}
    inner = {
        node for node in taken if any(user in trees and node in trees[user].nodes for user in node.users)
    }
    found = []
    used: set[fx.Node] = set()
    for root, tree in trees.items():
        products = contractions(tree.terms)
        if root in inner or not 1 <= len(products) <= MOST_PRODUCTS:
            continue
        convolved = any(node.target is aten.convolution.default for node in tree.nodes)
        if len(products) > 1 or (not convolved and reads_windows(products[0])):
            made = _subprogram("a sum of products", [root], tree.nodes, fixed, order)
            if made is not None:
                found.append(made)
                used |= tree.nodes
    for group in _side_by_side(trees, used):
        nodes = frozenset(node for root in group for node in trees[root].nodes)
        made = _subprogram("products side by side", group, nodes, fixed, order)
        if made is not None and _late(graph, made[1]) is not None:
            found.append(made)
    for node in declared(graph):
        if unsupported(node) is None:
            made = _subprogram(str(node.target), [node], frozenset({node}), fixed, order)
            assert made is not None, "users' operators return contiguous tensors"
            found.append(made)
    return found


def declared(graph: fx.Graph) -> list[fx.Node]:
    """Calls of users' operators."""
    return [node for node in graph.nodes if node.target in DECLARED]


def _trees(graph: fx.Graph) -> dict[fx.Node, _Tree]:
    """For each node that can be lifted, the largest tree of linear operators that ends in it."""
    trees: dict[fx.Node, _Tree] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node.target in DECLARED:
            continue
        below = {a: trees[a] for a in node.all_input_nodes if a in trees and len(a.users) == 1}
        if sum(len(tree.nodes) for tree in below.values()) >= MOST_NODES:
            below = {}
        for inside in (below, {}) if below else ({},):
            try:
                terms = _lift(node, {a: tree.terms for a, tree in inside.items()})
            except UnliftableError:
                continue
            except Exception:  # a fault in one lift must not cost the others their subprograms
                logger.debug("ollie: %s is not lifted", node, exc_info=True)
                continue
            nodes = frozenset({node}).union(*(tree.nodes for tree in inside.values()))
            trees[node] = _Tree(terms, nodes)
            break
    return trees


def _lift(node: fx.Node, values: dict[fx.Node, Terms]) -> Terms:
    def operand(source: fx.Node) -> Terms:
        return values.get(source) or (Input(source.name, tuple(source.meta["val"].shape)),)

    return lift_node(node, operand, lambda number: Input(f"number_{number!r}", ()))


def _side_by_side(trees: dict[fx.Node, _Tree], used: set[fx.Node]) -> list[list[fx.Node]]:
    """Groups of products that read one tensor alike."""
    groups: dict[object, list[fx.Node]] = {}
    for node, tree in trees.items():
        if node.target not in _SIDES or tree.nodes & used:
            continue
        products = contractions(tree.terms)
        if len(products) != 1 or len(products[0].factors) != 2:
            continue
        side = _SIDES[node.target] % len(shape_of(products[0]))
        settings = node.args[6:] if node.target is aten.convolution.default else ()
        if settings and settings != (False, [0] * len(node.args[3]), 1):
            continue
        steps = repr(node.args[3:6:2]) if settings else ""
        rest = tuple(size for place, size in enumerate(shape_of(products[0])) if place != side)
        key = (products[0].factors[0].tensor, rest, steps, node.target is aten.convolution.default)
        groups.setdefault(key, []).append(node)
    return [group[:MOST_PRODUCTS] for group in groups.values() if len(group) > 1]


def _subprogram(
    kind: str,
    roots: Sequence[fx.Node],
    nodes: frozenset[fx.Node],
    fixed: frozenset[fx.Node],
    order: dict[fx.Node, int],
) -> tuple[Subprogram, Site] | None:
    """The nodes lifted together, with names that do not depend on the graph."""
    inside = sorted(nodes, key=order.__getitem__)
    outside: dict[fx.Node, str] = {}
    numbers: dict[float, str] = {}
    values: dict[fx.Node, Terms] = {}
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}

    def operand(source: fx.Node) -> Terms:
        if source not in values:
            name = outside.setdefault(source, f"X{len(outside)}")
            values[source] = (Input(name, tuple(source.meta["val"].shape)),)
        return values[source]

    def scalar(number: float) -> Tensor:
        return Input(numbers.setdefault(number, f"s{len(numbers)}"), ())

    for node in inside:
        values[node] = lift_node(node, operand, scalar)
    outputs = tuple(Layout.of(root.meta["val"]) for root in roots)
    if not all(layout.dense for layout in outputs):
        return None
    constants = torch.nn.Module()
    for source in outside:
        copies[source] = graph.placeholder(source.name)
    for node in inside:
        for source in node.all_input_nodes:
            if source not in copies:  # an index that the graph holds
                value = constant_of(source)
                assert value is not None, "what is lifted comes from inside or outside"
                constants.register_buffer(source.name, value)
                copies[source] = graph.get_attr(source.name)
        cast = node.target is torch.ops.prims.convert_element_type.default  # to the dtype it has
        copies[node] = copies[node.all_input_nodes[0]] if cast else graph.node_copy(node, copies.__getitem__)
    results = tuple(copies[root] for root in roots)
    graph.output(results if len(roots) > 1 else results[0])
    side = _SIDES.get(roots[0].target, 0) % len(outputs[0].shape)
    scope = _together([values[root] for root in roots], side)
    value = roots[0].meta["val"]
    operator = Subprogram(
        kind=kind,
        scope=scope,
        side=side,
        layouts=tuple((name, Layout.of(source.meta["val"])) for source, name in outside.items()),
        outputs=outputs,
        parameters=(*(name for source, name in outside.items() if source in fixed), *numbers.values()),
        numbers=tuple((name, number) for number, name in numbers.items()),
        dtype=value.dtype,
        device=value.device,
        steps=len(contractions((scope,))) or 1,
        declared=roots[0].target in DECLARED,
        graph=fx.GraphModule(constants, graph),
    )
    return operator, Site(tuple(inside), tuple(roots), tuple(outside))


def resized(operator: Subprogram, layouts: Sequence[Layout]) -> Subprogram:
    """A subprogram with inputs of other sizes, none of which is an argument of its operators."""
    graph = fx.Graph(operator.graph)
    copies: dict[fx.Node, fx.Node] = {}
    fixed: set[fx.Node] = set()
    inputs = zip(operator.layouts, layouts, strict=True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in operator.graph.graph.nodes:
            if node.op == "output":
                break
            copy = copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op == "placeholder":
                (name, _), layout = next(inputs)
                value = torch.empty_strided(
                    layout.shape, layout.stride, dtype=operator.dtype, device=operator.device
                )
                if name in operator.parameters:
                    fixed.add(copy)
            elif node.op == "get_attr":
                value = getattr(operator.graph, str(node.target))
            else:
                arguments, named = fx.map_arg((copy.args, copy.kwargs), lambda source: source.meta["val"])
                value = copy.target(*arguments, **named)
            copy.meta["val"] = value
    (results,) = node.args
    roots = [copies[root] for root in (results if isinstance(results, tuple) else (results,))]
    nodes = frozenset(copy for copy in graph.nodes if copy.op == "call_function")
    order = {copy: place for place, copy in enumerate(graph.nodes)}
    made = _subprogram(operator.kind, roots, nodes, frozenset(fixed), order)
    if made is None:
        raise ValueError("its results are not dense at other sizes")
    return made[0]


def _together(values: Sequence[Terms], side: int) -> Scope:
    """The sum of all terms, those of each result at its place along a dimension."""
    sizes = list(shape_of(values[0][0]))
    sizes[side] = sum(shape_of(terms[0])[side] for terms in values)
    pads = [(0, 0)] * len(sizes)
    factors: list[Read] = []
    loops = movement.pad(values[0][0], pads).traversal
    start = 0
    for terms in values:
        width = shape_of(terms[0])[side]
        pads[side] = (start, sizes[side] - start - width)
        for term in terms:
            scope = movement.pad(term, pads)
            loops = scope.traversal
            factors += scope.factors
        start += width
    if len(factors) == 1 and isinstance(factors[0].tensor, Scope):
        return factors[0].tensor
    return Scope(loops, (), tuple(factors), "+")


def gather(graph: fx.Graph, site: Site) -> bool:
    """Move what the roots read ahead of the first of them; False where that needs one of them."""
    late = _late(graph, site)
    if late:
        first = next(node for node in graph.nodes if node in site.roots)
        for node in late:
            first.prepend(node)
    return late is not None


def _late(graph: fx.Graph, site: Site) -> list[fx.Node] | None:
    """What the roots read and what that needs, after the first of them in a graph; None if one of them is."""
    order = {node: at for at, node in enumerate(graph.nodes)}
    first = min(site.roots, key=order.__getitem__)
    late: set[fx.Node] = set()
    queue = [node for node in site.inputs if order[node] >= order[first]]
    while queue:
        node = queue.pop()
        if node in site.nodes or node.op == "placeholder":
            return None
        if node not in late:
            late.add(node)
            queue += [source for source in node.all_input_nodes if order[source] >= order[first]]
    return sorted(late, key=order.__getitem__)
