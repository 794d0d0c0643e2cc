"""RMSNorm and LayerNorm of chosen rows of the residual stream.

The rows are read straight from the stream. The backward pass needs the stream itself, the row numbers and one
or two numbers a row, but neither the gathered nor the normed rows. That saves memory while the stream is kept
anyway. Where the stream is overwritten in place, its rows must be copied first (`Stream.take`), and the norm
of the copy (`rows=None`) saves only that copy.

Shapes: B batch, S tokens, K chosen tokens of a sample, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo_trainer.compat import first_gradients_only
from lemo_trainer.kernels import torch_norm
from lemo_trainer.kernels.dispatch import runs_triton


def _implementation(x: Tensor) -> Any:
    """The module whose functions compute on `x`."""
    if not runs_triton(x):
        return torch_norm
    from lemo_trainer.kernels import triton_norm

    return triton_norm


class _NormRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BSD: Tensor,
        rows: Tensor | None,
        weight_D: Tensor,
        bias_D: Tensor | None,
        eps: float,
        centred: bool,
    ) -> Tensor:
        x_ND = x_BSD.flatten(0, -2)
        y, mean, rstd = _implementation(x_BSD).forward(x_ND, rows, weight_D, bias_D, eps, centred)
        ctx.save_for_backward(x_BSD, rows, weight_D, bias_D, mean, rstd)
        if rows is None:
            return y.view(x_BSD.shape)
        return y.unflatten(0, (len(x_BSD), -1))

    @staticmethod
    @first_gradients_only
    def backward(ctx: Any, grad_BKD: Tensor) -> tuple[Tensor | None, ...]:
        x_BSD, rows, weight_D, bias_D, mean, rstd = ctx.saved_tensors
        grad_x, grad_weight, grad_bias = _implementation(x_BSD).backward(
            grad_BKD.flatten(0, -2),
            x_BSD.flatten(0, -2),
            rows,
            weight_D,
            mean,
            rstd,
            any(ctx.needs_input_grad[2:4]),
        )
        if rows is not None and ctx.needs_input_grad[0]:
            grad_x = torch.zeros_like(x_BSD).flatten(0, -2).index_copy_(0, rows, grad_x)
        if grad_weight is not None:
            grad_weight = grad_weight.to(weight_D.dtype)
        grad_bias = None if grad_bias is None or bias_D is None else grad_bias.to(bias_D.dtype)
        return grad_x.view(x_BSD.shape), None, grad_weight, grad_bias, None, None


def norm_rows(
    x_BSD: Tensor,
    rows: Tensor | None,
    weight_D: Tensor,
    bias_D: Tensor | None = None,
    *,
    eps: float,
    centred: bool = False,
) -> Tensor:
    """RMSNorm, or LayerNorm if `centred`, of rows of the stream.

    Args:
        x_BSD: [B, S, D], contiguous.
        rows: flat row numbers [B * K], distinct; None norms all rows, of any shape [..., D].
        weight_D, bias_D: in the dtype of `x_BSD`.

    Returns:
        [B, K, D], or the shape of `x_BSD` without `rows`.
    """
    y: Tensor = _NormRows.apply(x_BSD, rows, weight_D, bias_D, eps, centred)
    return y
