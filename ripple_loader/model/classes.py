"""The class of transformers that loads a model of texts, and the inputs that it computes logits for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ripple_loader.compat import loads


def model_class(config: Any) -> Any:
    """The automatic class that loads a model: for causal models, encoder-decoders, or images and text.

    Args:
        config: transformers' configuration of the model.

    Raises:
        ValueError: transformers has no such class for this type.
    """
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForSeq2SeqLM

    causal = (AutoModelForCausalLM, AutoModelForImageTextToText)
    classes = (AutoModelForSeq2SeqLM,) if is_encoder_decoder(config) else causal
    for one in classes:
        if loads(one, config):
            return one
    raise ValueError(
        "Ripple must be given a causal language model, an encoder-decoder of texts, or a model of images and "
        f"text, but transformers has none for a {config.model_type}."
    )


def is_encoder_decoder(config: Any) -> bool:
    """Whether a model has an encoder and a decoder, each with layers of its own."""
    return bool(getattr(config, "is_encoder_decoder", False))


def is_wrapper(config: Any) -> bool:
    """Whether a model wraps a language model, beside a part for images or sound."""
    return config.get_text_config() is not config and not is_encoder_decoder(config)


def skeleton(config: Any) -> nn.Module:
    """The model of a configuration, without memory for its weights.

    Raises:
        ValueError: transformers has no language model of this type.
    """
    with torch.device("meta"):
        return model_class(config).from_config(config)


def text_inputs(config: Any, ids: Tensor) -> dict[str, Tensor]:
    """A model's arguments for a text: an encoder-decoder has it on both sides.

    Args:
        config: of the model.
        ids: token ids, shape (batch, length).
    """
    return {"input_ids": ids} | ({"decoder_input_ids": ids} if is_encoder_decoder(config) else {})
