"""The stock model as a reference: its own modules, with the weights of one MLP in memory at a time.

The table of architectures says which weights are read when. Everything that it could have wrong, such as the
activation or a norm inside the MLP, is the stock model's own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ripple_loader.checkpoint.source import SourceModel
from ripple_loader.compat import (
    LoadingHooks,
    QuantizationConfigMixin,
    expect_missing,
    register_quantization_config,
    register_quantizer,
)
from ripple_loader.format.bundles import unpack_bundles
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.architectures import Architecture, MLPSite, Role

Part = Callable[[int, Role, str], Tensor | None]
"""A projection's weight as (N, H) rows or its bias, of an MLP by number, as `SourceModel.part` returns it."""


@dataclass
class _Weights:
    """Reads the parameters of an MLP's modules."""

    architecture: Architecture
    part: Part
    experts: int | None = None

    def __deepcopy__(self, memo: Any) -> _Weights:
        return self  # transformers copies the config that holds it

    def linear(self, mlp: int, name: str, kind: str) -> Tensor | None:
        """The weight or bias of a linear, as its module has it."""
        held = [
            (role, self.architecture.projections[role])
            for role in self.architecture.bundle
            if self.architecture.projections[role].linear == name
        ]
        parts = [self.part(mlp, role, kind) for role, _ in held]
        tensors = [part for part in parts if part is not None]
        if not tensors:
            return None
        axis = held[0][1].neuron_axis
        if kind == "weight" and axis:
            return torch.cat([tensor.T for tensor in tensors], dim=axis)
        return torch.cat(tensors)

    def stacked(self, layer: int, name: str) -> Tensor:
        """One of transformers' stacked parameters of a layer's experts."""
        assert self.experts is not None
        roles: tuple[Role, ...] = ("down",) if name == "down_proj" else ("selector", "up")
        experts = range(layer * self.experts, (layer + 1) * self.experts)
        parts = [[self.part(expert, role, "weight") for role in roles] for expert in experts]
        whole = [torch.cat([part for part in one if part is not None]) for one in parts]
        return torch.stack([one.T for one in whole] if name == "down_proj" else whole)


@register_quantization_config("ripple_reference")
@dataclass(kw_only=True)
class _ReferenceConfig(QuantizationConfigMixin):
    """Loads a stock model whose MLPs read their weights when they run."""

    weights: _Weights
    quant_method: str = "ripple_reference"


@register_quantizer("ripple_reference")
class _ReferenceQuantizer(LoadingHooks):
    def before_weights(self, model: Any, files: list[Path]) -> None:
        weights = self.quantization_config.weights
        for number, site in enumerate(weights.architecture.find(model)):
            _read_when_run(site, number, weights)
        expect_missing(model, weights.architecture.streamed_names())

    def after_weights(self, model: Any) -> None:
        pass


def _read_when_run(site: MLPSite, number: int, weights: _Weights) -> None:
    """Take the parameters from the linears of an MLP, and have them read whenever one of these runs."""
    if site.experts is not None:
        names = ("gate_up_proj", "down_proj")
        _hook(site.container, {name: _reader(weights.stacked, number, name) for name in names})
        return
    for linear, (projection, *_) in site.linears():
        kinds = [kind for kind, parameter in linear.named_parameters(recurse=False)]
        _hook(
            linear,
            {kind: _reader(weights.linear, number, projection.linear, kind) for kind in kinds},
        )


def _reader(read: Callable[..., Tensor | None], *arguments: Any) -> Callable[[], Tensor | None]:
    return lambda: read(*arguments)


def _hook(module: nn.Module, readers: dict[str, Callable[[], Tensor | None]]) -> None:
    shapes = {name: tuple(getattr(module, name).shape) for name in readers}
    module._is_hf_initialized = True  # transformers would initialise its parameters

    def forget(*_: Any) -> None:
        for name in readers:
            setattr(module, name, torch.empty(0))  # which initialisation finds and leaves as it is

    def read(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        for name, reader in readers.items():
            tensor = reader()
            if tensor is None or tuple(tensor.shape) != shapes[name]:
                got = "nothing" if tensor is None else tuple(tensor.shape)
                raise ValueError(
                    f"{name} of {type(module).__name__} must be {shapes[name]}, but the checkpoint has {got}."
                )
            setattr(module, name, tensor.to(inputs[0]))

    for name in readers:
        delattr(module, name)
    forget()
    module.register_forward_pre_hook(read)
    module.register_forward_hook(forget, always_call=True)


def load_reference(source: SourceModel, part: Part | None = None, dtype: Any = "auto") -> Any:
    """The stock model of a checkpoint; memory is that of the model without its MLPs, and of one layer's.

    Args:
        source: the checkpoint.
        part: the MLPs' weights, by default the checkpoint's.
        dtype: to load and compute in.
    """
    weights = _Weights(source.architecture.forms()[0], part or source.part, source.experts)
    config = _ReferenceConfig(weights=weights)
    return source.loader.from_pretrained(
        source.directory, variant=source.variant, dtype=dtype, quantization_config=config
    )


def bundled(sidecar: Sidecar, copy: SourceModel) -> Part:
    """The weights that a sidecar's bundles hold, which may be rounded, with the biases of its directory."""

    def part(mlp: int, role: Role, kind: str) -> Tensor | None:
        if kind == "bias":
            bias = copy.part(mlp, role, kind)
            if bias is None or role == "down" or not sidecar.header.in_original_order:
                return bias
            return bias[torch.from_numpy(sidecar.permutation(mlp)).long()]
        rows_NRH = unpack_bundles(sidecar.bundles(mlp), sidecar.header, torch.float32)
        return rows_NRH[:, copy.architecture.bundle.index(role)]

    return part
