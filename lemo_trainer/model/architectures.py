"""The wiring of known decoder layers, and the parts of a causal LM.

Every supported layer adds the branches of its attention and of its MLP to the residual stream,

    y = x + scale * after_attention(attention(before_attention(x)))
    z = y + scale * after_mlp(mlp(before_mlp(y)))

A parallel layer reads x in both branches (z = y + ... before_mlp(x)), and a post-norm layer has its norms
after the sums instead of in front of the branches. The attention calls transformers' `AttentionInterface`.
Apart from that, layers differ in the names of their parts, and in attributes that say which of these forms
they have.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lemo_trainer.compat import attention_implementation, unwrap
from lemo_trainer.kernels.rows import gather

ATTENTION_IMPLEMENTATIONS = ("eager", "sdpa", "flex_attention")


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Attribute names of a decoder layer; None where the step does not exist.

    Args:
        attention: the attention module.
        output: the attention's last projection, which takes the concatenated heads; None if more than a
            projection follows the heads (a gate, a norm).
        mlp: the modules of the MLP, in the order of their calls.
        down_proj: path of the MLP's last projection, whose input is the intermediate activation. If it is
            None, or the MLP is a mixture of experts, the MLP works on all tokens.
        before_attention: norm in front of the attention.
        after_attention: norm or dropout after the attention, inside the residual branch.
        before_mlp: norm in front of the MLP.
        after_mlp: norm or dropout after the MLP, inside the residual branch.
        residual_scale: factor on both residual branches.
        parallel: whether attention and MLP both read the layer's input, or the name of the layer's attribute
            that tells.
        norm_first: False if `before_attention` and `before_mlp` come after the sums (post-norm); or the name
            of the layer's attribute that tells.
    """

    attention: str = "self_attn"
    output: str | None = "o_proj"
    mlp: tuple[str, ...] = ("mlp",)
    down_proj: str | None = "mlp.down_proj"
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None
    residual_scale: str | None = None
    parallel: bool | str = False
    norm_first: bool | str = True

    def missing_from(self, layer: nn.Module) -> list[str]:
        """The parts that `layer` must have and lacks."""
        paths = [self.attention, *self.mlp, self.before_attention, self.after_attention, self.before_mlp]
        paths += [self.after_mlp, self.residual_scale, self.output and f"{self.attention}.{self.output}"]
        paths += [name for name in (self.parallel, self.norm_first) if isinstance(name, str)]
        if not self.has_dense_mlp(layer):
            paths.append(self.down_proj)
        return [path for path in paths if path and not _has(layer, path)]

    def has_dense_mlp(self, layer: nn.Module) -> bool:
        """Whether the MLP works on all tokens of this layer, as a mixture of experts does."""
        return self.down_proj is None or _has(layer, f"{self.mlp[0]}.experts")

    def attention_of(self, layer: nn.Module) -> Any:
        return getattr(layer, self.attention)

    def is_parallel(self, layer: nn.Module) -> bool:
        return _switch(layer, self.parallel)

    def attention_input(self, layer: nn.Module, x: Tensor, rows: Tensor | None = None) -> Tensor:
        norm = self.before_attention if _switch(layer, self.norm_first) else None
        return _apply(layer, norm, x, rows)

    def attention_branch(
        self, layer: nn.Module, x: Tensor, rows: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """The attention's update of the residual stream for rows `x` [B, S, D].

        With flat row numbers `rows`, `x` is the whole stream, from which these rows are read.
        """
        x, rows = self._source(layer, x, rows)
        output = self.attention_of(layer)(self.attention_input(layer, x, rows), **kwargs)[0]
        return self._added(layer, x, output, self.after_attention, self.before_attention)

    def finish_attention(self, layer: nn.Module, x: Tensor, heads_BSHd: Tensor) -> Tensor:
        """The attention's update for rows `x` [B, S, D], given the outputs [B, S, H, d] of its heads."""
        assert self.output is not None
        output = getattr(self.attention_of(layer), self.output)(heads_BSHd.flatten(2))
        return self._added(layer, x, output, self.after_attention, self.before_attention)

    def mlp_input(self, layer: nn.Module, x: Tensor, rows: Tensor | None = None) -> Tensor:
        return _apply(layer, self.before_mlp if _switch(layer, self.norm_first) else None, x, rows)

    def mlp_branch(self, layer: nn.Module, x: Tensor, rows: Tensor | None = None) -> Tensor:
        """The MLP's update of the residual stream for rows `x` [B, S, D]; `rows` as for the attention."""
        x, rows = self._source(layer, x, rows)
        output = self.run_mlp(layer, self.mlp_input(layer, x, rows))
        return self._added(layer, x, output, self.after_mlp, self.before_mlp)

    def run_mlp(self, layer: nn.Module, x: Tensor) -> Tensor:
        """The output of the MLP alone, without norms and residual."""
        shape = x.shape
        for name in self.mlp:
            x = getattr(layer, name)(x)
        output: Tensor = x[0] if isinstance(x, tuple) else x
        return output.view(shape)  # some mixtures of experts return flat rows, and their scores with them

    def _source(self, layer: nn.Module, x: Tensor, rows: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The rows themselves for a post-norm layer, which needs them again in the sum; else unchanged."""
        if rows is None or _switch(layer, self.norm_first):
            return x, rows
        return gather(x, rows), None

    def _added(
        self, layer: nn.Module, x: Tensor, output: Tensor, after: str | None, norm: str | None
    ) -> Tensor:
        output = _apply(layer, after, output)
        if self.residual_scale is not None:
            output = output * getattr(layer, self.residual_scale)
        return output if _switch(layer, self.norm_first) else _apply(layer, norm, x + output) - x


def _has(layer: nn.Module, path: str) -> bool:
    try:
        attrgetter(path)(layer)
    except AttributeError:
        return False
    return True


def _switch(layer: nn.Module, value: bool | str) -> bool:
    return bool(getattr(layer, value)) if isinstance(value, str) else value


def _apply(layer: Any, name: str | None, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """`x` through a module of the layer, or through a dropout whose probability is the layer's attribute.

    A norm that the kernels repeat (`norms`) reads its rows straight from the stream.
    """
    norm = getattr(layer, "_lemo_norms", {}).get(name)
    if norm is not None and norm.fits(x):
        return norm(x, rows)
    x = x if rows is None else gather(x, rows)
    if name is None:
        return x
    step = getattr(layer, name)
    return F.dropout(x, step, layer.training) if isinstance(step, int | float) else step(x)


_PRE_NORM = Architecture()
_POST_BRANCH_NORM = Architecture(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
_FOUR_NORMS = Architecture(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
_PARALLEL = Architecture(before_mlp="input_layernorm", parallel=True)

ARCHITECTURES: dict[str, Architecture] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "ministral3", "qwen2", "qwen3", "gemma"), _PRE_NORM),
    **dict.fromkeys(("smollm3", "olmo", "glm", "seed_oss", "helium", "ernie4_5", "arcee"), _PRE_NORM),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"), _PRE_NORM),
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), _POST_BRANCH_NORM),
    **dict.fromkeys(("gemma2", "gemma3_text"), _FOUR_NORMS),
    **dict.fromkeys(("cohere", "cohere2"), _PARALLEL),
    "starcoder2": Architecture(down_proj="mlp.c_proj"),
    "phi3": Architecture(after_attention="resid_attn_dropout", after_mlp="resid_mlp_dropout"),
    "granite": Architecture(residual_scale="residual_multiplier"),
    "phi": Architecture(
        output="dense",
        down_proj="mlp.fc2",
        before_mlp="input_layernorm",
        after_attention="resid_dropout",
        after_mlp="resid_dropout",
        parallel=True,
    ),
    "gpt_neox": Architecture(
        attention="attention",
        output="dense",
        down_proj="mlp.dense_4h_to_h",
        after_attention="post_attention_dropout",
        after_mlp="post_mlp_dropout",
        parallel="use_parallel_residual",
    ),
    "gpt2": Architecture(
        attention="attn",
        output="c_proj",
        down_proj="mlp.c_proj",
        before_attention="ln_1",
        before_mlp="ln_2",
    ),
    "opt": Architecture(
        output="out_proj",
        mlp=("fc1", "activation_fn", "fc2"),
        down_proj="fc2",
        before_attention="self_attn_layer_norm",
        after_attention="dropout",
        before_mlp="final_layer_norm",
        after_mlp="dropout",
        norm_first="do_layer_norm_before",
    ),
}

# Models on which a probe would be wrong: they differ only at sequences longer than it tries.
REFUSED = {"llama4_text": "its attention scales rows by positions that it counts itself"}


NOT_CAUSAL = (
    "LeMo needs a causal decoder, got {name}, in which tokens attend to later ones (an encoder): train it "
    "without LeMo."
)


@dataclass(frozen=True)
class CausalLM:
    """The parts of a causal language model that LeMo works on.

    Args:
        model: the whole model.
        layers: its decoder layers.

    Attributes:
        decoder: the part that calls the layers.
    """

    model: Any
    layers: nn.ModuleList
    decoder: Any = field(init=False)
    _as_found: tuple[nn.Module, ...] = field(init=False)

    def __post_init__(self) -> None:
        decoder = next(part for part in self.model.modules() if self.layers in part.children())
        vars(self).update(decoder=decoder, _as_found=tuple(self.layers))

    @property
    def head(self) -> Any:
        """Its language-model head as it is now; None for a model with another head, or with none."""
        return self.model.get_output_embeddings()

    @property
    def has_head(self) -> bool:
        """Whether it has a language-model head."""
        return self.head is not None

    def has_same_layers(self) -> bool:
        """Whether the decoder still has the layers that were found, in their order."""
        lists = [part for part in self.decoder.children() if isinstance(part, nn.ModuleList)]
        return any(tuple(part) == self._as_found for part in lists)


def find_causal_lm(model: nn.Module, *, head: bool = True) -> CausalLM:
    """Find the parts of `model`, plain or wrapped.

    Args:
        head: whether it must have a language-model head; else any other head will do, and none.

    Raises:
        ValueError: the model is not a text-only causal LM of transformers, or its attention implementation is
            not supported.
    """
    model = unwrap(model)
    config: Any = getattr(model, "config", None)
    name = f"{type(model).__name__} with config.model_type {getattr(config, 'model_type', None)!r}"
    transformer = hasattr(model, "get_output_embeddings") and hasattr(config, "num_hidden_layers")
    if config is not None and hasattr(config, "get_text_config") and config.get_text_config() is not config:
        raise ValueError(
            f"LeMo needs a causal decoder of text alone, got {name}, which reads more than text: train "
            "it without LeMo, or load its language model alone with AutoModelForCausalLM."
        )
    if getattr(config, "is_encoder_decoder", False) or getattr(config, "add_cross_attention", False):
        raise ValueError(
            f"LeMo needs a causal decoder of text alone, got {name}, an encoder-decoder: train it without "
            "LeMo (gradient checkpointing works), or use a decoder-only model."
        )
    if not transformer or (head and model.get_output_embeddings() is None):
        raise ValueError(f"LeMo needs a causal LM of transformers with an output head, got {name}.")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(NOT_CAUSAL.format(name=name))
    lists = [part for part in model.modules() if isinstance(part, nn.ModuleList)]
    layers = next((part for part in lists if len(part) == config.num_hidden_layers), None)
    if layers is None:
        lengths = ", ".join(str(len(part)) for part in lists) or "none"
        raise ValueError(
            f"LeMo looked in {name} for a list of {config.num_hidden_layers} decoder layers and found lists "
            f"of these lengths: {lengths}."
        )
    parts = CausalLM(model, layers)
    if head:
        check_attention(parts, "detach")
    return parts


def first_depths(layers: nn.ModuleList) -> dict[nn.Module, int]:
    """Each distinct layer with the first index at which it stands; a model may use one at several depths."""
    depths: dict[nn.Module, int] = {}
    for index, layer in enumerate(layers):
        depths.setdefault(layer, index)
    return depths


def check_attention(parts: CausalLM, mode: str) -> None:
    """Raise ValueError for an attention implementation that `mode` cannot serve."""
    implementation = attention_implementation(parts.model.config)
    if implementation in ATTENTION_IMPLEMENTATIONS or mode == "segments":
        return  # segments call the model as it is, with a cache
    why = "does not run a segment at a time" if mode == "exact" else "takes no mask of chosen tokens"
    raise ValueError(
        f'mode="{mode}" works with attn_implementation {", ".join(ATTENTION_IMPLEMENTATIONS)}, got '
        f"{implementation!r}, which {why}; load the model with attn_implementation='sdpa'."
    )
