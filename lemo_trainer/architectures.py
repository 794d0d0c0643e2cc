"""How the supported decoder layers are wired, and where a causal LM keeps its parts.

Every supported layer computes, with its own names for the parts,

    x = x + scale * after_attention(attention(before_attention(x)))
    x = x + scale * after_mlp(mlp(before_mlp(x)))

and calls its attention through transformers' `AttentionInterface`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Attribute names of a decoder layer; None where the step does not exist.

    Args:
        before_attention: norm in front of the attention.
        after_attention: norm or dropout behind it, inside the residual branch.
        before_mlp: norm in front of the MLP.
        after_mlp: norm or dropout behind it, inside the residual branch.
        down_proj: last projection of the MLP; its input is the intermediate activation.
        residual_scale: factor on both residual branches.
    """

    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    down_proj: str = "down_proj"
    residual_scale: str | None = None

    def missing_from(self, layer: nn.Module) -> list[str]:
        """The parts that `layer` should have and has not."""
        names = ["self_attn", "mlp", self.before_attention, self.after_attention, self.before_mlp]
        names += [self.after_mlp, self.residual_scale]
        missing = [name for name in names if name and not hasattr(layer, name)]
        if not missing and not hasattr(layer.mlp, self.down_proj):
            missing.append(f"mlp.{self.down_proj}")
        return missing

    def attention_input(self, layer: nn.Module, x: Tensor) -> Tensor:
        return _apply(layer, self.before_attention, x)

    def mlp_input(self, layer: nn.Module, x: Tensor) -> Tensor:
        return _apply(layer, self.before_mlp, x)

    def attention_branch(self, layer: Any, x: Tensor, **kwargs: Any) -> Tensor:
        """What the attention adds to the residual stream for rows `x` [B, S, D]."""
        output = layer.self_attn(hidden_states=self.attention_input(layer, x), **kwargs)[0]
        return self._scaled(layer, _apply(layer, self.after_attention, output))

    def finish_attention(self, layer: Any, heads_BSHd: Tensor) -> Tensor:
        """What the attention adds for its heads' outputs [B, S, H, d]."""
        output = layer.self_attn.o_proj(heads_BSHd.flatten(2))
        return self._scaled(layer, _apply(layer, self.after_attention, output))

    def mlp_branch(self, layer: Any, x: Tensor) -> Tensor:
        """What the MLP adds to the residual stream for rows `x` [B, S, D]."""
        return self._scaled(layer, _apply(layer, self.after_mlp, layer.mlp(self.mlp_input(layer, x))))

    def _scaled(self, layer: nn.Module, x: Tensor) -> Tensor:
        return x if self.residual_scale is None else x * getattr(layer, self.residual_scale)


def _apply(layer: nn.Module, name: str | None, x: Tensor) -> Tensor:
    return x if name is None else getattr(layer, name)(x)


_PRE_NORM = Architecture()
ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo", "gemma"), _PRE_NORM),
    "starcoder2": Architecture(down_proj="c_proj"),
    "phi3": Architecture(after_attention="resid_attn_dropout", after_mlp="resid_mlp_dropout"),
    "granite": Architecture(residual_scale="residual_multiplier"),
    "olmo2": Architecture(
        before_attention=None,
        after_attention="post_attention_layernorm",
        before_mlp=None,
        after_mlp="post_feedforward_layernorm",
    ),
    "gemma2": Architecture(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
    ),
}


@dataclass(frozen=True)
class CausalLM:
    """The parts of a causal language model that LeMo works on."""

    model: Any
    decoder: Any
    head: nn.Module
    layers: nn.ModuleList
    architecture: Architecture


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


def find_causal_lm(model: nn.Module) -> CausalLM:
    """Find the parts of `model`, plain or wrapped.

    Raises:
        ValueError: the architecture or the attention implementation is not supported, or a part is missing.
    """
    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    model_type = getattr(config, "model_type", None)
    if model_type not in ARCHITECTURES:
        raise ValueError(
            f"LeMo supports the architectures {', '.join(sorted(ARCHITECTURES))}; "
            f"got {type(model).__name__} with config.model_type {model_type!r}."
        )
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    if head is None or not isinstance(getattr(decoder, "layers", None), nn.ModuleList):
        raise ValueError(
            f"LeMo needs a causal LM with an output head and a list `layers` in its decoder; "
            f"{type(model).__name__} has not both."
        )
    architecture = ARCHITECTURES[model_type]
    if missing := architecture.missing_from(decoder.layers[0]):
        raise ValueError(
            f"LeMo looked for {', '.join(missing)} in {type(decoder.layers[0]).__name__} and found none; "
            f"this version of transformers wires {model_type} differently."
        )
    implementation = config._attn_implementation
    if implementation not in ATTENTION_IMPLEMENTATIONS:
        raise ValueError(
            f"LeMo works with attn_implementation {' or '.join(ATTENTION_IMPLEMENTATIONS)}, got "
            f"{implementation!r}; load the model with attn_implementation='sdpa'."
        )
    return CausalLM(model, decoder, head, decoder.layers, architecture)
