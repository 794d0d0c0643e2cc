"""The residual stream as a patched layer holds it: its own memory, overwritten in place.

A layer may overwrite a stream that it copied itself, or that the patched layer before it handed on. Every
other stream is copied once on entering: the output of the embeddings or of a dense layer, and one that a hook
may have kept. If other code saved a stream for a gradient of its own and LeMo then overwrote it, autograd
raises an error; it never computes a wrong gradient.

The backward pass does the same: the gradient of a layer's output is copied once, unless it comes from a
patched layer, which owns it already.

Shapes: B batch, S tokens, K chosen tokens of a sample, D hidden width.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import first_gradients_only, has_forward_hooks, has_forward_pre_hooks
from lemo_trainer.kernels.rows import add_rows, take_rows


class _Seam:
    """The boundary between two layers: `adopted` once the next one overwrites the stream in place."""

    def __init__(self) -> None:
        self.adopted = False


class _Release(torch.autograd.Function):
    """The identity; its backward copies the gradient unless the stream already owns it."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, seam: _Seam) -> Tensor:
        ctx.seam = seam
        ctx.mark_dirty(x_BSD)
        return x_BSD

    @staticmethod
    @first_gradients_only
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, None]:
        owned = ctx.seam.adopted and grad_BSD.is_contiguous()
        return grad_BSD if owned else grad_BSD.clone(memory_format=torch.contiguous_format), None


class Stream:
    """A residual stream in one layer. `x_BSD` is its current state, to be read without gradient."""

    def __init__(self, x_BSD: Tensor) -> None:
        self.x_BSD = x_BSD

    def take(self, rows: Tensor) -> Tensor:
        """A copy [B, K, D] of the rows at flat row numbers `rows` [B * K], with gradient."""
        self.x_BSD, taken = take_rows(self.x_BSD, rows)
        return taken

    def add(self, update_BKD: Tensor, rows: Tensor) -> None:
        """Add `update_BKD` at distinct flat row numbers `rows` [B * K]."""
        self.x_BSD = add_rows(self.x_BSD, update_BKD, rows)


class Streams:
    """Hands streams from one patched layer to the next.

    Args:
        in_place: False copies the stream in every layer, for models that may keep a layer's input for later.
    """

    def __init__(self, *, in_place: bool = True) -> None:
        self.in_place = in_place
        self._released: tuple[weakref.ref[Tensor], _Seam] | None = None

    def enter(self, layer: nn.Module, x_BSD: Tensor) -> Stream:
        """The stream in front of `layer`: `x_BSD` itself if it may be overwritten, else a copy."""
        released, self._released = self._released, None
        if released is not None and released[0]() is x_BSD and not has_forward_pre_hooks(layer):
            released[1].adopted = True
            return Stream(x_BSD)
        return Stream(x_BSD.clone(memory_format=torch.contiguous_format))

    def leave(self, layer: nn.Module, stream: Stream) -> Tensor:
        """The output of `layer`, of which the next patched layer may adopt the memory."""
        seam = _Seam()
        output: Tensor = _Release.apply(stream.x_BSD, seam)
        if self.in_place and not has_forward_hooks(layer):
            self._released = weakref.ref(output), seam
        return output
