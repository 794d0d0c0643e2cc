"""Rows of the residual stream read and added in place (LeMo's permutation-free form).

A branch reads its rows from the stream, and its output is added to the same rows of the same memory, without
a zero-padded output or a second stream. No gradient needs an old value of the stream, so only the row numbers
are saved. The backward pass adds the rows' gradient in place too, to the stream's gradient.

Working in place is correct only while no other code holds the stream or its gradient.
`lemo_trainer.layers.stream` ensures that; these functions do not.

Shapes: B batch, S tokens, K chosen tokens of a sample, D hidden width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lemo_trainer.compat import first_gradients_only
from lemo_trainer.kernels import torch_rows
from lemo_trainer.kernels.dispatch import runs_triton


def _implementation(x: Tensor) -> Any:
    """The module whose functions compute on `x`."""
    if not runs_triton(x):
        return torch_rows
    from lemo_trainer.kernels import triton_rows

    return triton_rows


def gather(x_BSD: Tensor, rows: Tensor) -> Tensor:
    """Rows of the stream as [B, K, D], a copy."""
    return x_BSD.flatten(0, 1).index_select(0, rows).unflatten(0, (len(x_BSD), -1))


def scatter_add_(x_BSD: Tensor, update_BKD: Tensor, rows: Tensor) -> None:
    """Add `update_BKD` to the contiguous `x_BSD` at distinct flat row numbers `rows` [B * K], in place."""
    _implementation(x_BSD).scatter_add_(x_BSD.flatten(0, 1), update_BKD.flatten(0, 1), rows)


class _Take(torch.autograd.Function):
    """The stream, and a copy of some rows. One backward call gets both gradients and adds them in place."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(rows)
        ctx.set_materialize_grads(False)
        ctx.mark_dirty(x_BSD)  # unchanged, but it must be ordered with what overwrites it
        return x_BSD, gather(x_BSD, rows)

    @staticmethod
    @first_gradients_only
    def backward(ctx: Any, grad_BSD: Tensor, grad_BKD: Tensor | None) -> tuple[Tensor, None]:
        if grad_BKD is not None:
            scatter_add_(grad_BSD, grad_BKD, *ctx.saved_tensors)
        return grad_BSD, None


class _Add(torch.autograd.Function):
    """The stream with an update added in place."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, update_BKD: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.update_dtype = update_BKD.dtype
        ctx.mark_dirty(x_BSD)
        scatter_add_(x_BSD, update_BKD, rows)
        return x_BSD

    @staticmethod
    @first_gradients_only
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        if not ctx.needs_input_grad[1]:
            return grad_BSD, None, None
        return grad_BSD, gather(grad_BSD, *ctx.saved_tensors).to(ctx.update_dtype), None


def take_rows(x_BSD: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """The stream to use from now on, and its rows [B, K, D] at the flat row numbers `rows` [B * K]."""
    stream, taken = _Take.apply(x_BSD, rows)
    return stream, taken


def add_rows(x_BSD: Tensor, update_BKD: Tensor, rows: Tensor) -> Tensor:
    """The stream with `update_BKD` added in place at distinct flat row numbers `rows` [B * K]."""
    stream: Tensor = _Add.apply(x_BSD, update_BKD, rows)
    return stream
