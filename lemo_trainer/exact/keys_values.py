"""Keys and values of a whole sequence, which its segments fill one after the other, and their gradients.

Segments go backward from the last to the first. A segment's queries meet the keys and values up to its own
end; what they send back to earlier ones is added up here, and an earlier segment takes it along when its own
backward pass comes.

Shapes: B batch, G key heads, S tokens of the sequence, d head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class HeadBuffer:
    """Keys, or values, of a sequence [B, G, S, d] and the gradient that has reached them so far.

    Args:
        seq_len: S.
        data: those of all tokens, where they exist already; None waits for the segments to write them.
    """

    def __init__(self, seq_len: int, data: Tensor | None = None) -> None:
        self.seq_len = seq_len
        self.data = data
        self.grad: Tensor | None = None
        self.filled = 0 if data is None else seq_len

    def write(self, own_BGnd: Tensor, start: int, stop: int) -> None:
        """Keep those of the tokens `start` to `stop`, unless they are there already."""
        if stop <= self.filled:
            return
        if self.data is None:
            batch, heads, _, width = own_BGnd.shape
            self.data = own_BGnd.new_empty(batch, heads, self.seq_len, width)
        self.data[:, :, start:stop] = own_BGnd
        self.filled = stop

    def add_gradient(self, grad_BGTd: Tensor, first: int) -> None:
        """Add the gradient of the tokens from `first` on. Sums of half precision are kept in float32."""
        if self.grad is None:
            assert self.data is not None
            wide = torch.promote_types(grad_BGTd.dtype, torch.float32)
            self.grad = torch.zeros_like(self.data, dtype=wide)
        self.grad[:, :, first : first + grad_BGTd.shape[2]] += grad_BGTd


class _UpTo(torch.autograd.Function):
    """Heads of all tokens that a segment's queries meet. The segment's own are written there first."""

    @staticmethod
    def forward(ctx: Any, own_BGnd: Tensor, buffer: HeadBuffer, first: int, start: int, stop: int) -> Tensor:
        buffer.write(own_BGnd, start, stop)
        ctx.buffer, ctx.bounds, ctx.dtype = buffer, (first, start, stop), own_BGnd.dtype
        assert buffer.data is not None
        return buffer.data[:, :, first:stop]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first, start, stop = ctx.bounds
        ctx.buffer.add_gradient(grad, first)
        return ctx.buffer.grad[:, :, start:stop].to(ctx.dtype), None, None, None, None


def heads_up_to(own_BGnd: Tensor, buffer: HeadBuffer, first: int, start: int, stop: int) -> Tensor:
    """Keys or values [B, G, stop - first, d] of the tokens `first` to `stop`, without a copy.

    Args:
        own_BGnd: those of the segment's tokens, `start` to `stop`, with their graph. In the backward pass
            they get the gradient of this segment's queries and the one that later segments left in `buffer`.
    """
    heads: Tensor = _UpTo.apply(own_BGnd, buffer, first, start, stop)
    return heads
