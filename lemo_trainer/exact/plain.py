"""What a step without LeMo would save for its backward pass, counted on fake tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lemo_trainer.compat import CHECKPOINTING
from lemo_trainer.exact.fake import faked
from lemo_trainer.measure import ActivationBytes
from lemo_trainer.model.architectures import find_causal_lm
from lemo_trainer.model.patching import Passes


def plain_bytes(model: nn.Module, passes: Passes, batch_size: int, seq_len: int) -> int:
    """The bytes that wait for the backward pass in plain training, without gradient checkpointing.

    Args:
        model: a causal LM, patched or not.
        passes: those of its session.
        batch_size, seq_len: the shape of the batch.

    Raises:
        CannotCountError: the weights are sharded or quantized, or the model does not run on fake tensors.
    """
    parts = find_causal_lm(model, head=False)
    device = parts.model.get_input_embeddings().weight.device
    made = ActivationBytes()
    with passes.outside(), faked(parts.model):
        for part in parts.model.modules():
            vars(part).pop(CHECKPOINTING, None)  # which comes back with the block's end
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=device)
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        with made:
            if parts.has_head:
                parts.model(**inputs, labels=tokens).loss.backward()
            else:
                parts.model(**inputs)[0].sum().backward()
    return made.saved_bytes
