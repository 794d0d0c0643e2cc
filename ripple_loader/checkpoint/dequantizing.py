"""Write a quantized checkpoint as plain floats, one tensor at a time, with transformers' own dequantizers."""

from __future__ import annotations

import importlib.util
import json
import shutil
import struct
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ripple_loader.checkpoint.shards import (
    DTYPES,
    TensorSpot,
    header_bytes,
    read_shards,
    safetensors_name,
    stamp,
)
from ripple_loader.checkpoint.source import read_config
from ripple_loader.compat import fp8_values, gguf_names
from ripple_loader.files import check_space, whole_file
from ripple_loader.model.classes import skeleton
from ripple_loader.model.probe import architecture_of

_SCALES = ("_scale_inv", ".activation_scale")
_PACKED = ("I8", "U8")  # two numbers of four bits a byte
_OTHERS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


@dataclass(frozen=True)
class _Plain:
    """A tensor to write: its shape and dtype, and how to compute it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    compute: Callable[[], Tensor]


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a model is: itself, or the only weights of its directory.

    Raises:
        ValueError: the directory holds several.
    """
    if path.suffix == ".gguf":
        return path
    if not path.is_dir() or any(path.glob("*.safetensors")) or any(path.glob("*.bin")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise ValueError(
            f"{path} must hold one GGUF file, but holds {', '.join(file.name for file in files)}: give the "
            "path of one of them."
        )
    return files[0] if files else None


@dataclass(frozen=True)
class Quantized:
    """A quantized checkpoint that can be written as plain floats.

    fp8 becomes the configuration's dtype, and GGUF float32, as transformers loads them.

    Attributes:
        sources: its weight files.
        config: config.json of the plain checkpoint.
        files: the tensors of each plain weight file.
        others: files to copy, such as the tokenizer's.
    """

    sources: list[Path]
    config: dict[str, Any]
    files: list[dict[str, _Plain]]
    others: list[Path]

    @property
    def description(self) -> dict[str, list[int]]:
        """The names and stamps of the weight files, which what is written depends on."""
        return {str(one.absolute()): stamp(one) for one in self.sources}

    def write(self, out: Path) -> None:
        """Write the plain checkpoint into a directory, with the memory of a few copies of its largest tensor.

        Weight files that are there already are kept.

        Raises:
            ValueError: a tensor cannot be dequantized.
            OSError: not enough disk space.
        """
        for other in self.others:
            shutil.copyfile(other, out / other.name)
        (out / "config.json").write_text(json.dumps(self.config, indent=2, default=str))
        if self.sources[0].suffix == ".gguf" and not any(out.glob("tokenizer*")):
            _write_tokenizer(self.sources[0], out)
        _write_all(out, self.files)


def open_quantized(path: Path, variant: str | None = None) -> Quantized | None:
    """A checkpoint in fp8 blocks or a GGUF file; None for others.

    Args:
        path: a directory or a GGUF file.
        variant: of the weight files.

    Raises:
        FileNotFoundError: weight files are missing.
        ValueError: the model is not supported, or its files are damaged.
    """
    file = gguf_file(path)
    if file is not None:
        return _open_gguf(file)
    if not (path / "config.json").is_file():
        return None
    config = read_config(path)
    if dict(getattr(config, "quantization_config", None) or {}).get("quant_method") != "fp8":
        return None
    architecture_of(config)  # refuses models that cannot be streamed
    shards = read_shards(path, variant)
    spots = {name: spot for shard in shards for name, spot in shard.tensors.items()}
    dtype = config.dtype or torch.bfloat16
    files = [
        {name: _plain(name, spots, dtype) for name in shard.tensors if not name.endswith(_SCALES)}
        for shard in shards
    ]
    plain = json.loads((path / "config.json").read_text("utf-8"))
    del plain["quantization_config"]
    others = [
        other for other in sorted(path.iterdir()) if other.suffix in _OTHERS and ".index." not in other.name
    ]
    return Quantized([shard.path for shard in shards], plain, [one for one in files if one], others)


def _plain(name: str, spots: dict[str, TensorSpot], dtype: torch.dtype) -> _Plain:
    spot, scale = spots[name], spots.get(f"{name}_scale_inv")
    if scale is None:
        if spot.dtype not in DTYPES and spot.dtype.startswith("F8"):
            raise ValueError(
                f"{spot.path} must hold the scales of {name}, which is in {spot.dtype}, as {name}_scale_inv, "
                "but does not: reorder the checkpoint that it was quantized from."
            )
        return _Plain(spot.shape, spot.torch_dtype, spot.read)
    shape = (*spot.shape[:-1], spot.shape[-1] * (2 if spot.dtype in _PACKED else 1))
    return _Plain(shape, dtype, lambda: fp8_values(spot.read(), scale.read()).to(dtype))


def _open_gguf(file: Path) -> Quantized:
    from transformers import AutoConfig

    if not file.is_file():
        raise FileNotFoundError(f"{file} must be a GGUF file, but does not exist.")
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"{file} needs the package gguf: pip install gguf.")
    try:
        config = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
        architecture, model = architecture_of(config), skeleton(config)
        tensors = {name: _Plain(shape, torch.float32, compute) for name, shape, compute in _gguf(file, model)}
    except (ValueError, IndexError, KeyError, OverflowError, NotImplementedError, struct.error) as error:
        raise ValueError(
            f"{file} must be a whole GGUF file of a model that transformers and Ripple know, but {error}."
        ) from error
    if architecture.expert is not None:
        raise ValueError(
            f"{file} must be a model without experts, but is a {config.model_type}: load it with "
            "transformers, `from_pretrained(FOLDER, gguf_file=NAME)`, and reorder what `save_pretrained` "
            "writes."
        )
    missing = model.state_dict().keys() - tensors.keys() - set(getattr(model, "all_tied_weights_keys", ()))
    if missing:
        raise ValueError(f"{file} must hold all weights of a {config.model_type}, but lacks {min(missing)}.")
    config.dtype = torch.float32
    others = [path for name in _TOKENIZER for path in sorted(file.parent.glob(name))]
    return Quantized([file], config.to_dict(), [tensors], others)


def _write_tokenizer(file: Path, out: Path) -> None:
    from transformers import AutoTokenizer

    try:
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    except Exception as error:  # of many kinds; a trace of token ids needs none
        warnings.warn(
            f"{file} has no tokenizer that transformers can read ({error}): put the tokenizer's files beside "
            "it, or give token ids instead of texts.",
            stacklevel=2,
        )


def _gguf(file: Path, model: Any) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
    """Name, shape and values of each tensor of a GGUF file that the model has."""
    from gguf import dequantize as values

    for name, stored, process in gguf_names(file, model):
        shape = tuple(model.get_parameter(name).shape)

        def compute(stored: Any = stored, process: Any = process, shape: Any = shape) -> Tensor:
            array = process(values(stored.data, stored.tensor_type))
            return torch.from_numpy(np.array(array, np.float32)).view(shape)

        yield name, shape, compute


def _write_all(out: Path, files: list[dict[str, _Plain]]) -> None:
    names = [safetensors_name(number, len(files)) for number in range(len(files))]
    sizes = {name: sum(map(_size, tensors.values())) for name, tensors in zip(names, files, strict=True)}
    missing = sum(size for name, size in sizes.items() if not (out / name).exists())
    check_space(out, missing + 2 * sum(sizes.values()))  # the copy and its sidecar follow
    for name, tensors in zip(names, files, strict=True):
        if not (out / name).exists():
            _write(out / name, tensors)
    if len(files) > 1:
        held = {tensor: name for name, tensors in zip(names, files, strict=True) for tensor in tensors}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": held}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _size(tensor: _Plain) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def _write(path: Path, tensors: dict[str, _Plain]) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(header_bytes({name: (one.dtype, one.shape) for name, one in tensors.items()}))
        for name, one in tensors.items():
            try:
                values = one.compute()
            except ValueError as error:
                raise ValueError(f"{name} cannot be dequantized: {error}") from error
            file.write(memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy()))
