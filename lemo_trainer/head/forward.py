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
from typing import Any

import torch
from torch import Tensor, nn

from lemo_trainer.compat import is_whole, loss_function, uses_causal_lm_loss
from lemo_trainer.head.logits import LogitsOnDemand, logit_scale, with_logits_on_demand
from lemo_trainer.head.loss import IGNORE_INDEX, segmented_cross_entropy, shift
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.model.calls import dry_options, idle_layers
from lemo_trainer.model.capture import without_dropout


@contextlib.contextmanager
def _segmented_loss(
    parts: CausalLM, segment: int, label_weights: Callable[[], Tensor | None] = lambda: None
) -> Iterator[list[Tensor]]:
    """Yields a list, to which the call of the head appends the hidden state.

    Another thread that evaluates the model meanwhile gets its logits and its loss as before.
    """
    model, head = parts.model, parts.head
    config = model.config
    seen: list[Tensor] = []
    own_loss, thread = model.loss_function, threading.get_ident()

    def keep_hidden_state(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        if threading.get_ident() != thread:
            return args
        seen.append(args[0])
        return (args[0][:, :0], *args[1:])

    def segmented_loss(
        logits: Tensor,
        labels: Tensor,
        vocab_size: int,
        num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = IGNORE_INDEX,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        (hidden_BSD,) = seen
        if labels.shape != hidden_BSD.shape[:2]:
            raise ValueError(
                f"`labels` must have the shape of the input, {tuple(hidden_BSD.shape[:2])}, "
                f"got {tuple(labels.shape)}."
            )
        assert ignore_index == IGNORE_INDEX
        device = hidden_BSD.device
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else hidden_BSD.dtype
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
        return (segmented_loss if threading.get_ident() == thread else own_loss)(*args, **kwargs)

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
        told: see `with_logits_on_demand`.
        segment: labelled tokens that go through the head at a time.
        label_weights: called after the layers; returns the weight in the gradient of the label that each
            token predicts, [B, S], or None for 1.

    Raises:
        ValueError: there are weights, and `forward` computes the loss without the head, as Liger's does.
    """
    return_tuple = arguments.arguments.get("kwargs", {}).pop("return_dict", True) is False
    with _segmented_loss(parts, segment, label_weights) as seen:
        output = forward(*arguments.args, **arguments.kwargs)
    if not seen and label_weights() is not None:
        raise ValueError(
            "`label_weights` must be 'all' if other code replaced the forward of "
            f"{type(parts.model).__name__} by one with a loss of its own; with `use_liger_kernel`, "
            'liger_kernel_config={"fused_linear_cross_entropy": False} keeps the head.'
        )
    if seen:
        output = with_logits_on_demand(output, LogitsOnDemand(parts, seen[0]), told)
    return output.to_tuple() if return_tuple else output


def check_head(parts: CausalLM) -> None:
    """Raise ValueError unless the segment-wise loss is the model's own.

    A few tokens go past idle layers through head and loss, once with each loss. If the weights are not whole
    (on the meta device, sharded by FSDP2 or ZeRO-3), only types are checked.
    """
    model, head = parts.model, parts.head
    if not isinstance(head, nn.Linear) or not head.weight.is_floating_point():
        raise ValueError(
            f"The segment-wise loss needs a plain nn.Linear as output head, got {type(head).__name__} "
            "(LoRA or modules_to_save on lm_head?); leave the head out or set loss_segment=0."
        )
    if not uses_causal_lm_loss(model):
        raise ValueError(
            "The segment-wise loss replaces transformers' ForCausalLMLoss, which "
            f"{type(model).__name__} does not use; set loss_segment=0."
        )
    if not is_whole(head.weight):
        return
    tokens = torch.arange(1, 9, device=model.get_input_embeddings().weight.device)[None]
    inputs = {"input_ids": tokens, "labels": tokens, **dry_options(model)}
    loud = head.register_forward_pre_hook(
        lambda module, args: (32 * args[0], *args[1:])
    )  # large enough for caps to show
    try:
        with torch.no_grad(), without_dropout(model), idle_layers(parts.layers):
            wanted = model(**inputs).loss
            with _segmented_loss(parts, 4):
                got = model(**inputs).loss
    finally:
        loud.remove()
    if not wanted.isfinite():
        raise ValueError(
            f"The loss of {type(model).__name__} on a few tokens must be finite, got {float(wanted)}: its "
            "embeddings, last norm or head hold NaN or inf."
        )
    tolerance = 1e-4 if wanted.dtype == torch.float32 and head.weight.dtype == torch.float32 else 2e-2
    if not torch.allclose(got, wanted, rtol=tolerance):
        raise ValueError(
            f"The segment-wise loss must equal that of {type(model).__name__}, {float(wanted):.4f} on a few "
            f"tokens, got {float(got):.4f}: its head does more than scaling and capping; set loss_segment=0."
        )
