"""Lifting: aten operators as expressions over tensors, which may be inputs or expressions themselves."""

from ollie_compile.lift.convolutions import (
    banded_scores,
    banded_values,
    convolution,
    transposed_convolution,
    weight_gradient,
)
from ollie_compile.lift.movement import (
    cat,
    index_select,
    narrow,
    pad,
    permute,
    stack,
    strided,
    unfold,
    unsqueeze,
    view,
)
from ollie_compile.lift.products import average_pool, elementwise, linear, matmul

__all__ = [
    "average_pool",
    "banded_scores",
    "banded_values",
    "cat",
    "convolution",
    "elementwise",
    "index_select",
    "linear",
    "matmul",
    "narrow",
    "pad",
    "permute",
    "stack",
    "strided",
    "transposed_convolution",
    "unfold",
    "unsqueeze",
    "view",
    "weight_gradient",
]
