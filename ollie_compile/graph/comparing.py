"""Comparing a compiled graph with eager torch, on copies of all that it reads and may write."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from ollie_compile.measure.isolation import outside_compilation

LIMIT, HALF_LIMIT = 1e-3, 0.05  # of the largest value, above which a difference from eager is no rounding
SHARE = 0.01  # of the values that may differ so: where one is rounded, compared or sorted, rounding decides


def copied(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of Dynamo's graph that shares its tensors, with what Dynamo says of where its inputs are from.

    Without that, Inductor takes no input for a parameter, and has another name for the graph in its cache.
    """
    made = copy.deepcopy(gm, {id(value): value for value in (*gm.parameters(), *gm.buffers())})
    if hasattr(gm, "_param_name_to_source"):
        made._param_name_to_source = dict(gm._param_name_to_source)
    places = (graph.find_nodes(op="placeholder") for graph in (gm.graph, made.graph))
    for node, new in zip(*places, strict=True):
        if hasattr(node, "_dynamo_source"):
            new._dynamo_source = node._dynamo_source
    return made


def is_static(inputs: Sequence[Any]) -> bool:
    """Whether all inputs are tensors of known sizes."""
    tensors = all(isinstance(value, Tensor) for value in inputs)
    return tensors and all(type(size) is int for value in inputs for size in value.shape)


def copies(inputs: Sequence[Tensor], held: Collection[int] = ()) -> list[Tensor]:
    """Inputs like these, which calls may change.

    Args:
        held: the places of weights, which no call changes and a frozen graph must be given as they are.
    """
    return [value if place in held else _real(value) for place, value in enumerate(inputs)]


def _real(value: Tensor) -> Tensor:
    """A copy of a tensor in its own strides, or random values in the place of one that has none."""
    shape, stride = tuple(map(int, value.shape)), tuple(map(int, value.stride()))
    reach = 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True)) if value.numel() else 0
    if not isinstance(value, FakeTensor):
        flat = value.detach().as_strided((reach,), (1,)).clone()
    else:
        flat = torch.empty(reach, dtype=value.dtype, device=value.device)
        flat = flat.normal_() if value.is_floating_point() else flat.zero_()
    return flat.as_strided(shape, stride)


def check(
    graph: fx.GraphModule, compiled: Callable[..., Any], inputs: Sequence[Tensor], held: Collection[int]
) -> None:
    """Compare a frozen graph's results, and what it writes into its inputs, with eager's.

    In torch 2.13 Inductor's freezing takes convolutions and additions together in place, and two of them in
    a row may lose their order with what reads between.

    Args:
        graph: without effects but its results (`effects`), of static sizes.
        held: as in `copies`.

    Raises:
        RuntimeError: they differ by more than rounding in more than a few values.
    """

    def run(call: Callable[..., Any]) -> list[Tensor]:
        values = copies(made, held)
        results = pytree.tree_leaves(call(*values))
        return [result for result in (*results, *values) if isinstance(result, Tensor)]

    with outside_compilation(autocast=True):
        made = copies(inputs, held)
        try:
            wanted = run(graph)
        except Exception:  # what random values are no input for
            return
        found = run(compiled)
    for want, got in zip(wanted, found, strict=True):
        limit = HALF_LIMIT if want.dtype.itemsize < 4 or _computes_in_half(graph) else LIMIT
        if not want.is_floating_point() or not want.numel():
            continue
        finite = want.isfinite()
        largest = want[finite].abs().max() if finite.any() else 0.0
        near = (got - want).abs() <= limit * largest  # a NaN is no small difference
        wrong = ~torch.where(finite, near, torch.isclose(got, want, equal_nan=True))
        if wrong.double().mean() > SHARE:
            raise RuntimeError(f"{wrong.double().mean():.0%} of its results differ from eager's")


def _computes_in_half(graph: fx.GraphModule) -> bool:
    """Whether a graph of Dynamo computes in half precision, such as under autocast."""
    values = (node.meta.get("example_value") for node in graph.graph.nodes)
    return any(
        isinstance(value, Tensor) and value.is_floating_point() and value.dtype.itemsize < 4
        for value in values
    )
