"""Models with LoRA as LeMo's tables train them, and the methods that the tables compare."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from common import assets
from peft import LoraConfig, get_peft_model
from torch import Tensor

from lemo_trainer import LemoConfig, apply_lemo, remove_lemo
from lemo_trainer.texts import pack
from models import language

LORA: dict[str, Any] = {"r": 8, "target_modules": "all-linear"}
Method = tuple[LemoConfig | None, bool]
"""LeMo's options, or None for a model without it; whether gradient checkpointing is on."""

SEGMENTED_LOSS = LemoConfig(keep_ratio=1.0, selective_checkpointing=False)
DETACH = LemoConfig(mode="detach", keep_ratio=0.5)
ELIMINATE = LemoConfig(mode="eliminate", keep_ratio=0.5)


def with_lora(model: Any) -> Any:
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)).train()


def smollm2(seed: int = 0, dtype: torch.dtype = torch.float32, layers: int = 0) -> Any:
    """SmolLM2 with an adapter that the seed decides; `layers` keeps the first ones only, 0 all."""
    torch.manual_seed(seed)
    model = language.load(dtype=dtype)
    if layers:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    return with_lora(model)


def samples(split: str, seq_len: int) -> list[dict[str, list[int]]]:
    return pack(assets.texts(split), language.tokenizer(), seq_len)


@contextlib.contextmanager
def prepared(model: Any, lemo: LemoConfig | None, checkpointing: bool) -> Iterator[None]:
    """`model` as a method trains it; afterwards as it was."""
    kind = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    if checkpointing:
        getattr(model, f"{kind}_checkpointing_enable")({"use_reentrant": False})
    if lemo is not None:
        apply_lemo(model, lemo)
    try:
        yield
    finally:
        remove_lemo(model)
        if checkpointing:
            getattr(model, f"{kind}_checkpointing_disable")()


def loss_of(model: Any, tokens: Tensor) -> Tensor:
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss
