"""Weights that hold a NaN or an infinity, such as a mask of -inf: operators that read one are not derived.

A derived program adds and multiplies weights that the original keeps apart, which gives NaN where eager torch
gives numbers, and its comparison with the original would compare NaN with NaN.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from ollie_compile.measure.isolation import outside_compilation

REASON = "a weight that it reads holds values that are not finite"


def not_finite(values: Sequence[Any]) -> tuple[int, ...]:
    """The places of tensors with values that are not finite; of tensors without data nothing is known."""
    with outside_compilation():
        return tuple(
            place for place, value in enumerate(values) if _has_data(value) and not _is_finite(value)
        )


def _has_data(value: Any) -> bool:
    plain = type(value) in (Tensor, torch.nn.Parameter) and value.layout is torch.strided
    return plain and not isinstance(value, FakeTensor) and not value.is_meta and not value.is_quantized


def _is_finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return True
    # A sum is finite only if all values are, and takes a tenth of the time; it may also overflow.
    return bool(value.sum().isfinite()) or bool(value.isfinite().all())


def readers(graph: fx.Graph, weights: Collection[fx.Node], fixed: Collection[fx.Node]) -> frozenset[fx.Node]:
    """Weights, and the nodes of `fixed` that are computed from them."""
    found = set(weights)
    for node in graph.nodes:
        if node in fixed and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return frozenset(found)
