"""Convolutions with constant weights as Inductor calls them in a frozen graph: with packed weights."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, fx

from ollie_compile import compat

logger = logging.getLogger(__name__)

aten = torch.ops.aten


def pack(graph: fx.Graph, values: list[Tensor], constant: int) -> list[Tensor]:
    """Let convolutions of images and volumes read weights that oneDNN has packed.

    Args:
        graph: changed in place; the meta of its nodes holds their values.
        values: its inputs, the first `constant` of which are the same in every call.

    Returns:
        its inputs from now on.
    """
    held = dict(zip(graph.find_nodes(op="placeholder")[:constant], range(constant), strict=True))
    values = list(values)
    for node in graph.find_nodes(op="call_function", target=aten.convolution.default):
        x, weight = node.args[0].meta["val"], node.args[1]
        if weight not in held or len(weight.users) > 1 or not _known(x):
            continue
        try:
            packed = compat.packed_convolution(node.args, values[held[weight]], list(x.shape))
        except RuntimeError as error:  # sizes that oneDNN has no kernel for
            logger.debug("ollie: %s is measured with plain weights: %s", node, error)
            continue
        values[held[weight]] = packed
        _call(graph, node)
    return values


def _known(x: Tensor) -> bool:
    return x.device.type == "cpu" and x.dim() in (4, 5) and x.dtype in compat.onednn_dtypes()


def _call(graph: fx.Graph, node: fx.Node) -> None:
    target, arguments = compat.packed_convolution_call(node.args)
    with graph.inserting_before(node):
        call = graph.call_function(target, arguments)
    node.replace_all_uses_with(call)
    call.meta = dict(node.meta)
    graph.erase_node(node)
