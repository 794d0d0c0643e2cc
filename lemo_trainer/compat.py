"""Private and version-dependent parts of torch, transformers and the libraries around them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


def is_whole(weight: Tensor) -> bool:
    """Whether all of a weight is in this process: not on the meta device, nor sharded by FSDP2 or ZeRO-3."""
    return not (weight.is_meta or hasattr(weight, "full_tensor") or hasattr(weight, "ds_id"))


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside PEFT's, DDP's or torch.compile's wrappers."""
    while True:
        if hasattr(model, "get_base_model"):
            model = model.get_base_model()
        elif hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(getattr(model, "module", None), nn.Module):
            model = model.module
        else:
            return model


def checkpointing_argument() -> str:
    """The name of `TrainingArguments`' gradient checkpointing, which transformers 5.23 renamed."""
    from transformers import TrainingArguments

    new = "activation_checkpointing"
    return new if hasattr(TrainingArguments, new) else "gradient_checkpointing"
