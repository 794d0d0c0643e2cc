"""Subprograms of an aten graph: linear operators whose products may be derived together (OLLIE, section 5.1).

The graph is split where an operator is not linear, or where a value is used more than once. Two kinds of
subprograms are kept: a tree with several products, or with one that reads windows; and products of one
tensor side by side, whose results lie in one. A user's operator is a subprogram of its own.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

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
    operands,
    reads_windows,
    with_inputs,
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
    """The nodes of an operator or a subprogram in a graph.

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


@dataclass(frozen=True)
class _Tree:
    """The value of a node over inputs from outside the nodes of its tree, lifted once.

    Inputs have the names of their nodes, and numbers are inputs that `_number` names.
    """

    terms: Terms
    nodes: frozenset[fx.Node]

    @functools.cached_property
    def products(self) -> list[Scope]:
        return contractions(self.terms)


_NUMBER = "number "  # begins the names of numbers, and of no nodes


def _number(number: float) -> str:
    return f"{_NUMBER}{float(number)!r}"


def find(graph: fx.Graph, fixed: frozenset[fx.Node]) -> list[tuple[Subprogram, Site]]:
    """The subprograms of an inference graph, no two with a node in common.

    Args:
        fixed: nodes whose values are the same in every call.
    """
    trees = _trees(graph)
    found = []
    used: set[fx.Node] = set()
    for root, tree in _sums(trees).items():
        subprogram = _subprogram("a sum of products", {root: tree}, fixed)
        if subprogram is not None:
            found.append(subprogram)
            used |= tree.nodes
    for group in _side_by_side(trees, used):
        subprogram = _subprogram("products side by side", {root: trees[root] for root in group}, fixed)
        if subprogram is not None and _late(graph, subprogram[1]) is not None:
            found.append(subprogram)
    for node in declared(graph):
        declared_tree = _tree(node, {})
        if declared_tree is not None:
            subprogram = _subprogram(str(node.target), {node: declared_tree}, fixed)
            assert subprogram is not None, "users' operators return contiguous tensors"
            found.append(subprogram)
    return found


def _sums(trees: dict[fx.Node, _Tree]) -> dict[fx.Node, _Tree]:
    """The trees that no larger one holds, of several products, or of one that reads windows."""
    inner = {node for root, tree in trees.items() for node in tree.nodes if node is not root}
    return {
        root: tree
        for root, tree in trees.items()
        if root not in inner and len(tree.products) <= MOST_PRODUCTS and _is_sum(tree)
    }


def _is_sum(tree: _Tree) -> bool:
    if len(tree.products) != 1:
        return len(tree.products) > 1
    convolved = any(node.target is aten.convolution.default for node in tree.nodes)
    return not convolved and reads_windows(tree.products[0])


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
        tree = _tree(node, below) or (_tree(node, {}) if below else None)
        if tree is not None:
            trees[node] = tree
    return trees


def _tree(node: fx.Node, below: dict[fx.Node, _Tree]) -> _Tree | None:
    """The tree of a node and of those below it; None if it is no linear expression of their inputs."""

    def operand(source: fx.Node) -> Terms:
        tree = below.get(source)
        return tree.terms if tree is not None else (_input(source),)

    try:
        terms = lift_node(node, operand, lambda number: Input(_number(number), ()))
    except UnliftableError:
        return None
    except Exception:  # a fault in one lift must not cost the others their subprograms
        logger.debug("ollie: %s is not lifted", node, exc_info=True)
        return None
    return _Tree(terms, frozenset({node}).union(*(tree.nodes for tree in below.values())))


def _input(source: fx.Node) -> Input:
    return Input(source.name, tuple(source.meta["val"].shape))


def _side_by_side(trees: dict[fx.Node, _Tree], used: set[fx.Node]) -> list[list[fx.Node]]:
    """Groups of products that read one tensor alike."""
    groups: dict[object, list[fx.Node]] = {}
    for node, tree in trees.items():
        if node.target not in _SIDES or tree.nodes & used:
            continue
        if len(tree.products) != 1 or len(tree.products[0].factors) != 2:
            continue
        (product,) = tree.products
        side = _SIDES[node.target] % len(shape_of(product))
        settings = node.args[6:] if node.target is aten.convolution.default else ()
        if settings and settings != (False, [0] * len(node.args[3]), 1):
            continue
        steps = repr(node.args[3:6:2]) if settings else ""
        rest = tuple(size for place, size in enumerate(shape_of(product)) if place != side)
        key = (product.factors[0].tensor, rest, steps, node.target is aten.convolution.default)
        groups.setdefault(key, []).append(node)
    return [group[:MOST_PRODUCTS] for group in groups.values() if len(group) > 1]


def _subprogram(
    kind: str, trees: dict[fx.Node, _Tree], fixed: frozenset[fx.Node]
) -> tuple[Subprogram, Site] | None:
    """The trees as one operator, its names independent of the graph; None if a result is not dense."""
    roots = tuple(trees)
    nodes = frozenset().union(*(tree.nodes for tree in trees.values()))
    inside = tuple(node for node in roots[0].graph.nodes if node in nodes)
    outputs = tuple(Layout.of(root.meta["val"]) for root in roots)
    if not all(layout.dense for layout in outputs):
        return None
    read = dict.fromkeys(source for node in inside for source in operands(node))
    outside = tuple(source for source in read if source not in nodes)
    names = {source: f"X{place}" for place, source in enumerate(outside)}
    numbers = _numbers(trees.values())
    renamed: dict[str, Tensor] = {
        source.name: Input(name, _input(source).shape) for source, name in names.items()
    }
    renamed |= {_number(number): Input(name, ()) for number, name in numbers.items()}
    side = _SIDES.get(roots[0].target, 0) % len(outputs[0].shape)
    terms = [tuple(with_inputs(term, renamed) for term in tree.terms) for tree in trees.values()]
    scope = _together(terms, side)
    value = roots[0].meta["val"]
    operator = Subprogram(
        kind=kind,
        scope=scope,
        side=side,
        layouts=tuple((name, Layout.of(source.meta["val"])) for source, name in names.items()),
        outputs=outputs,
        parameters=(*(name for source, name in names.items() if source in fixed), *numbers.values()),
        numbers=tuple((name, number) for number, name in numbers.items()),
        dtype=value.dtype,
        device=value.device,
        steps=len(contractions((scope,))) or 1,
        declared=roots[0].target in DECLARED,
        graph=_extracted(inside, roots, outside),
    )
    return operator, Site(inside, roots, outside)


def _numbers(trees: Iterable[_Tree]) -> dict[float, str]:
    """The numbers in some trees, with names."""
    scopes = [term for tree in trees for term in tree.terms if isinstance(term, Scope)]
    inputs = dict.fromkeys(name for scope in scopes for name in scope.inputs())
    inputs |= dict.fromkeys(term.name for tree in trees for term in tree.terms if isinstance(term, Input))
    found = [float(name.removeprefix(_NUMBER)) for name in inputs if name.startswith(_NUMBER)]
    return {number: f"s{place}" for place, number in enumerate(found)}


def _extracted(
    inside: Sequence[fx.Node], roots: Sequence[fx.Node], outside: Sequence[fx.Node]
) -> fx.GraphModule:
    """The nodes of a site as a module of their own, from the nodes outside to the roots."""
    graph = fx.Graph()
    constants = torch.nn.Module()
    copies = {source: graph.placeholder(source.name) for source in outside}
    for node in inside:
        for source in node.all_input_nodes:
            if source not in copies:  # an index that the graph holds
                value = constant_of(source)
                assert value is not None, "each input is inside, outside or a constant"
                constants.register_buffer(source.name, value)
                copies[source] = graph.get_attr(source.name)
        cast = node.target is torch.ops.prims.convert_element_type.default  # to the dtype it has
        copies[node] = copies[node.all_input_nodes[0]] if cast else graph.node_copy(node, copies.__getitem__)
    results = tuple(copies[root] for root in roots)
    graph.output(results if len(roots) > 1 else results[0])
    return fx.GraphModule(constants, graph)


def resized(operator: Subprogram, layouts: Sequence[Layout]) -> Subprogram:
    """A subprogram with inputs of other sizes, none of which is an argument of its operators.

    Raises:
        ValueError: at these sizes the operators are not lifted together.
    """
    graph, roots, fixed = _with_shapes(operator, layouts)
    nodes = {node for node in graph.nodes if node.op == "call_function"}
    trees = _trees(graph)
    of_roots = {root: trees[root] for root in roots if root in trees}
    if len(of_roots) < len(roots) or nodes != set().union(*(tree.nodes for tree in of_roots.values())):
        raise ValueError("it is no such subprogram at other sizes")
    found = _subprogram(operator.kind, of_roots, fixed)
    if found is None:
        raise ValueError("its results are not dense at other sizes")
    return found[0]


def _with_shapes(
    operator: Subprogram, layouts: Sequence[Layout]
) -> tuple[fx.Graph, list[fx.Node], frozenset[fx.Node]]:
    """A copy of an operator's graph for inputs of other layouts, its roots, and its fixed inputs."""
    graph = fx.Graph(operator.graph)
    copies: dict[fx.Node, fx.Node] = {}
    inputs = operator.graph.graph.find_nodes(op="placeholder")
    given = dict(zip(inputs, layouts, strict=True))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for node in operator.graph.graph.nodes:
            if node.op != "output":
                copies[node] = graph.node_copy(node, copies.__getitem__)
                copies[node].meta["val"] = _value(operator, copies[node], given.get(node))
    (results,) = operator.graph.graph.output_node().args
    roots = [copies[root] for root in (results if isinstance(results, tuple) else (results,))]
    names = zip(inputs, operator.layouts, strict=True)
    fixed = frozenset(copies[node] for node, (name, _) in names if name in operator.parameters)
    return graph, roots, fixed


def _value(operator: Subprogram, node: fx.Node, layout: Layout | None) -> Any:
    """A tensor without values of a node in a copy of an operator's graph.

    Args:
        layout: of an input.
    """
    if layout is not None:
        return torch.empty_strided(layout.shape, layout.stride, dtype=operator.dtype, device=operator.device)
    if node.op == "get_attr":
        return getattr(operator.graph, str(node.target))
    arguments, named = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
    return node.target(*arguments, **named)


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
    """Move all nodes that the roots read ahead of the first root; False if these nodes need a root."""
    late = _late(graph, site)
    if late:
        first = next(node for node in graph.nodes if node in site.roots)
        for node in late:
            first.prepend(node)
    return late is not None


def _late(graph: fx.Graph, site: Site) -> list[fx.Node] | None:
    """The nodes after the first root that the roots depend on; None if a root is among them."""
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
