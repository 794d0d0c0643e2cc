"""What the parts of a step cost, counted on fake tensors: the head, and each kind of layer.

A layer is counted by itself: over the whole sample, as plain training and checkpointing run it, and over the
last segment of the sample, which meets the most keys, as the walks of exact mode run it. `costs` adds the
parts up.

Shapes: B batch, S tokens of a sample, n tokens of a segment, D hidden width.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.compat import attention_implementation
from lemo_trainer.exact.fake import CannotCountError, faked
from lemo_trainer.exact.layer import LayerCall, Segment
from lemo_trainer.exact.masks import lazy_masks
from lemo_trainer.exact.replay import present_autocast
from lemo_trainer.exact.walk import Run
from lemo_trainer.layers.checkpointing import saving_matmuls
from lemo_trainer.measure import ActivationBytes, WorkCounter
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.model.calls import dry_options, idle_layers


@dataclass(frozen=True)
class Work:
    """What a computation does: operations of matrix products, bytes written, calls of operators."""

    flops: float = 0.0
    bytes: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes, self.calls + other.calls)

    def __mul__(self, factor: float) -> Work:
        return Work(self.flops * factor, self.bytes * factor, self.calls * factor)


@dataclass(frozen=True)
class HeadCost:
    """Everything but the layers: embeddings, rotary tables, last norm, head and loss.

    Args:
        saved: bytes that wait for the backward pass.
        peak: the most bytes until the gradient reaches the last layer.
        end_peak: the most bytes after the layers' backward pass (the gradient of trained embeddings).
        work: of the whole.
    """

    saved: float
    peak: float
    end_peak: float
    work: Work


@dataclass(frozen=True)
class LayerCost:
    """One run of a layer over a segment, forward with graph and backward.

    Args:
        saved: bytes that wait for the backward pass, the output included, the input not.
        peak: the most bytes at one time, with those and the gradient of the input.
        forward, backward: the work of the two.
    """

    saved: float
    peak: float
    forward: Work
    backward: Work


@dataclass(frozen=True)
class SegmentCost:
    """A layer over segments of one size.

    Args:
        last: its run over the last segment of the sample, which meets the most keys.
        first: its run over the first segment.
        fill: the work to make the keys and values of a token again.
    """

    last: LayerCost
    first: LayerCost
    fill: Work


@dataclass(frozen=True)
class KindCost:
    """All that is counted of one kind of layer.

    Args:
        count: layers of this kind.
        hidden: bytes of the hidden states of the batch.
        item: bytes of a number.
        heads: bytes of its keys and values.
        sums: bytes of the gradients of its weights, which a walk adds up beside those that the weights have.
        plain: the layer over the whole sample, as the model runs it.
        selective: the same with elementwise results recomputed.
        segments: by recomputation (False, True) and `segment_tokens`; empty if the layer runs whole.
    """

    count: int
    hidden: float
    item: int
    heads: float
    sums: float
    plain: LayerCost
    selective: LayerCost
    segments: dict[tuple[bool, int], SegmentCost]


@dataclass(frozen=True)
class StepParts:
    """The counted parts of a step of `batch` samples of `seq_len` tokens."""

    batch: int
    seq_len: int
    head: HeadCost
    kinds: tuple[KindCost, ...]


def count_step(
    parts: CausalLM,
    head_forward: Callable[..., Any],
    batch: int,
    seq_len: int,
    sizes: tuple[int, ...],
    uncut: set[int],
) -> StepParts:
    """Count a step of `parts`.

    Args:
        head_forward: the causal LM's forward with the loss of exact mode.
        sizes: `segment_tokens` to count, all below `seq_len`.
        uncut: layers that cannot run in segments.

    Raises:
        CannotCountError: the model does not run on fake tensors.
    """
    if not parts.has_same_layers():
        raise CannotCountError("its layers were changed since LeMo was applied")
    with faked(parts.model), lazy_masks(attention_implementation(parts.model.config)):
        head, calls, autocast = _count_head(parts, head_forward, batch, seq_len)
        kinds: Counter[str] = Counter()
        first: dict[str, int] = {}
        for index, (layer, (_, arguments)) in enumerate(zip(parts.layers, calls, strict=True)):
            mask = arguments.get("attention_mask")
            kind = f"{index in uncut} {type(mask).__name__} {layer!r}"
            kinds[kind] += 1
            first.setdefault(kind, index)
        counted = []
        for kind, count in kinds.items():
            index = first[kind]
            cut = () if index in uncut else sizes
            with autocast:
                counted.append(_count_kind(parts.layers[index], *calls[index], cut, count))
    return StepParts(batch, seq_len, head, tuple(counted))


def _count_head(
    parts: CausalLM, forward: Callable[..., Any], batch: int, seq_len: int
) -> tuple[HeadCost, list[tuple[Tensor, dict[str, Any]]], torch.autocast]:
    device = parts.model.get_input_embeddings().weight.device
    tokens = torch.zeros(batch, seq_len, dtype=torch.int64, device=device)
    made = ActivationBytes()
    seen: list[torch.autocast] = []
    last = _with_gradient(parts.layers[-1], made, seen)
    labels = {"labels": tokens} if parts.has_head else {}  # other heads have labels of other shapes
    with idle_layers(parts.layers) as calls, last, made, WorkCounter() as work:
        loss = _loss(forward(input_ids=tokens, **labels, **dry_options(parts.model)))
        loss.backward()  # the output itself is gone, as it is in a training loop
    cost = HeadCost(
        made.saved_bytes, made.peaks["head"], made.peaks["end"], Work(work.flops, work.bytes, work.calls)
    )
    return cost, calls, seen[0]


def _loss(output: Any) -> Tensor:
    """The loss in an output, or one that stands for a loss made outside."""
    loss: Tensor | None = getattr(output, "loss", None)
    return output[0].sum() if loss is None else loss


@contextlib.contextmanager
def _with_gradient(layer: Any, made: ActivationBytes, seen: list[torch.autocast]) -> Iterator[None]:
    """Let an idle last layer return hidden states that want a gradient, and name the phases of the step.

    The autocast that the layer runs under is appended to `seen`.
    """
    idle = vars(layer)["forward"]

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        made.phase = "head"
        output: Tensor = idle(*args, **kwargs)
        if not output.requires_grad:
            output = output.detach().requires_grad_()
        output.register_hook(lambda _: setattr(made, "phase", "end"))
        seen.append(present_autocast(output.device))
        return output

    vars(layer)["forward"] = forward
    yield


def _count_kind(
    layer: Any, x_BSD: Tensor, arguments: dict[str, Any], sizes: tuple[int, ...], count: int
) -> KindCost:
    seq_len = x_BSD.shape[1]
    whole = Segment(0, seq_len, seq_len)
    call = LayerCall(layer, type(layer).forward, arguments, seq_len)
    plain = _count(functools.partial(call, segment=whole), x_BSD, _called)
    selective = _count(functools.partial(call, segment=whole), x_BSD, saving_matmuls)
    segments: dict[tuple[bool, int], SegmentCost] = {}
    heads = 0.0
    for size in sizes:
        for recompute, run in ((False, _called), (True, saving_matmuls)):
            segments[recompute, size], heads = _count_segments(layer, x_BSD, arguments, size, run)
    return KindCost(
        count, x_BSD.nbytes, x_BSD.element_size(), heads, _sums(layer), plain, selective, segments
    )


def _sums(layer: Any) -> float:
    """Bytes of a walk's own gradients: in half precision, sums in float32 beside those of a segment."""
    trained = [p for p in layer.parameters() if p.requires_grad]
    return float(sum(p.nbytes if p.dtype.itemsize >= 4 else p.nbytes + 4 * p.numel() for p in trained))


def _called(function: Callable[..., Tensor], x: Tensor) -> Tensor:
    return function(x)


def _count_segments(
    layer: Any, x_BSD: Tensor, arguments: dict[str, Any], size: int, run: Run
) -> tuple[SegmentCost, float]:
    seq_len = x_BSD.shape[1]

    def of(segment: Segment) -> tuple[LayerCost, Work, float]:
        call = LayerCall(layer, type(layer).forward, arguments, seq_len)
        filled = Work()
        if segment.start:
            before = Segment(0, segment.start, seq_len)
            call.attention.last = _last_attention(call, x_BSD)
            with torch.no_grad(), WorkCounter() as work:
                call.fill(before.of(x_BSD), before)
            filled = Work(work.flops, work.bytes, work.calls * segment.start / size) * (1 / segment.start)
        cost = _count(functools.partial(call, segment=segment), segment.of(x_BSD), run)
        heads = [buffer.data for pair in call.attention.buffers.values() for buffer in pair]
        return cost, filled, sum(head.nbytes for head in heads if head is not None)

    last, fill, heads = of(Segment(seq_len - size, seq_len, seq_len))
    first, _, _ = of(Segment(0, size, seq_len))
    return SegmentCost(last, first, fill), heads


def _last_attention(call: LayerCall, x_BSD: Tensor) -> Any:
    """The module that attends last in a layer, where filling its keys and values stops."""
    trial = LayerCall(call.layer, type(call.layer).forward, call.arguments, call.seq_len)
    segment = Segment(0, 1, call.seq_len)
    with torch.no_grad():
        trial(segment.of(x_BSD), segment)
    return trial.attention.last


def _count(function: Callable[[Tensor], Tensor], x: Tensor, run: Run) -> LayerCost:
    x = x.detach().requires_grad_()
    with ActivationBytes() as made:
        with WorkCounter() as forward:
            output = run(function, x)
        saved = made.bytes
        with WorkCounter() as backward:
            torch.autograd.backward(output, torch.empty_like(output))
    works = [Work(work.flops, work.bytes, work.calls) for work in (forward, backward)]
    return LayerCost(saved, made.peak_bytes, *works)
