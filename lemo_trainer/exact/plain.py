"""What a step without LeMo would save for its backward pass, counted on fake tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from lemo_trainer.compat import CHECKPOINTING
from lemo_trainer.exact.fake import CannotCountError, faked
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
    with passes.outside(), faked(parts.model), _checkpointing_off(parts.model):
        tokens = torch.zeros(batch_size, seq_len, dtype=torch.int64, device=device)
        inputs: dict[str, Any] = {"input_ids": tokens, "use_cache": False}
        try:
            with made:
                if parts.has_head:
                    parts.model(**inputs, labels=tokens).loss.backward()
                else:
                    parts.model(**inputs)[0].sum().backward()
        except Exception as error:
            raise CannotCountError(
                f"it does not run on fake tensors ({type(error).__name__}: {error})"
            ) from error
    return made.saved_bytes


@contextlib.contextmanager
def _checkpointing_off(model: nn.Module) -> Iterator[None]:
    on = [part for part in model.modules() if vars(part).get(CHECKPOINTING)]
    for part in on:
        vars(part)[CHECKPOINTING] = False
    try:
        yield
    finally:
        for part in on:
            vars(part)[CHECKPOINTING] = True
