"""Convolutions with constant weights as Inductor calls them in a frozen graph: with packed weights."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, fx

logger = logging.getLogger(__name__)

aten = torch.ops.aten


def pack(graph: fx.Graph, values: list[Tensor], constant: int) -> list[Tensor]:
    """Let convolutions of images and volumes read packed weights, where oneDNN has them.

    Args:
        graph: changed in place; the meta of its nodes holds what they give.
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
            packed = _packed(node, values[held[weight]], list(x.shape))
        except RuntimeError as error:  # sizes that oneDNN has no kernel for
            logger.debug("ollie: %s is measured with plain weights: %s", node, error)
            continue
        values[held[weight]] = packed
        _call(graph, node)
    return values


def _known(x: Tensor) -> bool:
    if x.device.type != "cpu" or x.dim() not in (4, 5) or not torch.backends.mkldnn.is_available():
        return False
    supported = torch.ops.mkldnn._is_mkldnn_bf16_supported, torch.ops.mkldnn._is_mkldnn_fp16_supported
    halves = dict(zip((torch.bfloat16, torch.float16), supported, strict=True))
    return x.dtype == torch.float32 or (x.dtype in halves and halves[x.dtype]())


def _packed(node: fx.Node, weight: Tensor, input_size: list[int]) -> Tensor:
    _, _, _, stride, padding, dilation, transposed, output_padding, groups = node.args
    if transposed:
        reorder = torch.ops.mkldnn._reorder_convolution_transpose_weight
        return reorder(weight, padding, output_padding, stride, dilation, groups, input_size)
    return torch.ops.mkldnn._reorder_convolution_weight(weight, padding, stride, dilation, groups, input_size)


def _call(graph: fx.Graph, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args
    target = torch.ops.mkldnn._convolution_pointwise.default
    sizes: tuple[object, ...] = (padding, stride, dilation, groups)
    if transposed:
        target = torch.ops.mkldnn._convolution_transpose_pointwise.default
        sizes = (padding, output_padding, stride, dilation, groups)
    with graph.inserting_before(node):
        call = graph.call_function(target, (x, weight, bias, *sizes, "none", [], ""))  # nothing fused
    node.replace_all_uses_with(call)
    call.meta = dict(node.meta)
    graph.erase_node(node)
