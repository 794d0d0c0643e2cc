"""Measuring programs on the device: compiled by Inductor as they will be, timed interleaved."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, fx

from ollie_compile.cost import synchronize

ROUNDS = 15
SAMPLE_S = 0.001  # one sample repeats a call for about this long

Call = Callable[[], object]


@contextlib.contextmanager
def outside_compilation() -> Iterator[None]:
    """Leave the fake tensors and the tracing context of a compilation that is under way."""
    from torch._guards import tracing
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily(), tracing(None), torch.no_grad():
        yield


def compiled(function: Callable[..., Tensor], inputs: Sequence[Tensor], *, constant: int | None) -> Call:
    """A call of `function(*inputs)` through Inductor.

    Args:
        constant: position of an input whose transforms are done ahead of the call, or None.
    """
    from torch._inductor.compile_fx import compile_fx
    from torch.fx.experimental.proxy_tensor import make_fx

    graph = make_fx(lambda *values: function(*values))(*inputs)  # a bound method is not traced
    values = list(inputs)
    if constant is not None:
        graph, values = _fold(graph, values, constant)
    call = compile_fx(graph, values, config_patches={"joint_custom_pre_pass": None})
    return lambda: call(*values)


def _fold(graph: fx.GraphModule, values: list[Tensor], constant: int) -> tuple[fx.GraphModule, list[Tensor]]:
    """Compute what depends on input `constant` alone; the results become inputs in its place."""
    folded: dict[fx.Node, Tensor] = {}
    interpreter = fx.Interpreter(graph)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    folded[placeholders[constant]] = values[constant]
    for node in graph.graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and set(node.all_input_nodes) <= folded.keys():
            arguments, named = fx.map_arg((node.args, node.kwargs), folded.__getitem__)
            folded[node] = interpreter.call_function(node.target, arguments, named)
    new_values = [value for place, value in enumerate(values) if place != constant]
    for node, value in folded.items():
        if all(user in folded for user in node.users):
            continue
        with graph.graph.inserting_before(placeholders[0]):
            name = graph.graph.placeholder(f"folded_{len(new_values)}")
        placeholders[0].prepend(name)
        for user in [user for user in node.users if user not in folded]:
            user.replace_input_with(node, name)
        new_values.insert(0, value)
        placeholders.insert(0, name)
    for node in reversed(folded):
        if not node.users:
            graph.graph.erase_node(node)
    graph.recompile()
    return graph, new_values


def measure(calls: Sequence[Call]) -> list[float]:
    """Median seconds of each call, all in turn in every round, so that drifts hit all alike."""
    repeats = []
    for call in calls:
        call()
        start = time.perf_counter()
        call()
        synchronize()
        repeats.append(max(1, min(100, round(SAMPLE_S / max(time.perf_counter() - start, 1e-7)))))
    samples: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, count, into in zip(calls, repeats, samples, strict=True):
            start = time.perf_counter()
            for _ in range(count):
                call()
            synchronize()
            into.append((time.perf_counter() - start) / count)
    return [sorted(times)[len(times) // 2] for times in samples]
