"""A model directory to reorder: its files, and where its MLP tensors lie in them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoConfig

from ripple_loader.checkpoint.shards import DTYPES, Shard, TensorSpot, read_shards, weight_names
from ripple_loader.model.architectures import Architecture, Role
from ripple_loader.model.classes import model_class, skeleton
from ripple_loader.model.probe import architecture_of

_WAY_OUT = {
    "fp8": "`ripple reorder` and `ripple verify` dequantize it; for this save it dequantized, "
    "`from_pretrained(DIR, quantization_config=FineGrainedFP8Config(dequantize=True)).save_pretrained(NEW, "
    "save_original_format=False)`.",
    "mxfp4": "its models, gpt_oss, have experts with biases and a gate of their own kind, which Ripple "
    "cannot stream.",
    **dict.fromkeys(
        ("gptq", "awq", "compressed-tensors", "bitsandbytes"),
        "`ripple reorder` and `ripple verify` dequantize it; for this give the checkpoint that it was "
        "quantized from.",
    ),
}


_Number = tuple[int, int, int]  # the stack, the layer and the expert of an MLP


@dataclass(frozen=True)
class Piece:
    """One linear's weight or bias of one MLP: its location, the MLP's number, the linear."""

    spot: TensorSpot
    mlp: int
    linear: str


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint to reorder: its files, and where its MLP tensors lie in them.

    Attributes:
        directory, shards: its files.
        config, architecture: transformers' configuration of it, and the form that its files have.
        experts: MLPs of a layer that has experts; None if the model is dense.
        mlp: for each streamed MLP, the location of its weights by (linear, "weight" or "bias"); experts are
            in order of their layers.
        pieces: for each tensor with MLP weights, its parts from front to back: one linear of one MLP, or of
            each expert of a layer.
        spots: the location of every tensor.
        variant: of the weight files, as `from_pretrained` takes it.
    """

    directory: Path
    shards: list[Shard]
    config: Any
    architecture: Architecture
    experts: int | None
    mlp: list[dict[tuple[str, str], TensorSpot]]
    pieces: dict[str, list[Piece]]
    spots: dict[str, TensorSpot]
    variant: str | None = None

    def part(self, layer: int, role: Role, kind: str) -> Tensor | None:
        """A projection's weight as (N, H) rows, or its bias; None where it has no bias."""
        projection = self.architecture.projections[role]
        spot = self.mlp[layer].get((projection.linear, kind))
        if spot is None:
            return None
        tensor = projection.of(spot.read())
        return tensor.T if tensor.dim() == 2 and projection.neuron_axis == 1 else tensor

    @property
    def model_type(self) -> str:
        return self.config.model_type

    @property
    def loader(self) -> Any:
        """The automatic class of transformers that loads it."""
        return model_class(self.config)

    @functools.cached_property
    def exact_zeros(self) -> bool:
        """Whether the activation makes inactive neurons exactly zero; builds the model without weights."""
        model = skeleton(self.config)
        return all(site.has_exact_zeros for site in self.architecture.find(model))

    @property
    def down(self) -> TensorSpot:
        """The first layer's output weight, whose shape and dtype all layers share."""
        return self.mlp[0][self.architecture.down.linear, "weight"]

    @property
    def layers(self) -> int:
        return len(self.mlp)

    @property
    def neurons(self) -> int:
        return self.down.shape[self.architecture.down.neuron_axis]

    @property
    def hidden(self) -> int:
        return self.down.shape[1 - self.architecture.down.neuron_axis]


def open_source(directory: Path, variant: str | None = None) -> SourceModel:
    """Find a checkpoint's MLP tensors without loading it.

    Args:
        directory: of the model.
        variant: of its weight files, such as "fp16".

    Raises:
        FileNotFoundError: the directory or its checkpoint is missing.
        ValueError: unsupported architecture, quantized or damaged checkpoint, or MLP tensors missing.
    """
    weights = any((directory / name).exists() for name in weight_names(variant))
    if directory.suffix == ".gguf" or (not weights and any(directory.glob("*.gguf"))):
        raise ValueError(
            f"{directory} must hold safetensors or `pytorch_model.bin`, but holds a GGUF file: "
            "`ripple reorder` and `ripple verify` dequantize it; for this load it with transformers, "
            "`from_pretrained(FOLDER, gguf_file=NAME)`, and take what `save_pretrained` writes."
        )
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} must be a model directory, but has no config.json: give the folder "
            "that `save_pretrained` or `snapshot_download` wrote."
        )
    if (directory / "adapter_config.json").is_file():
        raise ValueError(
            f"{directory} must hold a model without an adapter, which `from_pretrained` would load with it: "
            "merge the adapter, or move adapter_config.json and its weights to a directory of their own."
        )
    config = read_config(directory)
    quantization = getattr(config, "quantization_config", None)
    method = dict(quantization or {}).get("quant_method", "an unnamed method")
    if quantization is not None and method != "ripple":  # that is no quantization, see `RippleConfig`
        raise ValueError(
            f"{directory} must hold plain float weights, but is quantized with {method}: "
            + _WAY_OUT.get(method, "reorder the checkpoint that it was quantized from.")
        )
    forms = architecture_of(config).forms()
    shards = read_shards(directory, variant)
    spots = {name: spot for shard in shards for name, spot in shard.tensors.items()}
    architecture = next((form for form in forms if any(map(form.tensor_pattern().match, spots))), forms[0])
    mlp, pieces, experts = _find_mlps(directory, architecture, config, spots)
    kinds = {tuple((key, spot.dtype, spot.shape) for key, spot in sorted(m.items())) for m in mlp}
    if len(kinds) != 1:
        raise ValueError(
            f"all MLPs of {directory} must have the same shapes and dtypes, got {len(kinds)} different "
            "kinds: Ripple cannot stream this model."
        )
    source = SourceModel(directory, shards, config, architecture, experts, mlp, pieces, spots, variant)
    if source.down.dtype not in DTYPES:
        raise ValueError(
            f"MLP weights must be float32, float16 or bfloat16, got {source.down.dtype} in {directory}: "
            "reorder the checkpoint from before quantization."
        )
    _check_shapes(source)
    return source


def read_config(directory: Path) -> Any:
    """A model's config; ValueError where the model is not one of transformers' own."""
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=False)  # None asks at a terminal
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"{directory} must be a model of transformers' own, but runs code from its directory (`auto_map` "
            "in config.json), which Ripple does not: convert it to a class of transformers."
        ) from None


def load_tokenizer(directory: Path) -> Any:
    """A directory's tokenizer.

    Raises:
        ValueError: it cannot be loaded.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except (ValueError, OSError, ImportError, TypeError, AttributeError) as error:
        kind = type(error).__name__
        raise ValueError(
            f"{directory} must hold a tokenizer to read texts with, but none could be loaded ({kind}): "
            "copy the tokenizer's files there, or give token ids instead of texts."
        ) from None


def _check_shapes(source: SourceModel) -> None:
    """Refuse projections of other shapes than the MLP's neurons and hidden size, such as transposed ones."""
    for projection in source.architecture.projections.values():
        wanted = [source.hidden, source.hidden]
        wanted[projection.neuron_axis] = source.neurons * (1 if projection.half is None else 2)
        got = source.mlp[0][projection.linear, "weight"].shape
        if got != tuple(wanted):
            raise ValueError(
                f"the weight of {projection.linear} in {source.directory} must be {tuple(wanted)}, as "
                f"{source.architecture.down.linear} has it, got {got}: Ripple does not know this form of a "
                f"{source.model_type}."
            )


def _find_mlps(
    directory: Path, architecture: Architecture, config: Any, spots: dict[str, TensorSpot]
) -> tuple[list[dict[tuple[str, str], TensorSpot]], dict[str, list[Piece]], int | None]:
    """The weights of each MLP to stream, the tensors they lie in, and how many experts a layer has."""
    pattern = architecture.tensor_pattern()
    weights: dict[_Number, dict[tuple[str, str], TensorSpot]] = {}
    holders: dict[str, list[tuple[_Number, str, TensorSpot]]] = {}
    for name, spot in spots.items():
        if match := pattern.match(name):
            prefix, layer, first, linear, kind = match.groups()
            stack = architecture.stack_of(prefix)
            for expert, part in enumerate(spot.slices() if architecture.stacked else [spot], int(first or 0)):
                mlp, key = (stack, int(layer), expert), (linear, kind or "weight")
                if key in weights.setdefault(mlp, {}):
                    raise ValueError(
                        f"{directory} must hold one {key[1]} of {linear} of layer {layer}, but {name} is a "
                        "second one: Ripple cannot stream this model."
                    )
                weights[mlp][key] = part
                holders.setdefault(name, []).append((mlp, linear, part))
    if architecture.expert is None:
        wanted, experts = _dense_mlps(architecture, config), None
    else:
        experts = 1 + max((expert for _, _, expert in weights), default=0)
        layers = sorted({(stack, layer) for stack, layer, _ in weights}) or [(0, 0)]
        wanted = [(*layer, expert) for layer in layers for expert in range(experts)]
    for mlp in wanted:
        for projection in architecture.projections.values():
            if (projection.linear, "weight") not in weights.get(mlp, {}):
                side = architecture.stacks[mlp[0]]
                where = f"layer {mlp[1]}" + (f" of the {side}" if side else "")
                where += "" if experts is None else f", expert {mlp[2]}"
                raise ValueError(
                    f"{directory} must hold the weight of {projection.linear} of {where}, as a "
                    f"{config.model_type} does, but no tensor matches {pattern.pattern}: fetch it again."
                )
    numbers = {mlp: number for number, mlp in enumerate(wanted)}
    pieces = {
        name: [Piece(part, numbers[mlp], linear) for mlp, linear, part in held]
        for name, held in holders.items()
        if held[0][0] in numbers
    }
    return [weights[mlp] for mlp in wanted], pieces, experts


def _dense_mlps(architecture: Architecture, config: Any) -> list[_Number]:
    """The MLPs of a model without experts, in the order in which they run."""
    if len(architecture.stacks) == 1:
        return [(0, layer, 0) for layer in range(config.get_text_config().num_hidden_layers)]
    return [(site.stack, site.layer, 0) for site in architecture.find(skeleton(config))]
