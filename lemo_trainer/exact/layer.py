"""A decoder layer that runs one segment of its sequence at a time.

The layer's own forward gets the rows of a segment. Its attention, called through transformers'
`AttentionInterface`, meets the keys and values of all tokens up to the segment's end; everything else in such
a layer acts on each token by itself.

Shapes: B batch, S tokens of the sequence, n tokens of a segment, H query and G key heads of width d.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import AttentionInterface

from lemo_trainer.compat import attention_function, attention_implementation
from lemo_trainer.exact.causal import attend_tail, fits
from lemo_trainer.exact.keys_values import HeadBuffer, heads_up_to
from lemo_trainer.exact.masks import LazyMask, made, rows_of_block_mask
from lemo_trainer.model.calls import CACHES, POSITIONS
from lemo_trainer.model.capture import dispatching_to
from lemo_trainer.model.masks import segment_implementation

_IN_SEGMENTS = "lemo_in_segments"
_running: ContextVar[SegmentedAttention] = ContextVar("lemo_exact_attention")


class _Filled(Exception):  # noqa: N818 - leaves a layer as soon as its keys and values exist
    pass


class Segment:
    """Tokens `start` to `stop` of a sequence of `seq_len`."""

    def __init__(self, start: int, stop: int, seq_len: int) -> None:
        self.start, self.stop = start, stop
        self.whole = stop - start == seq_len

    def of(self, x_BSx: Tensor) -> Tensor:
        """Its tokens of [B, S, ...]."""
        return x_BSx[:, self.start : self.stop]


def segments_of(seq_len: int, size: int) -> list[Segment]:
    """A sequence in segments of `size` tokens; the last one may be shorter."""
    return [Segment(start, min(start + size, seq_len), seq_len) for start in range(0, seq_len, size)]


class SegmentedAttention:
    """The attention modules of one layer and their keys and values, while segments run through it."""

    def __init__(self, layer: nn.Module, mask: Any, seq_len: int) -> None:
        self.seq_len = seq_len
        self.buffers: dict[nn.Module, tuple[HeadBuffer, HeadBuffer]] = {}
        self.segment: Segment | None = None
        self.stop_at: nn.Module | None = None
        self.last: nn.Module | None = None  # attends last in this layer
        self._called: list[nn.Module] = []
        self._parts = [part for part in layer.modules() if hasattr(_config(part), "_attn_implementation")]
        self.mask = rows_of_block_mask(mask) if isinstance(mask, BlockMask) else mask
        self.implementation, self.sdpa = "", False
        if self._parts:
            own = attention_implementation(_config(self._parts[0]))
            self.implementation, self.sdpa = segment_implementation(own), own == "sdpa"

    @contextlib.contextmanager
    def over(self, segment: Segment) -> Iterator[None]:
        """Inside the block, the layer's attention is that of `segment`'s tokens."""
        self.segment, self._called = segment, []
        token = _running.set(self)
        try:
            with contextlib.ExitStack() as stack:
                for part in self._parts:
                    stack.enter_context(dispatching_to(part, _IN_SEGMENTS))
                yield
        finally:
            _running.reset(token)

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        **options: Any,
    ) -> tuple[Tensor, Any]:
        segment = self.segment
        assert segment is not None
        if module in self._called:
            raise ValueError(f"{type(module).__name__} attends twice in one layer.")
        self._called.append(module)
        if self.stop_at is None:
            self.last = module
        if module not in self.buffers:
            self.buffers[module] = HeadBuffer(self.seq_len), HeadBuffer(self.seq_len)
        first = 0 if mask is None else _first_allowed(mask)
        keys, values = (
            heads_up_to(own, buffer, first, segment.start, segment.stop)
            for own, buffer in zip((key, value), self.buffers[module], strict=True)
        )
        if module is self.stop_at:
            raise _Filled
        function = attention_function(module, self.implementation)
        if mask is not None:
            return function(module, query, keys, values, mask[..., first:], **options)
        if segment.start == 0:
            return function(module, query, keys, values, None, **options)
        if self.sdpa and fits(query, keys, values, options):
            return attend_tail(query, keys, values, options.get("scaling")).transpose(1, 2), None
        positions = torch.arange(segment.start, segment.stop, device=query.device)
        mask = torch.arange(segment.stop, device=query.device) <= positions[:, None]
        return function(module, query, keys, values, mask[None, None], **options)

    def take_heads(self) -> list[Tensor]:
        """Keys and values of all tokens, two for each attention module. They are kept here no longer."""
        heads = [buffer.data for pair in self.buffers.values() for buffer in pair]
        self._modules = list(self.buffers)
        self.buffers = {}
        return [head for head in heads if head is not None]

    def give_heads(self, heads: Iterator[Tensor]) -> None:
        """Go on with keys and values that `take_heads` returned."""
        for module in self._modules:
            key, value = (HeadBuffer(self.seq_len, next(heads)) for _ in range(2))
            self.buffers[module] = key, value


def _attend_in_segments(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Any]:
    return _running.get()(module, query, key, value, attention_mask, **options)


AttentionInterface.register(_IN_SEGMENTS, _attend_in_segments)


def _config(part: nn.Module) -> Any:
    return getattr(part, "config", None)


def _first_allowed(mask_B1nT: Tensor) -> int:
    """The first key that some query may see; those before it need not be computed (sliding windows)."""
    if mask_B1nT.dtype != torch.bool:
        return 0
    return int(mask_B1nT.any(0).any(0).any(0).int().argmax())


def _rows(values: Any, segment: Segment) -> Any:
    """A segment's part of what a layer gets for each token: [B or 1, S, ...], tuples and dicts of them."""
    if isinstance(values, Tensor):
        return segment.of(values)
    if isinstance(values, dict):
        return {name: _rows(part, segment) for name, part in values.items()}
    if isinstance(values, tuple):
        return tuple(_rows(part, segment) for part in values)
    return values


class LayerCall:
    """One decoder layer as the model called it for a whole sequence.

    Args:
        layer: the decoder layer.
        forward: its class's own forward.
        arguments: those of the call, without the hidden states [B, S, D] and without a cache.
        seq_len: S.

    Attributes:
        arguments: those of the call, without a cache.
    """

    def __init__(
        self, layer: Any, forward: Callable[..., Any], arguments: dict[str, Any], seq_len: int
    ) -> None:
        self.layer = layer
        self.seq_len = seq_len
        self._forward = forward
        self.arguments = {name: value for name, value in arguments.items() if name not in CACHES}
        self.attention = SegmentedAttention(layer, self.arguments.get("attention_mask"), seq_len)

    def __call__(self, x_BnD: Tensor, segment: Segment) -> Tensor:
        """The layer's output for the rows of a segment; those before it have run already."""
        if segment.whole:
            mask = made(self.arguments.get("attention_mask"), self.seq_len)
            arguments = {**self.arguments, "attention_mask": mask} if mask is not None else self.arguments
            output: Tensor = self._forward(self.layer, x_BnD, **arguments)
            return output
        with self.attention.over(segment):
            output = self._forward(self.layer, x_BnD, **self._part(segment))
        return output

    def fill(self, x_BnD: Tensor, segment: Segment) -> None:
        """Make the keys and values of a segment, and nothing that comes behind them."""
        attention = self.attention
        attention.stop_at = attention.last
        with contextlib.suppress(_Filled), attention.over(segment):
            self._forward(self.layer, x_BnD, **self._part(segment))
        attention.stop_at = None

    def _part(self, segment: Segment) -> dict[str, Any]:
        arguments = {
            name: _rows(value, segment) if name in POSITIONS else value
            for name, value in self.arguments.items()
        }
        mask = self.attention.mask
        if isinstance(mask, LazyMask):
            arguments["attention_mask"] = mask.rows(segment.start, segment.stop)
        elif isinstance(mask, Tensor) and mask.ndim == 4:
            arguments["attention_mask"] = mask[:, :, segment.start : segment.stop, : segment.stop]
        return arguments
