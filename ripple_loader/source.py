"""A model directory to reorder: its files, and where its MLP tensors lie in them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ripple_loader.architectures import Architecture, Role, architecture_of
from ripple_loader.checkpoint import Shard, TensorSpot, read_shards
from ripple_loader.encoding import DTYPES


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint to reorder: its files, and where its MLP tensors lie in them.

    Attributes:
        directory, shards: its files.
        model_type, architecture: what it is.
        experts: MLPs of a layer that has experts; None if the model is dense.
        mlp: for each streamed MLP, tensor name by (linear, "weight" or "bias"); experts layer by layer.
        spots: every tensor's place.
    """

    directory: Path
    shards: list[Shard]
    model_type: str
    architecture: Architecture
    experts: int | None
    mlp: list[dict[tuple[str, str], str]]
    spots: dict[str, TensorSpot]

    def part(self, layer: int, role: Role, kind: str) -> Tensor | None:
        """A projection's weight as (N, H) rows, or its bias; None where it has no bias."""
        projection = self.architecture.projections[role]
        name = self.mlp[layer].get((projection.linear, kind))
        if name is None:
            return None
        tensor = projection.of(self.spots[name].read())
        return tensor.T if tensor.dim() == 2 and projection.neuron_axis == 1 else tensor

    @functools.cached_property
    def exact_zeros(self) -> bool:
        """Whether the activation makes inactive neurons exactly zero; builds the model without weights."""
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(self.directory)
            skeleton = AutoModelForCausalLM.from_config(config)
        return self.architecture.find(skeleton)[0].has_exact_zeros

    @property
    def down(self) -> TensorSpot:
        """The first layer's output weight, whose shape and dtype all layers share."""
        return self.spots[self.mlp[0][self.architecture.down.linear, "weight"]]

    @property
    def layers(self) -> int:
        return len(self.mlp)

    @property
    def neurons(self) -> int:
        return self.down.shape[self.architecture.down.neuron_axis]

    @property
    def hidden(self) -> int:
        return self.down.shape[1 - self.architecture.down.neuron_axis]


def open_source(directory: Path) -> SourceModel:
    """Find a checkpoint's MLP tensors without loading it.

    Raises:
        FileNotFoundError: the directory or its checkpoint is missing.
        ValueError: unsupported architecture, quantized or damaged checkpoint, or MLP tensors missing.
    """
    if not (directory / "config.json").is_file():
        raise FileNotFoundError(
            f"{directory} should be a model directory with a config.json, but there is none: give the folder "
            "that `save_pretrained` or `snapshot_download` made."
        )
    config = AutoConfig.from_pretrained(directory)
    quantization = getattr(config, "quantization_config", None)
    if quantization is not None:
        method = dict(quantization).get("quant_method", "an unnamed method")
        raise ValueError(
            f"{directory} should hold plain float weights, but is quantized with {method}: "
            "reorder the checkpoint from before quantization."
        )
    architecture = architecture_of(config.model_type)
    shards = read_shards(directory)
    spots = {name: spot for shard in shards for name, spot in shard.tensors.items()}
    mlp, experts = _find_mlps(directory, architecture, config, list(spots))
    kinds = {
        tuple((key, spots[name].dtype, spots[name].shape) for key, name in sorted(m.items())) for m in mlp
    }
    if len(kinds) != 1:
        raise ValueError(
            f"all MLPs of {directory} should have the same shapes and dtypes, got {len(kinds)} different "
            "kinds: Ripple cannot stream this model."
        )
    source = SourceModel(directory, shards, config.model_type, architecture, experts, mlp, spots)
    if source.down.dtype not in DTYPES:
        raise ValueError(
            f"MLP weights should be float32, float16 or bfloat16, got {source.down.dtype} in {directory}: "
            "reorder the checkpoint from before quantization."
        )
    return source


def _find_mlps(
    directory: Path, architecture: Architecture, config: Any, names: list[str]
) -> tuple[list[dict[tuple[str, str], str]], int | None]:
    """The tensor names of each MLP to stream, and how many of them make a layer if they are experts."""
    pattern = architecture.tensor_pattern()
    found: dict[tuple[int, int], dict[tuple[str, str], str]] = {}
    for name in names:
        if match := pattern.match(name):
            layer, expert, linear, kind = match.groups()
            found.setdefault((int(layer), int(expert or 0)), {})[linear, kind] = name
    if architecture.expert is None:
        wanted = [(layer, 0) for layer in range(config.get_text_config().num_hidden_layers)]
        experts = None
    else:
        experts = 1 + max((expert for _, expert in found), default=0)
        layers = sorted({layer for layer, _ in found}) or [0]
        wanted = [(layer, expert) for layer in layers for expert in range(experts)]
    for place in wanted:
        for projection in architecture.projections.values():
            if (projection.linear, "weight") not in found.get(place, {}):
                spot = f"layer {place[0]}" + ("" if experts is None else f", expert {place[1]}")
                raise ValueError(
                    f"{directory} should hold the weight of {projection.linear} of {spot}, as a "
                    f"{config.model_type} does, but no tensor matches {pattern.pattern}: fetch it again."
                )
    return [found[place] for place in wanted], experts
