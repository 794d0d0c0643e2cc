"""The segment-wise loss in the place of a causal LM's own head and loss.

The model's own forward runs with two of its parts exchanged during the call: the head gets no rows, so that
it computes no logits, and the loss function takes the hidden state that the head would have got. Everything
else, router losses, `num_items_in_batch` and `shift_labels` included, is still the model's own code.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import loss_function
from lemo_trainer.head.logits import (
    LogitsOfHead,
    LogitsOnDemand,
    logit_scale,
    with_logits_on_demand,
)
from lemo_trainer.head.loss import IGNORE_INDEX, segmented_cross_entropy, shift
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.model.calls import ask_for_dict


@dataclass(frozen=True)
class _HeadCall:
    """What the model's forward gave the head.

    Args:
        hidden: the hidden state, [B, S, D].
        autocast: the dtype of the autocast that it ran under; None without autocast.
    """

    hidden: Tensor
    autocast: torch.dtype | None

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the logits that the head makes."""
        return self.autocast or self.hidden.dtype


@contextlib.contextmanager
def segmented_loss(
    parts: CausalLM, segment: int, label_weights: Callable[[], Tensor | None] = lambda: None
) -> Iterator[list[_HeadCall]]:
    """Inside the block the model's loss is the segment-wise one; yields a list of the calls of its head.

    Another thread that evaluates the model meanwhile gets its logits and its loss as before.
    """
    model, head = parts.model, parts.head
    config = model.config
    seen: list[_HeadCall] = []
    own_loss, thread = model.loss_function, threading.get_ident()

    def keep_hidden_state(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != thread:
            return args
        seen.append(_HeadCall(args[0], _autocast_dtype(args[0].device)))
        return (args[0][:, :0], *args[1:])

    def loss_in_segments(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        hidden_BSD = seen[0].hidden
        if labels.shape != hidden_BSD.shape[:2]:
            raise ValueError(
                f"`labels` must have the shape of the input, {tuple(hidden_BSD.shape[:2])}, "
                f"got {tuple(labels.shape)}."
            )
        assert ignore_index == IGNORE_INDEX  # checks.unusual_loss
        device = hidden_BSD.device
        dtype = seen[0].dtype
        shift_labels = shift(labels) if shift_labels is None else shift_labels
        weights_BS = label_weights()
        return segmented_cross_entropy(
            hidden_BSD.flatten(0, 1).to(dtype),
            head.weight.to(dtype),
            shift_labels.flatten().to(device),
            bias_V=None if head.bias is None else head.bias.to(dtype),
            weights_N=None if weights_BS is None else weights_BS.flatten(),
            segment=segment,
            num_items=num_items_in_batch,
            scale=logit_scale(config),
            softcap=getattr(config, "final_logit_softcapping", None),
        )

    def loss(*args: Any, **kwargs: Any) -> Any:
        return (loss_in_segments if threading.get_ident() == thread else own_loss)(*args, **kwargs)

    hook = head.register_forward_pre_hook(keep_hidden_state)
    try:
        with loss_function(model, loss):
            yield seen
    finally:
        hook.remove()


def forward_with_segmented_loss(
    parts: CausalLM,
    forward: Callable[..., Any],
    arguments: inspect.BoundArguments,
    segment: int,
    label_weights: Callable[[], Tensor | None],
    told: list[bool],
) -> Any:
    """The model's own `forward` on `arguments`, with the segment-wise loss and logits on demand.

    Args:
        told: see `LogitsOnDemand`.
        segment: labelled tokens that go through the head at a time.
        label_weights: called after the layers; returns the weight in the gradient of the label that each
            token predicts, [B, S], or None for 1.

    Raises:
        ValueError: there are weights, and `forward` computes the loss without the head, as Liger's does.
    """
    wants_tuple = ask_for_dict(arguments)
    with segmented_loss(parts, segment, label_weights) as seen:
        output = forward(*arguments.args, **arguments.kwargs)
    if not seen and label_weights() is not None:
        raise ValueError(
            "`label_weights` must be 'all' if other code replaced the forward of "
            f"{type(parts.model).__name__} by one with a loss of its own; with `use_liger_kernel`, "
            'liger_kernel_config={"fused_linear_cross_entropy": False} keeps the head.'
        )
    if seen:
        output = with_logits_on_demand(output, _logits_on_demand(parts, seen[0], told))
    return output.to_tuple() if wants_tuple else output


def _logits_on_demand(parts: CausalLM, call: _HeadCall, told: list[bool]) -> LogitsOnDemand:
    make = LogitsOfHead(parts.model, parts.head, call.autocast)
    dtype = call.dtype
    if call.autocast and not _autocast_dtype(call.hidden.device):
        dtype = torch.float32  # accelerate's autocast, inside this forward: it casts outputs
    return LogitsOnDemand(make, call.hidden, dtype=dtype, told=told)


def _autocast_dtype(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
