"""Programs as calls to be timed: compiled by Inductor as they will be, or operator by operator."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ollie_compile import compat
from ollie_compile.measure.packing import pack
from ollie_compile.measure.products import move_plain
from ollie_compile.measure.profile import Profile
from ollie_compile.measure.timing import Call


class Called:
    """A call of a traced function operator by operator."""

    def __init__(self, graph: fx.GraphModule, values: Sequence[Tensor]) -> None:
        self.graph, self.values = graph, values

    @property
    def operators(self) -> int:
        """How many there are, without views, which Inductor makes no code of."""
        return sum(node.op == "call_function" and not _is_view(node) for node in self.graph.graph.nodes)

    def __call__(self) -> object:
        return self.graph(*self.values)


def compiled(
    function: Callable[..., Any], inputs: Sequence[Tensor], constant: int | Collection[int], profile: Profile
) -> Call:
    """A call of `function(*inputs)` through Inductor.

    Args:
        constant: position or positions of inputs whose transforms are done ahead of the call, and which
            convolutions read packed.
        profile: earlier timings of products, which decide the library of each.
    """
    from ollie_compile.compat import compile_fx

    graph, values = _traced(function, inputs, constant, profile)
    call = compile_fx(graph, values, config_patches={"joint_custom_pre_pass": None})
    return lambda: call(*values)


def called(
    function: Callable[..., Any], inputs: Sequence[Tensor], constant: int | Collection[int], profile: Profile
) -> Called:
    """A call of `function(*inputs)` operator by operator, as `compiled` but without a compiler."""
    return Called(*_traced(function, inputs, constant, profile))


def _traced(
    function: Callable[..., Any], inputs: Sequence[Tensor], constant: int | Collection[int], profile: Profile
) -> tuple[fx.GraphModule, list[Tensor]]:
    from ollie_compile.compat import make_fx

    # A bound method is not traced; with fake values nothing is computed for the trace.
    graph = make_fx(lambda *values: function(*values), tracing_mode="fake")(*inputs)
    places = (constant,) if isinstance(constant, int) else constant
    values = list(inputs)
    if places:
        graph, made, kept = _fold(graph, values, places)
        values = pack(graph.graph, made + kept, len(made))
    if compat.has_onednn():
        for node in graph.graph.nodes:
            move_plain(node, profile)
    _join_views(graph.graph)
    graph.recompile()
    return graph, values


def _join_views(graph: fx.Graph) -> None:
    """Make one view of those that follow one another, which a call would take for as many microseconds."""
    sources: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if _is_view(node):
            source = node.all_input_nodes[0]
            sources[node] = sources.get(source, source)
    for node in reversed(list(sources)):
        if any(user not in sources for user in node.users):
            source, value = sources[node], node.meta["val"]
            layout = (source, list(value.shape), list(value.stride()), value.storage_offset())
            with graph.inserting_before(node):
                joined = graph.call_function(torch.ops.aten.as_strided.default, layout)
            joined.meta = dict(node.meta)
            node.replace_all_uses_with(joined)
        if not node.users:
            graph.erase_node(node)


def _is_view(node: fx.Node) -> bool:
    view = node.op == "call_function" and compat.is_view(node.target)
    if not view or not isinstance(node.meta["val"], Tensor):  # such as the parts of a split
        return False
    return node.meta["val"].dtype == node.all_input_nodes[0].meta["val"].dtype


def _fold(
    graph: fx.GraphModule, values: list[Tensor], constant: Collection[int]
) -> tuple[fx.GraphModule, list[Tensor], list[Tensor]]:
    """Compute all nodes that depend on the inputs at `constant` alone; the results become the first inputs.

    Returns:
        the graph, those results, and the other inputs.
    """
    interpreter = fx.Interpreter(graph)
    placeholders = graph.graph.find_nodes(op="placeholder")
    folded: dict[fx.Node, Tensor] = {placeholders[place]: values[place] for place in constant}
    for node in graph.graph.nodes:
        if node.op == "call_function" and set(node.all_input_nodes) <= folded.keys():
            arguments, named = fx.map_arg((node.args, node.kwargs), folded.__getitem__)
            folded[node] = interpreter.call_function(node.target, arguments, named)
    kept = [value for place, value in enumerate(values) if place not in constant]
    made: list[Tensor] = []
    for node, value in folded.items():
        late = [user for user in node.users if user not in folded]
        if late:
            with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
                name = graph.graph.placeholder(f"folded_{len(made)}")
                name.meta = dict(node.meta)
            for user in late:
                user.replace_input_with(node, name)
            made.insert(0, value)
    for node in reversed(folded):
        graph.graph.erase_node(node)
    return graph, made, kept
