"""The MLP in segments of rows, and the elementwise middle of a gated one.

Shapes: B batch, K rows of a sample, D hidden width, N elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from lemo_trainer.kernels.dispatch import implementation


def in_segments(function: Callable[[Tensor], Tensor], x_BKD: Tensor, segment: int) -> Tensor:
    """`function(x_BKD)`, of which one segment's intermediate results exist at a time, forward and backward.

    Args:
        function: acts on each row by itself; any modules, plain or with adapters. Its results are not saved
            but computed again in the backward pass, one segment after the other.
        segment: rows of a sample that are taken together.
    """
    parts = [checkpoint(function, part, use_reentrant=False) for part in x_BKD.split(segment, 1)]
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        out: Tensor = implementation("mlp", gate).forward(gate, up)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        gradients: tuple[Tensor, Tensor] = implementation("mlp", gate).backward(grad, gate, up)
        return gradients


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up of two tensors of one shape and dtype (SwiGLU, arXiv 2002.05202); saves these two."""
    out: Tensor = _Gated.apply(gate, up)
    return out
