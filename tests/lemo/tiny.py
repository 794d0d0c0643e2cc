"""Tiny randomly initialised models and batches for LeMo's tests."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 97


def tiny_model(model_type: str = "llama", *, layers: int = 3, implementation: str | None = None) -> Any:
    """A float32 causal LM in training mode, without dropout."""
    config = AutoConfig.for_model(
        model_type,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=VOCAB,
        max_position_embeddings=128,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        initializer_range=0.2,
    )
    for name in ("attention_dropout", "residual_dropout", "embedding_dropout", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, name):
            setattr(config, name, 0.0)
    if model_type == "granite":
        config.logits_scaling, config.residual_multiplier, config.attention_multiplier = 3.0, 0.5, 0.3
    if implementation is None:
        implementation = "eager" if model_type == "gemma2" else "sdpa"
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).train()


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
