"""Splicing: a program's aten calls replace the operators of a graph that it computes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ollie_compile import compat
from ollie_compile.compat import (
    FakeTensorMode,
    make_fx,
    select_decomp_table,
    statically_known_true,
    unset_fake_temporarily,
)
from ollie_compile.lower.lowering import Program
from ollie_compile.measure.isolation import without_autocast
from ollie_compile.problems.dynamic import Dynamic, guard
from ollie_compile.problems.operators import Convolution, Operator

logger = logging.getLogger(__name__)

aten = torch.ops.aten

NOT_SPLICED = "its program does not fit into the graph"
_OWN_META = ("val", "tensor_meta", "original_aten", "from_node")


def splice(
    graph: fx.Graph,
    operator: Operator,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    program: Program,
) -> Sequence[fx.Node] | None:
    """Replace the nodes that give an operator's results by the aten calls of `program`.

    Returns:
        the nodes that give the results now; None leaves the graph unchanged, because the program could not be
        traced or gives other shapes, strides or dtypes.
    """
    finished = operator.emit(program) if isinstance(operator, Dynamic) else operator.finished(program)
    convolution = isinstance(operator.base if isinstance(operator, Dynamic) else operator, Convolution)
    bias = nodes[0].args[2] if convolution else None

    def results(*values: Tensor) -> tuple[Tensor, ...]:
        if bias is None:
            made = finished(*values)
            return made if isinstance(made, tuple) else (made,)
        made = finished(*values[1:])
        result = made[0] if isinstance(made, tuple) else made
        return (result + values[0].view(-1, *[1] * (result.dim() - 2)),)

    mode = "symbolic" if isinstance(operator, Dynamic) else "real"
    order = {node: place for place, node in enumerate(graph.nodes)}
    first = min(nodes, key=order.__getitem__)
    with graph.inserting_before(first):
        before = first.prev
        fake_mode = first.meta["val"].fake_mode
        constants = _constants(graph, operator, program, fake_mode)
        operands = [*([] if bias is None else [bias]), *inputs, *constants]
        try:
            if isinstance(operator, Dynamic):
                guard(operator, [source.meta["val"] for source in inputs])
            with fake_mode, without_autocast():
                traced = make_fx(results, select_decomp_table(), mode)(
                    *(operand.meta["val"] for operand in operands)
                )
                _scale_by_numbers(traced.graph)
            for node, result in zip(nodes, traced.graph.output_node().args[0], strict=True):
                _check_same(node.meta["val"], result.meta["val"])
        except Exception:  # a fault here must not take the user's model with it
            logger.warning(
                "ollie: %s: kept the original: the derived program could not be traced into the graph",
                operator,
                exc_info=True,
            )
            while first.prev is not before:
                graph.erase_node(first.prev)
            return None
        places = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
        made = graph.graph_copy(traced.graph, places)
    _inherit(first, before)
    for node, result in zip(nodes, made, strict=True):
        node.replace_all_uses_with(result, propagate_meta=False)
        _erase(node)
    return made


def _inherit(node: fx.Node, before: fx.Node) -> None:
    """Give the meta of a node to those that replace it, between `before` and it.

    Recomputation tags, source lines and module names hold for all of them.
    """
    inherited = {key: value for key, value in node.meta.items() if key not in _OWN_META}
    new = before.next
    while new is not node:
        new.meta = {**new.meta, **inherited}
        new = new.next


def _check_same(wanted: Tensor, got: Tensor) -> None:
    layouts = [(tuple(t.shape), t.stride(), t.dtype, t.device) for t in (wanted, got)]
    same = wanted.dtype == got.dtype and wanted.device == got.device and wanted.dim() == got.dim()
    for place in range(wanted.dim()) if same else ():
        same &= statically_known_true(wanted.shape[place] == got.shape[place])
        one = statically_known_true(wanted.shape[place] == 1)  # any stride is the same
        same &= one or statically_known_true(wanted.stride(place) == got.stride(place))
    if not same:
        raise ValueError(f"The program must give {layouts[0]}, got {layouts[1]}.")


def _erase(node: fx.Node) -> None:
    """Erase a node and what only it used."""
    sources = node.all_input_nodes
    node.graph.erase_node(node)
    for source in sources:
        if not source.users and source.op == "call_function":
            _erase(source)


def _scale_by_numbers(graph: fx.Graph) -> None:
    """Multiply by numbers rather than by tensors that are filled with them.

    Freezing computes ahead whatever depends on constants alone, but a filled tensor is no constant to it: a
    scale would keep the weights beside it from being transformed ahead.
    """
    filled: dict[fx.Node, Any] = {}
    for node in list(graph.nodes):
        if node.target is aten.full.default and not node.args[0]:
            filled[node] = node.args[1]
        elif compat.is_view(node.target) and node.args[0] in filled:
            filled[node] = filled[node.args[0]]
        elif node.target is aten.mul.Tensor:
            _scale(graph, node, filled)
    for node in reversed(filled):
        if not node.users:
            graph.erase_node(node)


def _scale(graph: fx.Graph, product: fx.Node, filled: dict[fx.Node, Any]) -> None:
    """Multiply by a number, if one factor of a product is a filled tensor.

    Args:
        filled: filled tensors with their numbers.
    """
    scales = [source for source in product.args if source in filled]
    others = [source for source in product.args if source not in filled]
    if len(scales) != 1 or len(others) != 1 or not isinstance(others[0], fx.Node):
        return
    value, (scaled,) = product.meta["val"], others
    before = scaled.meta["val"]
    if before.dtype != value.dtype or before.numel() != value.numel():
        return  # of equal size they differ at most in dimensions of size 1
    steps: list[tuple[Any, Any]] = [(aten.mul.Tensor, filled[scales[0]])]
    if value.shape != before.shape:
        steps.append((aten.expand.default, list(value.shape)))
    with graph.inserting_before(product):
        for target, by in steps:
            result = target(scaled.meta["val"], by)
            scaled = graph.call_function(target, (scaled, by))
            scaled.meta = {**product.meta, "val": result}
    product.replace_all_uses_with(scaled, propagate_meta=False)
    graph.erase_node(product)


def _constants(
    graph: fx.Graph, operator: Operator, program: Program, fake_mode: FakeTensorMode
) -> list[fx.Node]:
    """Nodes for the constants of `program`, held by the graph's module as torch.tensor literals are."""
    module = graph.owning_module
    assert module is not None, "Inductor's graphs belong to a module"
    nodes = []
    with unset_fake_temporarily():
        constants = program.constants(operator.dtype, operator.device)
    for name, value in constants.items():
        attribute = f"_ollie_{name}_{value.dtype}_{value.device}".replace(".", "_").replace(":", "_")
        module.register_buffer(attribute, value, persistent=False)
        held = graph.get_attr(attribute)
        lifted = graph.call_function(torch.ops.aten.lift_fresh_copy.default, (held,))
        lifted.meta["val"] = held.meta["val"] = fake_mode.from_tensor(value)
        nodes.append(lifted)
    return nodes
