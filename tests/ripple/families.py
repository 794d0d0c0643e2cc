"""Tiny random models of transformers' causal language models, whatever their family."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.ripple.conftest import COMMON, GROUPED, VISION, token_ids

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
LARGEST = 6_000_000  # parameters of a model that is still tiny
HEADS = {"head_dim": 8}
FULL = {"layer_types": ["full_attention"] * 2}
TEXT = COMMON | GROUPED | HEADS
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k")
WIDTHS = (
    "moe_intermediate_size",
    "expert_ffn_hidden_size",
    "ffn_hidden_size",
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
)
SINGLE = ("n_shared_experts", "num_shared_experts", "n_group", "topk_group", "first_k_dense_replace")
ROUTED = (
    dict.fromkeys(COUNTS, 4) | dict.fromkeys(CHOSEN, 2) | dict.fromkeys(WIDTHS, 32) | dict.fromkeys(SINGLE, 1)
)
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
PER_LAYER = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 0, "vocab_size_per_layer_input": 120}
OF_BOTH = {
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers", "num_encoder_layers", "num_decoder_layers"), 2),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 96),
}
VOCABULARY = {
    key: value for key, value in COMMON.items() if not key.startswith(("num_", "hidden_", "intermediate_"))
}
SIZES: list[dict[str, Any]] = [
    COMMON | GROUPED | HEADS,
    COMMON | GROUPED,
    COMMON,
    COMMON | {"num_layers": 2, "d_model": 32, "num_heads": 4},
    COMMON | GROUPED | HEADS | FULL,
    COMMON | HEADS | FULL,
    COMMON | {"rotary_dim": 8, "n_inner": 96},
    TEXT | ROUTED | LATENT,
    COMMON | ROUTED | LATENT | {"head_dim": 16, "num_key_value_heads": 4},
    TEXT | ROUTED | LINEAR | FULL,
    VOCABULARY | OF_BOTH,
    TEXT | {"num_heads": 8, "state_size": 8, "n_groups": 1},
    {"text_config": TEXT, "vision_config": VISION, "vocab_size": 120},
    {"text_config": TEXT | FULL, "vision_config": VISION, "vocab_size": 120},
    {"text_config": TEXT | ROUTED | LINEAR | FULL, "vision_config": VISION},
    COMMON | {"attention_types": [[["global"], 2]]},
    COMMON
    | {
        "is_decoder": True,
        "attn_layers": ["local", "local"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [16, 16],
        "attention_head_size": 8,
        "feed_forward_size": 96,
    },
    {"n_layer": 2, "d_model": 32, "n_head": 4, "d_inner": 96, "vocab_size": 120, "d_head": 8},
    TEXT | PER_LAYER | FULL,
    {"text_config": TEXT | PER_LAYER | FULL, "vision_config": VISION},
]


def tiny_model(model_type: str) -> PreTrainedModel | None:
    """A random model of a family with two layers that computes finite logits; None if no sizes give one."""
    for sizes in SIZES:
        try:
            model = _model(AutoConfig.for_model(model_type, **copy.deepcopy(sizes)))
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
        return model(input_ids=token_ids(12), use_cache=False).logits
