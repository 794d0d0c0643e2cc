"""Putting a program's aten calls into a graph in the place of the operators that it computes."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.fx.experimental.symbolic_shapes import statically_known_true

from ollie_compile.dynamic import Dynamic, guard
from ollie_compile.lower import Program
from ollie_compile.operators import Convolution, Operator
from ollie_compile.tune import without_autocast

logger = logging.getLogger(__name__)

NOT_SPLICED = "its program does not fit into the graph"
_OWN_META = ("val", "tensor_meta", "original_aten", "from_node")


def splice(
    graph: fx.Graph,
    operator: Operator,
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    program: Program,
) -> Sequence[fx.Node] | None:
    """Put the aten calls of `program` in the place of the nodes that give an operator's results.

    Returns:
        what now gives them; None, with the graph as it was, where the program does not give the same tensors.
    """
    from torch._inductor.decomposition import select_decomp_table
    from torch.fx.experimental.proxy_tensor import make_fx

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
            for node, result in zip(nodes, traced.graph.output_node().args[0], strict=True):
                _check_same(node.meta["val"], result.meta["val"])
        except Exception:  # a fault here must not take the user's model with it
            logger.warning("ollie: %s: left as it is, its program is none", operator, exc_info=True)
            while first.prev is not before:
                graph.erase_node(first.prev)
            return None
        places = dict(zip(traced.graph.find_nodes(op="placeholder"), operands, strict=True))
        places |= _numbers(graph, traced.graph, fake_mode)
        made = graph.graph_copy(traced.graph, places)
    # Recomputation tags, source lines and module names hold for all that stands in the node's place.
    inherited = {key: value for key, value in first.meta.items() if key not in _OWN_META}
    new = before.next
    while new is not first:
        new.meta = {**new.meta, **inherited}
        new = new.next
    for node, result in zip(nodes, made, strict=True):
        node.replace_all_uses_with(result, propagate_meta=False)
        _erase(node)
    return made


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


def _constants(
    graph: fx.Graph, operator: Operator, program: Program, fake_mode: FakeTensorMode
) -> list[fx.Node]:
    """Nodes for the constants of `program`."""
    with unset_fake_temporarily():
        constants = program.constants(operator.dtype, operator.device)
    return [_held(graph, name, value, fake_mode) for name, value in constants.items()]


def _numbers(graph: fx.Graph, traced: fx.Graph, fake_mode: FakeTensorMode) -> dict[fx.Node, fx.Node]:
    """Nodes of `graph` for the numbers in `traced`: what fills a tensor is not evaluated by freezing."""
    found = {}
    for node in traced.find_nodes(op="call_function", target=torch.ops.aten.full.default):
        size, number = node.args[:2]
        if not size:
            meta = node.meta["val"]
            with unset_fake_temporarily():
                value = torch.full((), number, dtype=meta.dtype, device=meta.device)
            found[node] = _held(graph, f"number_{number!r}", value, fake_mode)
    return found


def _held(graph: fx.Graph, name: str, value: Tensor, fake_mode: FakeTensorMode) -> fx.Node:
    """A node for a constant that the graph's module holds as it does torch.tensor literals."""
    module = graph.owning_module
    assert module is not None, "Inductor's graphs belong to a module"
    attribute = re.sub(r"\W", "_", f"_ollie_{name}_{value.dtype}_{value.device}")
    module.register_buffer(attribute, value, persistent=False)
    held = graph.get_attr(attribute)
    lifted = graph.call_function(torch.ops.aten.lift_fresh_copy.default, (held,))
    lifted.meta["val"] = held.meta["val"] = fake_mode.from_tensor(value)
    return lifted
