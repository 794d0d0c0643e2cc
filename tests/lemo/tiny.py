"""Tiny randomly initialised models and batches for LeMo's tests."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from lemo_trainer import LemoConfig
from lemo_trainer.model.architectures import ARCHITECTURES

VOCAB = 97
MODES = ("detach", "eliminate")
BATCHES = ("plain", "left", "right", "packed")
EVERY_MODE = ("auto", "exact", "segments", "detach", "eliminate")


def every_mode(keep_ratio: float = 1.0, *, segment_tokens: int = 16) -> dict[str, LemoConfig]:
    """A configuration of each mode; where all is kept, `segments` has one segment, which cuts no gradient."""
    blocks: dict[str, Any] = {"keep_ratio": keep_ratio, "block_size": 4, "layers": "all"}
    whole = {"segment_tokens": 64}
    some = {"segment_tokens": segment_tokens, "keep_ratio": keep_ratio}
    options: dict[str, dict[str, Any]] = {
        "auto": {"segment_tokens": segment_tokens},
        "exact": {"segment_tokens": segment_tokens},
        "segments": whole if keep_ratio == 1 else some,
        "detach": blocks,
        "eliminate": blocks,
    }
    return {mode: LemoConfig(mode=mode, loss_segment=16, **options[mode]) for mode in EVERY_MODE}


DROPOUTS = ("dropout", "attention_dropout", "hidden_dropout", "residual_dropout", "embedding_dropout")
DROPOUTS += ("attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout_prob", "activation_dropout")
SLIDING = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": 11}
ROPE = {"rope_type": "default", "rope_theta": 1e4}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
# What a model type has besides the common sizes; "post-norm opt" is a form of "opt".
OPTIONS: dict[str, dict[str, Any]] = {
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"logit_scale": 0.3, **SLIDING},
    "gemma2": {
        **SLIDING,
        "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 2.0,
        "final_logit_softcapping": 3.0,
    },
    "gemma3_text": {**SLIDING, "query_pre_attn_scalar": 8},
    "gpt_oss": {**SLIDING, **EXPERTS, "rope_parameters": ROPE},
    "granite": {"logits_scaling": 3.0, "residual_multiplier": 0.5, "attention_multiplier": 0.3},
    "ministral": SLIDING,
    "ministral3": {
        "rope_parameters": {**ROPE, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8}
    },
    "mistral": {"sliding_window": 11},
    "mixtral": EXPERTS,
    "olmo3": SLIDING,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 16},
    "phi": {"num_key_value_heads": 1},
    "post-norm opt": {"ffn_dim": 48, "do_layer_norm_before": False},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1]},
    "qwen3_moe": EXPERTS,
    "serial gpt_neox": {"use_parallel_residual": False},
}
KINDS = (*ARCHITECTURES, "post-norm opt", "serial gpt_neox")
# Every kind of model with one kind of batch, and three of them with every kind.
CASES = [(kind, "left") for kind in KINDS]
CASES += [(kind, name) for kind in ("llama", "gpt_neox", "gemma3_text") for name in BATCHES if name != "left"]
EAGER = ("gemma2", "gpt_oss")  # soft caps and sinks, which SDPA lacks


def tiny_model(
    kind: str = "llama", *, layers: int = 3, implementation: str | None = None, **options: Any
) -> Any:
    """A float32 causal LM in training mode, without dropout unless `options` of its config say so."""
    model_type = kind.split()[-1]
    implementation = implementation or ("eager" if model_type in EAGER else "sdpa")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "vocab_size": VOCAB,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.2,
    }
    own = {**dict.fromkeys(DROPOUTS, 0.0), **OPTIONS.get(kind, {}), **options}
    config = AutoConfig.for_model(model_type, **{**sizes, **own})
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()


def leaving_out(mode: Any = "detach", **options: Any) -> LemoConfig:
    """A config for the tiny models: blocks of four tokens, in all layers."""
    return LemoConfig(**{"mode": mode, "keep_ratio": 0.4, "block_size": 4, "layers": "all", **options})


def lora(model: Any, **options: Any) -> Any:
    """`model` with LoRA of rank 2, both factors random."""
    from peft import LoraConfig, get_peft_model

    options = {"target_modules": "all-linear", "init_lora_weights": False, **options}
    with warnings.catch_warnings():  # peft 0.21 still reads transformers' old name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=2, **options)).train()


def batch(kind: str, *, size: int = 2, seq_len: int = 45) -> dict[str, Any]:
    """Inputs and labels: "plain", "left" or "right" padding, or "packed" documents."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCAB, (size, seq_len), generator=generator)
    labels = ids.clone()
    labels[:, 10:13] = -100
    inputs: dict[str, Any] = {"input_ids": ids, "labels": labels}
    if kind == "packed":
        positions = torch.cat([torch.arange(17), torch.arange(seq_len - 17)])
        inputs["position_ids"] = positions.expand(size, -1).clone()
        inputs["use_cache"] = False  # as the Trainer has it; with a cache transformers sees no documents
    elif kind != "plain":
        mask = torch.ones_like(ids)
        for row in range(size):
            padding = 5 + 7 * row
            mask[row, :padding] = 0
        inputs["attention_mask"] = mask if kind == "left" else mask.flip(1)
        real = inputs["attention_mask"].bool()
        labels[~real | ~real.roll(1, 1)] = -100  # nor is a label predicted from padding
    return inputs


def loss_and_gradients(model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    named = model.named_parameters()
    return loss.detach(), {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same_step(
    got: tuple[Tensor, dict[str, Tensor]], wanted: tuple[Tensor, dict[str, Tensor]], **tolerance: float
) -> None:
    tolerance = tolerance or {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(got[0], wanted[0], **tolerance)
    torch.testing.assert_close(got[1], wanted[1], **tolerance)


def checkpointing(model: Any, *, reentrant: bool) -> None:
    """Switch gradient checkpointing on under whichever name the installed transformers has."""
    name = "activation_checkpointing_enable"
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})


def documented(title: str) -> dict[str, list[str]]:
    """The table of a section of docs/lemo_works_with.md: the cells of each row, one for each mode."""
    page = Path(__file__).parents[2] / "docs" / "lemo_works_with.md"
    section = page.read_text("utf-8").partition(f"## {title}\n")[2].partition("\n## ")[0]
    rows = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")]
    header, *rows = [[cell.strip() for cell in row] for row in rows]
    assert header[1:] == [f"`{mode}`" for mode in EVERY_MODE]
    assert all(len(row) == len(header) for row in rows)
    return {name: cells for name, *cells in rows}
