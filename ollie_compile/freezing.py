"""Holding parameters as constants of a graph, so that what depends on them alone is computed once.

Dynamo makes the parameters of a module inputs of its graph, unless Inductor's global `freezing` is set before
it traces, and Inductor then has nothing to freeze. Here they become the graph's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor


def hold(
    gm: fx.GraphModule, inputs: Sequence[Any]
) -> tuple[fx.GraphModule, list[Any], Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """A graph that holds what a module holds.

    Args:
        inputs: real tensors in the place of parameters and buffers; one that is not real stays an input.

    Returns:
        a graph that shares its tensors, its inputs that are left, and what makes a function of all inputs
        from one of those.
    """
    # Dynamo reads from the graph that it gave what it has to pass.
    gm = copy.deepcopy(gm, {id(value): value for value in (*gm.parameters(), *gm.buffers())})
    sources = getattr(gm, "_param_name_to_source", None)  # where Dynamo found the module's own tensors
    kept = []
    for place, (node, value) in enumerate(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True)):
        if not _is_held(node, value):
            kept.append(place)
            continue
        name = f"_held_{place}"
        if isinstance(value, nn.Parameter):
            gm.register_parameter(name, value)
        else:
            gm.register_buffer(name, value)
        if sources is not None:
            sources[name] = getattr(node, "_dynamo_source", None)
        with gm.graph.inserting_after(node):
            held = gm.graph.get_attr(name)
        held.meta = dict(node.meta)
        node.replace_all_uses_with(held)
        gm.graph.erase_node(node)
    # What reads a constant may stand before an input that is left.
    first = next((node for node in gm.graph.nodes if node.op != "placeholder"), None)
    for node in gm.graph.find_nodes(op="placeholder"):
        if first is not None:
            first.prepend(node)
    gm.recompile()

    def of_all(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *values: call(*[values[place] for place in kept])

    return gm, [inputs[place] for place in kept], of_all


def _is_held(node: fx.Node, value: Any) -> bool:
    if not isinstance(value, Tensor) or isinstance(value, FakeTensor):
        return False
    static = "_dynamo_static_input_type" in node.meta.get("tensor_dict", {})
    return isinstance(value, nn.Parameter) or static
