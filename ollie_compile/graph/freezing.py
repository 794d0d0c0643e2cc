"""Holding parameters as constants of a graph, so that what depends on them alone is computed once.

Dynamo makes the parameters of a module inputs of its graph, unless Inductor's global `freezing` is set before
it traces, and Inductor then has nothing to freeze. Here they become the graph's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ollie_compile import compat
from ollie_compile.compat import FakeTensor, pytree
from ollie_compile.measure.isolation import outside_compilation

LIMIT, HALF_LIMIT = 1e-3, 0.05  # of the largest value, above which a difference from eager is no rounding
SHARE = 0.01  # of the values that may differ so: where one is rounded, compared or sorted, rounding decides


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that shares its tensors, with what Dynamo says of where its inputs are from.

    Without that, Inductor takes no input for a parameter, and has another name for the graph in its cache.
    """
    made = copy.deepcopy(gm, {id(value): value for value in (*gm.parameters(), *gm.buffers())})
    compat.copy_sources(gm, made)
    return made


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
    gm = copied(gm)  # Dynamo reads from the graph that it gave what it has to pass
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
        compat.name_source(gm, name, node)
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
    return isinstance(value, nn.Parameter) or compat.is_static_input(node)


def check(graph: fx.GraphModule, compiled: Callable[..., Any], inputs: Sequence[Any]) -> None:
    """Compare a frozen graph's results with eager's on inputs like these, if they are static and not random.

    In torch 2.13 Inductor's freezing takes convolutions and additions together in place, and two of them in
    a row may lose their order with what reads between.

    Raises:
        RuntimeError: they differ by more than rounding in more than a few values.
    """
    sizes = [size for value in inputs if isinstance(value, Tensor) for size in value.shape]
    if not all(isinstance(value, Tensor) for value in inputs) or not all(map(_known, sizes)):
        return
    devices = [value.device for value in inputs if value.device.type == "cuda"]

    def run(call: Callable[..., Any]) -> list[Tensor]:
        copies = [value if isinstance(value, nn.Parameter) else real(value) for value in made]
        return [result for result in pytree.tree_leaves(call(*copies)) if isinstance(result, Tensor)]

    with outside_compilation(), torch.random.fork_rng(devices):
        made = [value if isinstance(value, nn.Parameter) else real(value) for value in inputs]
        states = [_random_states(devices)]
        try:
            wanted = run(graph)
        except Exception:  # what random values are no input for
            return
        states.append(_random_states(devices))
        if not all(map(torch.equal, *states)):
            return
        found = run(compiled)
    for want, got in zip(wanted, found, strict=True):
        limit = LIMIT if want.dtype.itemsize >= 4 else HALF_LIMIT
        if not want.is_floating_point() or not want.numel() or not want.isfinite().all():
            continue
        wrong = ~((got - want).abs() <= limit * want.abs().max())  # a NaN is no small difference
        if wrong.double().mean() > SHARE:
            raise RuntimeError(f"{wrong.double().mean():.0%} of its results differ from eager's")


def _random_states(devices: Sequence[torch.device]) -> list[Tensor]:
    return [torch.get_rng_state(), *map(torch.cuda.get_rng_state, devices)]


def _known(size: Any) -> bool:
    return type(size) is int


def real(value: Tensor) -> Tensor:
    """A copy of a tensor in its own strides, or random values in the place of one that has none."""
    shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if value.numel() else 0
    if not isinstance(value, FakeTensor):
        flat = value.detach().as_strided((reach,), (1,)).clone()
    else:
        flat = torch.empty(reach, dtype=value.dtype, device=value.device)
        flat = flat.normal_() if value.is_floating_point() else flat.zero_()
    return flat.as_strided(shape, stride)
