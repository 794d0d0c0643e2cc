"""A model directory to reorder: its files, and where its MLP tensors lie in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoConfig

from ripple_loader.architectures import Architecture, Role, architecture_of
from ripple_loader.checkpoint import Shard, TensorSpot, read_shards
from ripple_loader.sidecar import DTYPES


@dataclass(frozen=True)
class SourceModel:
    """A checkpoint to reorder: its files, and where its MLP tensors lie in them.

    Attributes:
        directory, shards: its files.
        model_type, architecture: what it is.
        mlp: for each layer, tensor name by (linear, "weight" or "bias").
        spots: every tensor's place.
    """

    directory: Path
    shards: list[Shard]
    model_type: str
    architecture: Architecture
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
    pattern = architecture.tensor_pattern()
    by_layer: dict[int, dict[tuple[str, str], str]] = {}
    for name in spots:
        if match := pattern.match(name):
            by_layer.setdefault(int(match[1]), {})[match[2], match[3]] = name
    for layer in range(config.num_hidden_layers):
        for projection in architecture.projections.values():
            if (projection.linear, "weight") not in by_layer.get(layer, {}):
                raise ValueError(
                    f"{directory} should hold the weight of {projection.linear} of layer {layer}, as a "
                    f"{config.model_type} does, but no tensor matches {pattern.pattern}: fetch it again."
                )
    mlp = [by_layer[layer] for layer in range(config.num_hidden_layers)]
    kinds = {
        tuple((key, spots[name].dtype, spots[name].shape) for key, name in sorted(m.items())) for m in mlp
    }
    if len(kinds) != 1:
        raise ValueError(
            f"all MLPs of {directory} should have the same shapes and dtypes, got {len(kinds)} different "
            "kinds: Ripple cannot stream this model."
        )
    source = SourceModel(directory, shards, config.model_type, architecture, mlp, spots)
    if source.down.dtype not in DTYPES:
        raise ValueError(
            f"MLP weights should be float32, float16 or bfloat16, got {source.down.dtype} in {directory}: "
            "reorder the checkpoint from before quantization."
        )
    return source
