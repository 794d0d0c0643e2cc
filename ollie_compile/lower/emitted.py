"""The operators that lowered programs call: no others are recorded, and no others are read from a plan file.

None of them changes its inputs, opens a file or runs code of a user. All check their arguments before they
read but `as_strided`, which trusts its caller: `relaid` stands in its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ollie_compile.compat import statically_known_true
from ollie_compile.kernels import library

aten = torch.ops.aten

EMITTED = {
    str(operator): operator
    for operator in (
        aten._unsafe_view.default,
        aten.add.Tensor,
        aten.as_strided.default,
        aten.bmm.default,
        aten.clone.default,
        aten.constant_pad_nd.default,
        aten.convolution.default,
        aten.detach.default,
        aten.diagonal.default,
        aten.expand.default,
        aten.flip.default,
        aten.full.default,
        aten.mm.default,
        aten.mul.Tensor,
        aten.permute.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.split_with_sizes.default,
        aten.transpose.int,
        aten.unfold.default,
        aten.unsqueeze.default,
        aten.view.default,
        library.banded_scores._opoverload,
        library.banded_values._opoverload,
        library.bilinear,
        library.fold._opoverload,
        library.selective_add,
        library.transform,
    )
}


def relaid(value: Tensor, size: Sequence[Any], stride: Sequence[Any], offset: Any = None) -> Tensor:
    """`value` with other strides along its dimensions of size 1, which is how lowering uses `as_strided`.

    Raises:
        ValueError: another size, or other strides along the other dimensions.
    """
    same = offset in (None, 0) and len(size) == len(stride) == value.dim()
    for own, own_step, wanted, step in zip(value.shape, value.stride(), size, stride, strict=False):
        same = same and statically_known_true(own == wanted)
        same = same and (statically_known_true(own == 1) or statically_known_true(own_step == step))
    if not same:
        layouts = [tuple(value.shape), value.stride()], [tuple(size), tuple(stride)]
        raise ValueError(
            f"as_strided must keep the layout {layouts[0]}, got {layouts[1]}: use the tensor's own."
        )
    return torch.as_strided(value, size, stride)
