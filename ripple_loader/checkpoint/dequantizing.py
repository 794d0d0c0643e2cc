"""Write a quantized checkpoint as plain floats, one tensor at a time."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ripple_loader.checkpoint.gguf_files import gguf_file, open_gguf, write_tokenizer
from ripple_loader.checkpoint.quantization import METHODS, Plain, QuantizedTensors
from ripple_loader.checkpoint.shards import header_bytes, read_shards, safetensors_name, stamp
from ripple_loader.checkpoint.source import read_config
from ripple_loader.files import check_space, whole_file
from ripple_loader.model.classes import skeleton
from ripple_loader.model.probe import architecture_of

_OTHERS = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab.*", "merges.txt", "*.jinja")


@dataclass(frozen=True)
class Quantized:
    """A quantized checkpoint that can be written as plain floats.

    GGUF becomes float32, and everything else the configuration's dtype, as transformers loads them.

    Attributes:
        sources: its weight files.
        config: config.json of the plain checkpoint.
        files: the tensors of each plain weight file.
        others: files to copy, such as the tokenizer's.
    """

    sources: list[Path]
    config: dict[str, Any]
    files: list[dict[str, Plain]]
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
            write_tokenizer(self.sources[0], out)
        _write_all(out, self.files)


def open_quantized(path: Path, variant: str | None = None) -> Quantized | None:
    """A checkpoint that can be dequantized, or a GGUF file; None for others.

    Args:
        path: a directory or a GGUF file.
        variant: of the weight files.

    Raises:
        FileNotFoundError: weight files are missing.
        ValueError: the model or its form of quantization is not supported, its files are damaged, or a
            package is needed.
    """
    file = gguf_file(path)
    if file is not None:
        config, tensors = open_gguf(file)
        others = [path for name in _TOKENIZER for path in sorted(file.parent.glob(name))]
        return Quantized([file], config.to_dict(), [tensors], others)
    if not (path / "config.json").is_file():
        return None
    config = read_config(path)
    quantization = dict(getattr(config, "quantization_config", None) or {})
    if quantization.get("load_in_4bit") or quantization.get("load_in_8bit"):
        quantization.setdefault("quant_method", "bitsandbytes")  # old checkpoints do not name it
    if quantization.get("quant_method") not in METHODS:
        return None
    architecture_of(config)  # refuses models that cannot be streamed
    shards = read_shards(path, variant)
    dtype = config.dtype or torch.bfloat16
    try:
        files = QuantizedTensors(shards, skeleton(config), quantization, dtype).files
    except ValueError as error:
        raise ValueError(f"{path} cannot be dequantized: {error}") from error
    plain = json.loads((path / "config.json").read_text("utf-8"))
    del plain["quantization_config"]
    others = [
        other for other in sorted(path.iterdir()) if other.suffix in _OTHERS and ".index." not in other.name
    ]
    return Quantized([shard.path for shard in shards], plain, [one for one in files if one], others)


def _write_all(out: Path, files: list[dict[str, Plain]]) -> None:
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


def _size(tensor: Plain) -> int:
    return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


def _write(path: Path, tensors: dict[str, Plain]) -> None:
    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(header_bytes({name: (one.dtype, one.shape) for name, one in tensors.items()}))
        for name, one in tensors.items():
            try:
                values = one.compute()
            except ValueError as error:
                raise ValueError(f"{name} cannot be dequantized: {error}") from error
            file.write(memoryview(values.contiguous().reshape(-1).view(torch.uint8).numpy()))
