"""Products in float32 on a CPU by torch's library or by oneDNN, whichever is faster for their shape.

Torch calls MKL, which on some CPUs takes more than twice as long as oneDNN, and whose packed weights lose to
plain ones for a single row.
"""

from __future__ import annotations

import functools
from operator import attrgetter

import torch
from torch import fx

from ollie_compile import compat
from ollie_compile.kernels import library
from ollie_compile.measure import clock, timing
from ollie_compile.measure.profile import Profile

MEASURE_S = 0.1  # after which no more than the fewest rounds are timed
PLAIN, PACKED, ONEDNN, ONEDNN_PACKED = "torch", "MKL, packed", "oneDNN", "oneDNN, packed"
aten = torch.ops.aten


def move_plain(node: fx.Node, profile: Profile, margin: float = 0.0) -> str:
    """The library that a product was moved to, which is "" where it stays."""
    if node.target is aten.mm.default:
        (a, b), bias = node.args, None
    elif node.target is aten.addmm.default and not node.kwargs:
        bias, a, b = node.args
    else:
        return ""
    values = [source.meta.get("val") for source in (a, b, bias) if source is not None]
    if not all(library.has_libraries(value) for value in values) or values[-1].dim() != (
        2 if bias is None else 1
    ):
        return ""
    first, second, *rest = [torch.empty_strided(v.shape, v.stride()).fill_(1.0) for v in values]
    offered = {
        PLAIN: lambda: torch.addmm(*rest, first, second) if rest else torch.mm(first, second),
        ONEDNN: lambda: torch.ops.ollie.product.default(first, second, *rest),
    }
    if bias is not None and rest[0].shape != second.shape[1:]:
        return ""
    what = repr([(*v.shape, v.stride()) for v in values])
    if fastest(offered, PLAIN, margin, what, profile) == PLAIN:
        return ""
    node.target, node.args = torch.ops.ollie.product.default, (a, b, bias)
    return ONEDNN


def move_packed(node: fx.Node, profile: Profile, margin: float) -> str:
    """The same for a product whose constant weights Inductor has packed for MKL.

    The nodes that pack them otherwise are added to the graph, to be folded.
    """
    if not compat.is_mkl_product(node.target):
        return ""
    x, packed, weight, bias, rows = node.args
    value, held = x.meta.get("val"), node.graph.owning_module
    if not library.has_libraries(value) or value.dim() != 2 or weight.op != "get_attr":
        return ""
    first = torch.empty_strided(value.shape, value.stride()).fill_(1.0)
    for_mkl, second = (attrgetter(source.target)(held) for source in (packed, weight))
    added = None if bias is None else torch.ones(second.shape[0])
    reordered = compat.onednn_packed(second, rows)
    transposed = second.t().contiguous()
    call, arguments = compat.onednn_product_call(first, reordered, added)
    offered = {
        PACKED: lambda: compat.mkl_product(first, for_mkl, second, added, rows),
        ONEDNN_PACKED: lambda: call(*arguments),
        PLAIN: lambda: (
            torch.mm(first, transposed) if added is None else torch.addmm(added, first, transposed)
        ),
    }
    what = repr([*value.shape, value.stride(), *second.shape, bias is not None])
    which = fastest(offered, PACKED, margin, what, profile)
    if which == PACKED:
        return ""
    graph, shape = node.graph, second.shape
    with graph.inserting_before(node):
        if which == ONEDNN_PACKED:
            ours = graph.call_function(compat.onednn_packing(), (weight, rows))
            ours.meta["val"] = value.new_empty(shape)
            node.target, node.args = compat.onednn_product_call(x, ours, bias)
        else:
            turned = graph.call_function(aten.permute.default, (weight, [1, 0]))
            turned.meta["val"] = value.new_empty(shape).t()
            contiguous = {"memory_format": torch.contiguous_format}
            ours = graph.call_function(aten.clone.default, (turned,), contiguous)
            ours.meta["val"] = value.new_empty(turned.meta["val"].shape)
            node.target = aten.mm.default if bias is None else aten.addmm.default
            node.args = (x, ours) if bias is None else (bias, x, ours)
    for source in (packed, weight):
        if not source.users:
            node.graph.erase_node(source)
    return which


def fastest(offered: dict[str, timing.Call], kept: str, margin: float, what: str, profile: Profile) -> str:
    """Which call is fastest by what is measured now or was before; it beats those in front by the margin.

    Args:
        kept: comes first; the others come as they are offered.
    """
    measured: dict[str, float] = {}

    def of(which: str) -> float:
        if not measured:
            stop = clock.now() + MEASURE_S
            measured.update(zip(offered, timing.measure(list(offered.values()), stop), strict=True))
        return measured[which]

    cpu = torch.device("cpu")
    seconds = {
        which: profile.seconds(cpu, f"{which}: {what}", functools.partial(of, which)) for which in offered
    }
    order = sorted(offered, key=lambda which: which != kept)
    return timing.fastest_first(order, seconds.__getitem__, margin)[0]
