"""The precision rule: products of half precision computed in float32, for CPUs without units for them.

Results differ from those in half precision: inputs are read as they are, sums and products round as in
float32, and each result is rounded once. So it is an option (`half_in_float32`), never a candidate, and the
report counts it.
"""

from __future__ import annotations

import torch
from torch import fx

HALF = (torch.float16, torch.bfloat16)
aten = torch.ops.aten
PRODUCTS = (
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.convolution.default,
)


def in_float32(graph: fx.Graph) -> int:
    """Compute every product of half-precision tensors on a CPU in float32; gives their number."""
    count = 0
    for node in list(graph.nodes):
        value = node.meta.get("val")
        if node.target not in PRODUCTS or value.dtype not in HALF or value.device.type != "cpu":
            continue
        with graph.inserting_before(node):
            wide = {source: _cast(graph, source, torch.float32) for source in node.all_input_nodes}
            made = graph.node_copy(node, wide.__getitem__)
            made.meta["val"] = value.to(torch.float32)
            node.replace_all_uses_with(_cast(graph, made, value.dtype))
        graph.erase_node(node)
        count += 1
    return count


def _cast(graph: fx.Graph, source: fx.Node, dtype: torch.dtype) -> fx.Node:
    if source.meta["val"].dtype == dtype:
        return source
    cast = graph.call_function(torch.ops.prims.convert_element_type.default, (source, dtype))
    cast.meta["val"] = source.meta["val"].to(dtype)
    return cast
