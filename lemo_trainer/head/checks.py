"""Whether a causal LM's head and loss are the ones that the segment-wise loss computes.

Before training, a few tokens tell. In front of each training pass, a look at the head and the loss function
tells whether somebody changed them since; a hook on the head, for one, wants all logits.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from lemo_trainer.compat import hooks_on, is_whole, uses_causal_lm_loss
from lemo_trainer.head.forward import segmented_loss
from lemo_trainer.head.loss import IGNORE_INDEX
from lemo_trainer.model.architectures import CausalLM
from lemo_trainer.model.calls import dry_options, idle_layers
from lemo_trainer.model.capture import without_dropout
from lemo_trainer.model.hooks import name_of, without_hooks


def unusual_loss(model: Any, arguments: inspect.BoundArguments | None = None) -> str:
    """What differs from transformers' loss of a causal LM; empty if nothing does.

    Args:
        model: the causal LM.
        arguments: those of a call, which may ask for another `ignore_index`.
    """
    if not uses_causal_lm_loss(model):
        return f"the loss function of {type(model).__name__} is not transformers' ForCausalLMLoss"
    given = {} if arguments is None else arguments.arguments.get("kwargs", {})
    ignored = given.get("ignore_index", IGNORE_INDEX)
    return "" if ignored == IGNORE_INDEX else f"the call has ignore_index={ignored}"


def unusual_head(head: Any) -> str:
    """What makes an output head another function than that of a plain nn.Linear; empty if nothing does."""
    kind = type(head)
    if not isinstance(head, nn.Linear) or kind.forward is not nn.Linear.forward:
        return f"the output head is a {kind.__module__}.{kind.__qualname__} and not a plain nn.Linear"
    if is_parametrized(head):
        return "the output head has a parametrization of torch.nn.utils"
    if "forward" in vars(head):
        return "the output head has a `forward` of its own"
    return ""


def hook_on_head(head: Any) -> str:
    """The first hook on an output head, which wants all logits or their gradient; empty without one."""
    return next((f"the output head has the hook {name_of(hook)}" for hook in hooks_on(head)), "")


def why_all_logits(parts: CausalLM, arguments: inspect.BoundArguments | None = None) -> str:
    """Why head and loss must run as the model itself calls them; empty if pieces of them give the same."""
    head = parts.head
    return unusual_loss(parts.model, arguments) or unusual_head(head) or hook_on_head(head)


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
    if not is_whole(head.weight) or unusual_head(head):
        return
    tokens = torch.arange(1, 9, device=model.get_input_embeddings().weight.device)[None]
    inputs = {"input_ids": tokens, "labels": tokens, **dry_options(model)}
    with torch.no_grad(), without_dropout(model), without_hooks(model), idle_layers(parts.layers):
        loud = head.register_forward_pre_hook(
            lambda module, args: (32 * args[0], *args[1:])
        )  # large enough for caps to show
        wanted = model(**inputs).loss
        with segmented_loss(parts, 4):
            got = model(**inputs).loss
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
