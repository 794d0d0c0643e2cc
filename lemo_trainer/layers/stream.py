"""The residual stream as a patched layer holds it: its own memory, overwritten in place.

A layer may overwrite a stream that it made, or that the patched layer before it made and handed on. Any
other is copied once on entering: the embeddings' output, a dense layer's, and one that a hook may have kept.
What other code saved of a stream for a gradient of its own, autograd checks: if it was overwritten since,
that is an error, never a wrong gradient.

The same holds on the way back. The gradient of what a layer returns is copied once, unless it comes from a
patched layer, which owned it already.

Shapes: B batch, S tokens, K chosen tokens of a sample, D hidden width.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lemo_trainer.compat import has_forward_hooks, has_forward_pre_hooks
from lemo_trainer.kernels.rows import add_rows, take_rows


class _Seam:
    """Where a stream left a layer, and whether the next one went on with it in place."""

    def __init__(self) -> None:
        self.adopted = False


class _Release(torch.autograd.Function):
    """The stream as it is; its gradient is made the stream's own."""

    @staticmethod
    def forward(ctx: Any, x_BSD: Tensor, seam: _Seam) -> Tensor:
        ctx.seam = seam
        ctx.mark_dirty(x_BSD)
        return x_BSD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BSD: Tensor) -> tuple[Tensor, None]:
        owned = ctx.seam.adopted and grad_BSD.is_contiguous()
        return grad_BSD if owned else grad_BSD.clone(memory_format=torch.contiguous_format), None


class Stream:
    """A residual stream in one layer. `x_BSD` is its present state, for reading without gradient."""

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
        in_place: False copies in every layer: for models that may keep a layer's input for later.
    """

    def __init__(self, *, in_place: bool = True) -> None:
        self.in_place = in_place
        self._released: tuple[weakref.ref[Tensor], _Seam] | None = None

    def enter(self, layer: nn.Module, x_BSD: Tensor) -> Stream:
        """The stream that `layer` got as `x_BSD`: itself where it may be overwritten, else a copy."""
        released, self._released = self._released, None
        if released is not None and released[0]() is x_BSD and not has_forward_pre_hooks(layer):
            released[1].adopted = True
            return Stream(x_BSD)
        return Stream(x_BSD.clone(memory_format=torch.contiguous_format))

    def leave(self, layer: nn.Module, stream: Stream) -> Tensor:
        """What `layer` returns."""
        seam = _Seam()
        output: Tensor = _Release.apply(stream.x_BSD, seam)
        if self.in_place and not has_forward_hooks(layer):
            self._released = weakref.ref(output), seam
        return output
