"""The weights of quantized checkpoints as plain floats, tensor by tensor, method by method."""

from __future__ import annotations

import functools
import importlib.util
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ripple_loader.checkpoint.packed_integers import awq_values, gptq_values
from ripple_loader.checkpoint.shards import DTYPES, Shard, TensorSpot
from ripple_loader.compat import fp8_values

_WAY_OUT = "reorder the checkpoint that it was quantized from."
_PACKED = ("I8", "U8")  # two numbers of four bits a byte
_WORD = 32
_BNB_STATES = tuple(f".weight.quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))


@dataclass(frozen=True)
class Plain:
    """A tensor to write: its shape and dtype, and how to compute it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]


@dataclass(frozen=True)
class _Weight:
    """A quantized weight: its name without an ending, and its tensors by the endings of their names."""

    name: str
    spots: dict[str, TensorSpot]

    def __getitem__(self, ending: str) -> TensorSpot:
        if ending not in self.spots:
            raise ValueError(f"the checkpoint must hold {self.name}{ending}, but does not: {_WAY_OUT}")
        return self.spots[ending]


_Values = tuple[tuple[int, ...], Callable[[], Tensor]]  # the shape of a weight, and how to compute it


@dataclass(frozen=True)
class Method:
    """How a method of quantization stores a weight.

    Attributes:
        stored: endings of the tensors that hold a weight's numbers.
        parts: endings of the tensors that these numbers are dequantized with.
        values: dequantizes a weight, by the configuration's `quantization_config`.
        activations: endings of tensors that only concern activations, which are not written.
        ending: of the plain weight's name.
        package: that is needed.
        settings: the values that settings of `quantization_config` may have where they are given; a dot
            stands between the name of a group of settings and that of a setting in it.
    """

    stored: tuple[str, ...]
    parts: tuple[str, ...]
    values: Callable[[_Weight, dict[str, Any]], _Values]
    activations: tuple[str, ...] = ()
    ending: str = ".weight"
    package: str | None = None
    settings: tuple[tuple[str, tuple[Any, ...]], ...] = ()

    def check(self, quantization: dict[str, Any]) -> None:
        """ValueError if a package is missing or a setting has an unknown value."""
        name = quantization["quant_method"]
        if self.package and importlib.util.find_spec(self.package.replace("-", "_")) is None:
            raise ValueError(
                f"a model quantized with {name} needs the package {self.package}: pip install {self.package}."
            )
        for key, known in self.settings:
            got = _setting(quantization, key)
            if got is not None and got not in known:
                raise ValueError(
                    f"`{key}` of a model quantized with {name} must be {' or '.join(map(str, known))}, got "
                    f"{got}: {_WAY_OUT}"
                )


class QuantizedTensors:
    """The tensors of a quantized checkpoint, as plain floats.

    Args:
        shards: its files.
        model: without memory for its weights.
        quantization: the configuration's `quantization_config`.
        dtype: of the weights that were quantized.

    Raises:
        ValueError: tensors are missing or of an unknown form, or a package is needed.
    """

    def __init__(
        self, shards: list[Shard], model: nn.Module, quantization: dict[str, Any], dtype: torch.dtype
    ) -> None:
        self.method = METHODS[quantization["quant_method"]]
        self.method.check(quantization)
        self.quantization, self.dtype = quantization, dtype
        self.modules = dict(model.named_modules())
        self.prefix = getattr(model, "base_model_prefix", "")
        self.spots = {name: spot for shard in shards for name, spot in shard.tensors.items()}
        self.weights = self._weights()
        self.files = [self._plain_file(shard) for shard in shards]

    def _weights(self) -> dict[str, _Weight]:
        """The quantized weights by the name of the tensor that holds their numbers."""
        parts: dict[str, dict[str, TensorSpot]] = {}
        for name, spot in self.spots.items():
            if ending := _ending(name, self.method.parts):
                parts.setdefault(name.removesuffix(ending), {})[ending] = spot
        weights = {}
        for name, held in parts.items():
            stored = [ending for ending in self.method.stored if name + ending in self.spots]
            if len(stored) != 1:
                raise ValueError(
                    f"the checkpoint must hold one weight that is dequantized with {name}{min(held)}, but "
                    f"holds {len(stored)}: {_WAY_OUT}"
                )
            weight = name + stored[0]
            weights[weight] = _Weight(name, held | {stored[0]: self.spots[weight]})
        return weights

    def _plain_file(self, shard: Shard) -> dict[str, Plain]:
        left_out = self.method.parts + self.method.activations
        tensors = {}
        for name, spot in shard.tensors.items():
            if name in self.weights:
                plain, tensor = self._dequantized(name)
                tensors[plain] = tensor
            elif not _ending(name, left_out) and not self._is_added_bias(name):
                _check_plain(name, spot)
                tensors[name] = Plain(spot.shape, spot.torch_dtype, spot.read)
        return tensors

    def _dequantized(self, name: str) -> tuple[str, Plain]:
        weight = self.weights[name]
        plain = weight.name + self.method.ending
        if plain != name and plain in self.spots:
            raise ValueError(
                f"the checkpoint must hold {plain} quantized or plain, but holds both: {_WAY_OUT}"
            )
        shape, compute = self.method.values(weight, self.quantization)
        module = self._module(weight.name)
        transposed = isinstance(module, Conv1D)  # it was quantized as a linear
        shape = shape[::-1] if transposed else shape
        if isinstance(module, (nn.Linear, Conv1D)) and module.weight.shape != shape:
            raise ValueError(
                f"{plain} must be {tuple(module.weight.shape)}, but is quantized as {shape}: {_WAY_OUT}"
            )
        dtype = self.dtype

        def values() -> Tensor:
            got = compute().to(dtype)
            got = got.T if transposed else got
            if got.shape != shape:
                raise ValueError(f"its numbers must be {shape}, got {tuple(got.shape)}")
            return got

        return plain, Plain(shape, dtype, values)

    def _module(self, name: str) -> nn.Module | None:
        """The module that a name in the checkpoint stands for; None if the model has none of that name."""
        return self.modules.get(name) or self.modules.get(f"{self.prefix}.{name}")

    @functools.cached_property
    def _quantized_names(self) -> set[str]:
        return {weight.name for weight in self.weights.values()}

    def _is_added_bias(self, name: str) -> bool:
        """Whether a bias of zeros was added to a quantized linear that has none, as AutoGPTQ does."""
        linear, _, ending = name.rpartition(".")
        if ending != "bias" or linear not in self._quantized_names:
            return False
        module = self._module(linear)
        if not isinstance(module, (nn.Linear, Conv1D)) or module.bias is not None:
            return False
        if self.spots[name].read().count_nonzero():
            raise ValueError(f"{name} must be zero, because the model has no such bias: {_WAY_OUT}")
        return True


def _setting(quantization: dict[str, Any], key: str) -> Any:
    """A setting, in lower case; None where it is not given or empty."""
    value: Any = quantization
    for name in key.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value.lower() if isinstance(value, str) else None if value == {} else value


def _ending(name: str, endings: tuple[str, ...]) -> str:
    """The longest of the endings that a name has, or ""."""
    return max((ending for ending in endings if name.endswith(ending)), key=len, default="")


def _check_plain(name: str, spot: TensorSpot) -> None:
    if spot.dtype.startswith("F8") or name.endswith((".qweight", ".weight_packed")):
        raise ValueError(
            f"{spot.path} must hold the scales of {name}, which is in {spot.dtype}, but does not: {_WAY_OUT}"
        )


def _fp8(weight: _Weight, quantization: dict[str, Any]) -> _Values:
    stored, scale = weight[""], weight["_scale_inv"]
    shape = (*stored.shape[:-1], stored.shape[-1] * (2 if stored.dtype in _PACKED else 1))
    return shape, lambda: fp8_values(stored.read(), scale.read())


def _gptq(weight: _Weight, quantization: dict[str, Any]) -> _Values:
    stored, zeros, scales = (weight[f".{part}"] for part in ("qweight", "qzeros", "scales"))
    groups, outputs = scales.shape
    if ".g_idx" in weight.spots or quantization.get("desc_act"):
        group = weight[".g_idx"].read()
    else:
        inputs = stored.shape[0] * _WORD // quantization["bits"]
        group = torch.arange(inputs) // -(-inputs // groups)
    bits = stored.shape[0] * _WORD // max(1, len(group))
    allowed = (2, 3, 4, 8) if quantization.get("dynamic") else (quantization["bits"],)
    packed = (len(group) * bits // _WORD, outputs), (groups, outputs * bits // _WORD)
    if bits not in allowed or (stored.shape, zeros.shape) != packed:
        raise ValueError(
            f"{weight.name} must be packed in {' or '.join(map(str, allowed))} bits, but its qweight is "
            f"{stored.shape} and its qzeros {zeros.shape} for {len(group)} inputs in {groups} groups: "
            + _WAY_OUT
        )
    form = _setting(quantization, "checkpoint_format") or _setting(quantization, "format")
    v1 = form != "gptq_v2"
    shape = (outputs, len(group))
    return shape, lambda: gptq_values(stored.read(), zeros.read(), scales.read(), group, bits, v1)


def _awq(weight: _Weight, quantization: dict[str, Any]) -> _Values:
    stored, zeros, scales = (weight[f".{part}"] for part in ("qweight", "qzeros", "scales"))
    groups, outputs = scales.shape
    words = outputs // 8
    if stored.shape[1:] != (words,) or zeros.shape != (groups, words) or stored.shape[0] % groups:
        raise ValueError(
            f"{weight.name} must be packed in 4 bits along its outputs, but its qweight is {stored.shape}, "
            f"its qzeros {zeros.shape} and its scales {scales.shape}: {_WAY_OUT}"
        )
    shape = (outputs, stored.shape[0])
    return shape, lambda: awq_values(stored.read(), zeros.read(), scales.read())


def _bitsandbytes(weight: _Weight, quantization: dict[str, Any]) -> _Values:
    from bitsandbytes import functional

    stored = weight[".weight"]
    if ".SCB" in weight.spots:
        scales, form = weight[".SCB"], weight.spots.get(".weight_format")
        if form is not None and form.read().any():
            raise ValueError(f"{weight.name} must be stored by rows, but has another form: {_WAY_OUT}")
        return stored.shape, lambda: functional.int8_vectorwise_dequant(stored.read(), scales.read())
    described = next((ending for ending in _BNB_STATES if ending in weight.spots), _BNB_STATES[0])
    shape = tuple(json.loads(bytes(weight[described].read().tolist()))["shape"])

    def values() -> Tensor:
        parts = {
            ending.removeprefix(".weight."): spot.read()
            for ending, spot in weight.spots.items()
            if ending != ".weight"
        }
        state = functional.QuantState.from_dict(parts, torch.device("cpu"))
        packed = stored.read().view(torch.uint8).view(-1, 1)
        return functional.dequantize_4bit(packed, state).view(shape)

    return shape, values


def _compressed(weight: _Weight, quantization: dict[str, Any]) -> _Values:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match, match_name

    if ".weight_g_idx" in weight.spots:
        raise ValueError(f"{weight.name} must have its inputs in order, but has `weight_g_idx`: {_WAY_OUT}")
    config = QuantizationConfig.model_validate(quantization)
    linear, ignored = nn.Linear(1, 1, device="meta"), config.ignore or ()
    groups = config.config_groups.values()
    schemes = [one for one in groups if is_match(weight.name, linear, one.targets, ignored)]
    named = [one for one in schemes if any(match_name(weight.name, target) for target in one.targets)]
    if len(named or schemes) != 1:
        raise ValueError(
            f"one of `config_groups` must match {weight.name}, but {len(named or schemes)} do: {_WAY_OUT}"
        )
    (scheme,) = named or schemes
    kind = str(getattr(scheme.format or config.format, "value", scheme.format or config.format))
    if kind not in _COMPRESSED:
        raise ValueError(
            f"{weight.name} must be stored as {', '.join(_COMPRESSED[:-1])} or {_COMPRESSED[-1]}, but is as "
            f"{kind}: {_WAY_OUT}"
        )
    compressor = BaseCompressor.get_value_from_registry(kind)
    packed = ".weight_packed" in weight.spots
    stored = weight[".weight_packed" if packed else ".weight"]
    if not packed and stored.dtype in DTYPES:
        raise ValueError(f"{weight.name} must be quantized, but has scales and plain floats: {_WAY_OUT}")
    if not packed:
        shape = stored.shape
    elif kind == "pack-quantized":
        shape = tuple(weight[".weight_shape"].read().tolist())
    else:
        shape = (stored.shape[0], stored.shape[1] * 2)

    def values() -> Tensor:
        parts = {ending.removeprefix("."): spot.read() for ending, spot in weight.spots.items()}
        plain: Tensor = compressor.decompress(parts, scheme)["weight"]
        return plain

    return shape, values


_COMPRESSED = (
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "naive-quantized",
    "nvfp4-pack-quantized",
    "mxfp4-pack-quantized",
)
_ACTIVATIONS = tuple(
    f".{side}_{what}" for side in ("input", "output") for what in ("scale", "zero_point", "global_scale")
)

METHODS = {
    "fp8": Method(("",), ("_scale_inv",), _fp8, (".activation_scale",), ending=""),
    "gptq": Method(
        (".qweight",),
        (".qzeros", ".scales", ".g_idx"),
        _gptq,
        settings=(
            ("checkpoint_format", ("gptq", "gptq_v2")),
            ("format", ("gptq", "gptq_v2")),
            ("pack_dtype", ("int32",)),
            ("is_marlin_format", (False,)),
            ("rotation", ("empty",)),
        ),
    ),
    "awq": Method(
        (".qweight",),
        (".qzeros", ".scales"),
        _awq,
        settings=(
            ("bits", (4,)),
            ("zero_point", (True,)),
            *((name, ("gemm",)) for name in ("version", "format", "checkpoint_format")),
        ),
    ),
    "bitsandbytes": Method(
        (".weight",),
        (
            ".SCB",
            ".weight_format",
            *(f".weight.{kind}" for kind in ("absmax", "quant_map", "nested_absmax", "nested_quant_map")),
            *_BNB_STATES,
        ),
        _bitsandbytes,
        package="bitsandbytes",
    ),
    "compressed-tensors": Method(
        (".weight_packed", ".weight"),
        tuple(f".weight_{part}" for part in ("scale", "zero_point", "global_scale", "shape", "g_idx")),
        _compressed,
        (*_ACTIVATIONS, ".k_scale", ".v_scale", ".q_scale"),
        package="compressed-tensors",
        settings=(
            ("sparsity_config.format", ("dense",)),
            ("transform_config", ("empty",)),
            ("moe_sparsity_config", ("empty",)),
        ),
    ),
}
