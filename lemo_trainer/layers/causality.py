"""Whether a model is causal: tried out where the table of known architectures does not say so."""

from __future__ import annotations

import torch
from torch import Tensor

from lemo_trainer.compat import is_whole
from lemo_trainer.model.architectures import ARCHITECTURES, NOT_CAUSAL, CausalLM
from lemo_trainer.model.capture import without_dropout

TOKENS = 8


@torch.no_grad()
def check_causal(parts: CausalLM) -> None:
    """Raise ValueError if the last token of eight changes the hidden states of those before it.

    Only models that `ARCHITECTURES` does not list are tried, and only with whole weights.
    """
    model = parts.model
    if model.config.model_type in ARCHITECTURES or not all(map(is_whole, model.parameters())):
        return
    tokens = torch.arange(1, TOKENS + 1, device=model.get_input_embeddings().weight.device)[None]

    def before_last(last: int) -> Tensor:
        tokens[0, -1] = last
        hidden: Tensor = model.base_model(input_ids=tokens)[0][:, :-1]
        return hidden

    with without_dropout(model):
        one, other = before_last(1), before_last(2)
    if not torch.allclose(one, other, rtol=1e-3, atol=1e-3 * float(one.abs().max())):
        name = f"{type(model).__name__} with config.model_type {model.config.model_type!r}"
        raise ValueError(NOT_CAUSAL.format(name=name))
