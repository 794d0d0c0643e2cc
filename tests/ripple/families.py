"""Tiny random models of transformers' causal language models, whatever their family."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.ripple.conftest import COMMON, GROUPED, token_ids

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 6_000_000  # parameters of a model that is still tiny
HEADS = {"head_dim": 8}
FULL = {"layer_types": ["full_attention"] * 2}
SIZES: list[dict[str, Any]] = [
    COMMON | GROUPED | HEADS,
    COMMON | GROUPED,
    COMMON,
    COMMON | {"num_layers": 2, "d_model": 32, "num_heads": 4},
    COMMON | GROUPED | HEADS | FULL,
    COMMON | HEADS | FULL,
    COMMON | {"rotary_dim": 8, "n_inner": 96},
]


def tiny_model(model_type: str) -> PreTrainedModel | None:
    """A random model of a family with two layers that computes finite logits; None if no sizes give one."""
    for sizes in SIZES:
        try:
            model = _model(AutoConfig.for_model(model_type, **sizes))
            if model is not None and logits(model).isfinite().all():
                return model
        except Exception:  # transformers refuses the sizes in many ways
            continue
    return None


def _model(config: Any) -> PreTrainedModel | None:
    with torch.device("meta"):
        sizes = [parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters()]
    if sum(sizes) > LARGEST:
        return None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2 or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=1.0 if "embed" in name else 0.2)
    return model.eval()


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    with warnings.catch_warnings(action="ignore"):
        return model(input_ids=token_ids(12)).logits
