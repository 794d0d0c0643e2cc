"""The reverse walk: exact gradients of a whole sequence with the activations of one segment at a time.

Forward, the segments of a sequence run through the layers one after the other, without graph. Backward, from
the last segment to the first, each runs again with graph, over keys and values of the earlier segments as
leaves. Three gradients go back through it: that of its own output, the one that later segments left on its
keys and values, and that of what its layers recorded. These are the terms of the gradient of one pass over
the whole sequence, added up in another order.

A walk over one layer keeps the layer's input and makes keys and values again. A walk over all layers keeps
the keys and values of all of them and nothing between the layers.

Shapes: B batch, S tokens of the sequence, D hidden width.
"""

from __future__ import annotations

import contextlib
import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from lemo_trainer.exact import recorded
from lemo_trainer.exact.layer import LayerCall, Segment
from lemo_trainer.exact.replay import RandomState, present_autocast
from lemo_trainer.layers.checkpointing import without_graph
from lemo_trainer.model.leaves import Leaves
from lemo_trainer.model.patching import Passes
from lemo_trainer.model.state import ModuleState

Run = Callable[..., Tensor]


class Walk:
    """One or more layers over a sequence.

    Args:
        calls: the layers as the model calls them, in order.
        segments: the sequence, cut.
        keep_heads: keep the keys and values from the forward to the backward pass; else the backward pass
            makes them again.
        run: calls its first argument on the others, with graph: the layers' gradient checkpointing, or
            nothing but a call.
        passes: those of the session, which let one thread train at a time.
    """

    def __init__(
        self,
        calls: Sequence[LayerCall],
        segments: Sequence[Segment],
        *,
        keep_heads: bool,
        run: Run,
        passes: Passes,
    ) -> None:
        self.calls = calls
        self.segments = segments
        self.layers = [call.layer for call in calls]
        arguments = {
            f"{name} of layer {n}" if n else name: value
            for n, call in enumerate(calls)
            for name, value in call.arguments.items()
        }
        self._state = ModuleState(self.layers, arguments)
        self.parameters = self._state.trained
        self.recorded: list[str] = []  # the names of the outputs behind the first
        self._keep_heads = keep_heads
        self._run = run
        self._passes = passes
        self._names = recorded.recorded_names()
        self._random: list[RandomState | None] = []

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, ...]:
        """The last layer's output [B, S, D], then what was recorded."""
        self._autocast = present_autocast(x_BSD.device)
        outputs: list[Tensor] = []
        parts: list[dict[str, list[Tensor]]] = []
        output = x_BSD
        for segment in self.segments:
            before = RandomState(x_BSD)
            with without_graph(), recorded.recording(self._names) as part:
                x_BnD = self._through_layers(segment.of(x_BSD), segment)
            parts.append(part)
            self._random.append(None if before.holds(x_BSD) else before)
            if segment.whole:
                output = x_BnD
                continue
            if not segment.start:
                output = x_BnD.new_empty(*x_BSD.shape[:2], *x_BnD.shape[2:])
            segment.of(output).copy_(x_BnD)
        self._state.after_first_run()
        for name in self._names:
            for same in zip(*(part[name] for part in parts), strict=True):
                self.recorded.append(name)
                outputs.append(recorded.join(list(same), len(x_BSD)))
        return output, *outputs

    def take_heads(self) -> list[Tensor]:
        """The keys and values that the backward pass starts with; the walk itself holds none then."""
        heads = [head for call in self.calls for head in call.attention.take_heads()]
        return heads if self._keep_heads else []

    def backward(
        self, x_BSD: Tensor, heads: Sequence[Tensor], gradients: Sequence[Tensor | None], want_input: bool
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """The gradient of the input, None where it is not wanted, and those of `parameters`.

        Args:
            x_BSD: the input of the forward pass.
            heads: what `take_heads` returned.
            gradients: of the outputs.
        """
        grad_x_BSD = torch.zeros_like(x_BSD, memory_format=torch.contiguous_format) if want_input else None
        leaves = Leaves(self.parameters)
        with (
            self._passes.running_again(self.layers),
            self._autocast,
            self._state.restored(),
            leaves.in_place_of_parameters(self._state.parts),
        ):
            self._restore_heads(x_BSD, heads)
            for place in reversed(range(len(self.segments))):
                segment = self.segments[place]
                x_BnD = segment.of(x_BSD).detach().requires_grad_(want_input)
                self._backward_of_segment(place, x_BnD, gradients)
                leaves.add_up()
                if grad_x_BSD is not None and x_BnD.grad is not None:
                    segment.of(grad_x_BSD).copy_(x_BnD.grad)
        for call in self.calls:
            call.attention.take_heads()
        return grad_x_BSD, leaves.gradients()

    def _backward_of_segment(self, place: int, x_BnD: Tensor, gradients: Sequence[Tensor | None]) -> None:
        segment, batch = self.segments[place], len(x_BnD)
        with self._as_before(place), torch.enable_grad(), recorded.recording(self._names) as part:
            output_BnD = self._through_layers(x_BnD, segment, self._run)
        grad_BSD, *grads_recorded = gradients
        pairs = [(output_BnD, None if grad_BSD is None else segment.of(grad_BSD))]
        values = (value for name in self._names for value in part[name])
        for value, grad in zip(values, grads_recorded, strict=True):
            if grad is not None:
                grad = recorded.part_of(grad, value, batch, segment.start, segment.stop)
            pairs.append((value, grad))
        pairs = [(value, grad) for value, grad in pairs if grad is not None and value.requires_grad]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))

    def _restore_heads(self, x_BSD: Tensor, heads: Sequence[Tensor]) -> None:
        """The keys and values of all segments but the last, which fills in its own."""
        if self._keep_heads:
            given = iter(heads)
            for call in self.calls:
                call.attention.give_heads(given)
            return
        for place, segment in enumerate(self.segments[:-1]):
            with self._as_before(place), torch.no_grad():
                x_BnD = segment.of(x_BSD)
                for call in self.calls[:-1]:
                    x_BnD = call(x_BnD, segment)
                self.calls[-1].fill(x_BnD, segment)

    def _through_layers(self, x_BnD: Tensor, segment: Segment, run: Run = operator.call) -> Tensor:
        for call in self.calls:
            x_BnD = run(functools.partial(call, segment=segment), x_BnD)
        return x_BnD

    def _as_before(self, place: int) -> contextlib.AbstractContextManager[None]:
        """The random generators as they were when the segment ran first."""
        random = self._random[place]
        return contextlib.nullcontext() if random is None else random.restored()


class _Walk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, walk: Walk, x_BSD: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        outputs = walk.forward(x_BSD)
        ctx.walk = walk
        ctx.save_for_backward(x_BSD, *walk.take_heads())
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                'mode="exact" makes first gradients only, got create_graph=True (a gradient penalty, a '
                "Hessian); train without LeMo."
            )
        x_BSD, *heads = ctx.saved_tensors
        grad_x_BSD, grads = ctx.walk.backward(x_BSD, heads, gradients, ctx.needs_input_grad[1])
        return None, grad_x_BSD, *grads


def walk_through(walk: Walk, x_BSD: Tensor) -> Tensor:
    """The output [B, S, D] of the walk's layers, with exact gradients for `x_BSD` and their parameters."""
    output_BSD, *values = _Walk.apply(walk, x_BSD, *walk.parameters)
    recorded.hand_on(walk.recorded, values)
    result: Tensor = output_BSD
    return result
