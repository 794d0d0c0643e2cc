"""A model directory's weight files, read and copied tensor by tensor."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ripple_loader.compat import pickled_tensors

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ALL_DTYPES = DTYPES | {
    "F64": torch.float64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_NAMES = {dtype: name for name, dtype in _ALL_DTYPES.items()}
_UNREADABLE = (
    RuntimeError,
    UnpicklingError,
    EOFError,
    OSError,
    ImportError,
    AttributeError,
    TypeError,
    KeyError,
)

ORIGINAL = "original"
"""The link to the original model in a directory that holds the sidecar only."""
_COPY_CHUNK = 16 << 20
_SAMPLED_BYTES = 4096
_FEWEST_SAMPLES = 3


@dataclass(frozen=True)
class TensorSpot:
    """The location of a tensor: its file, byte range, dtype (safetensors' name) and shape."""

    path: Path
    start: int
    stop: int
    dtype: str
    shape: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype; ValueError where torch has no such."""
        if self.dtype not in _ALL_DTYPES:
            raise ValueError(f"{self.path} must hold numbers that torch has, got {self.dtype}.")
        return _ALL_DTYPES[self.dtype]

    def read(self) -> Tensor:
        """Load the whole tensor."""
        data = np.fromfile(self.path, np.uint8, self.stop - self.start, offset=self.start)
        return torch.from_numpy(data).view(self.torch_dtype).view(self.shape)

    def slices(self) -> list[TensorSpot]:
        """The location of each entry of its first axis."""
        count = self.shape[0] if self.shape else 0
        size = (self.stop - self.start) // max(1, count)
        starts = (self.start + number * size for number in range(count))
        return [replace(self, start=start, stop=start + size, shape=self.shape[1:]) for start in starts]

    def raw_chunks(self) -> Iterator[bytes]:
        """Its bytes, a few MiB at a time."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            remaining = self.stop - self.start
            while remaining and (chunk := file.read(min(remaining, _COPY_CHUNK))):
                remaining -= len(chunk)
                yield chunk


@dataclass(frozen=True)
class Shard:
    """One weight file: the header bytes of it as safetensors, and its tensors in file order."""

    path: Path
    header: bytes
    tensors: dict[str, TensorSpot]


def read_shard(path: Path) -> Shard:
    """Read a file's table of tensors.

    Raises:
        ValueError: it is not a whole weight file.
    """
    if path.suffix == ".bin":
        return _read_pickled(path)
    try:
        with safe_open(path, "np"):  # checks the header and that the tensors fill the file without holes
            pass
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} must be a whole safetensors file, but {error}: fetch or save it again."
        ) from None
    with path.open("rb") as file:
        length = file.read(8)
        header = length + file.read(int.from_bytes(length, "little"))
    entries: dict[str, Any] = json.loads(header[8:])
    entries.pop("__metadata__", None)
    tensors = {}
    for name, entry in sorted(entries.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = (len(header) + offset for offset in entry["data_offsets"])
        tensors[name] = TensorSpot(path, start, stop, entry["dtype"], tuple(entry["shape"]))
    return Shard(path, header, tensors)


def _read_pickled(path: Path) -> Shard:
    """The tensors of a file of `torch.save`, which lie in it uncompressed; no code in it runs."""
    try:
        tensors = {name: _pickled_spot(path, name, *found) for name, found in pickled_tensors(path).items()}
    except _UNREADABLE as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f"{path} must be a whole file of tensors that `torch.save` wrote, but cannot be read ({reason}): "
            "load the model with transformers and save it as safetensors with `save_pretrained`."
        ) from None
    header = header_bytes({name: (spot.torch_dtype, spot.shape) for name, spot in tensors.items()})
    return Shard(path, header, tensors)


def header_bytes(tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]]) -> bytes:
    """The header of a safetensors file that holds these tensors in this order, one behind the other."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(entries).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    return len(text).to_bytes(8, "little") + text


def safetensors_name(number: int, count: int) -> str:
    """The name of a safetensors weight file among `count`, as transformers names them."""
    return f"model-{number + 1:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"


def _pickled_spot(path: Path, name: str, tensor: Tensor, start: int) -> TensorSpot:
    if not tensor.is_contiguous() or tensor.dtype not in _NAMES:
        raise TypeError(f"{name} is not a contiguous tensor of numbers")
    kind = _NAMES[tensor.dtype]
    return TensorSpot(path, start, start + tensor.numel() * tensor.itemsize, kind, tuple(tensor.shape))


def weight_names(variant: str | None = None) -> list[str]:
    """The names that weight files, or their index, may have in a directory, in the order of transformers."""
    forms = ("model.safetensors", "pytorch_model.bin")
    parts = [name.rpartition(".") for form in forms for name in (form, f"{form}.index.json")]
    return [f"{stem}.{variant}.{ending}" if variant else f"{stem}.{ending}" for stem, _, ending in parts]


def read_shards(directory: Path, variant: str | None = None) -> list[Shard]:
    """All weight files of a model directory: safetensors, or else `pytorch_model.bin`.

    Args:
        directory: of the model.
        variant: of the weight files, such as "fp16", as `from_pretrained` takes it.

    Raises:
        FileNotFoundError: no checkpoint, or a file of its index is missing.
        ValueError: the index is not valid or names a file outside the directory.
    """
    names = weight_names(variant)
    first = next((directory / name for name in names if (directory / name).exists()), None)
    if first is None:
        raise FileNotFoundError(
            f"{directory} must hold {', '.join(names[:-1])} or {names[-1]}, but holds none of them: save the "
            "model there with `save_pretrained`."
        )
    if first.suffix != ".json":
        return [read_shard(first)]
    try:
        files = sorted(set(json.loads(first.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{first} must map tensors to files under `weight_map`, but does not.") from None
    held = {path.name for path in directory.iterdir() if path.is_file()}
    for file in files:
        if not isinstance(file, str) or file.removeprefix(f"{ORIGINAL}/") != Path(file).name:
            raise ValueError(f"{first} must name files in its own directory, got {file!r}.")
        if file not in held and not (file.startswith(f"{ORIGINAL}/") and (directory / file).is_file()):
            raise FileNotFoundError(
                f"{first} names {file}, but {directory} does not hold it: fetch it again."
            )
    return [read_shard(directory / file) for file in files]


def check_original(directory: Path) -> None:
    """FileNotFoundError if a directory links to an original model that is not there."""
    link = directory / ORIGINAL
    if link.is_symlink() and not link.is_dir():
        raise FileNotFoundError(
            f"{directory} streams from the original's weight files and must find them in {link.readlink()}, "
            "but nothing is there: move the model back, or have the link `original` point to where it is now."
        )


def sha256(path: Path) -> str:
    """SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def stamp(path: Path) -> list[int]:
    """Size in bytes, time of modification in nanoseconds, and inode of a file: they change when it does."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ino]


def fingerprint(paths: list[Path]) -> str:
    """A cheap SHA-256 of a checkpoint: samples of every tensor, with names, types and shapes.

    The samples are 4096 bytes of every MiB, at least the first, middle and last of each tensor. They tell
    checkpoints with different weights apart without reading them whole; the result does not depend on how the
    tensors are spread over files.
    """
    spots = {name: spot for path in paths for name, spot in read_shard(path).tensors.items()}
    digest = hashlib.sha256()
    for name, spot in sorted(spots.items()):
        digest.update(f"{name} {spot.dtype} {spot.shape} ".encode())
        size = spot.stop - spot.start
        with spot.path.open("rb") as file:
            for offset in _sampled(size):
                file.seek(spot.start + offset)
                digest.update(file.read(min(_SAMPLED_BYTES, size - offset)))
    return digest.hexdigest()


def _sampled(size: int) -> list[int]:
    """The offsets of the samples of a tensor of `size` bytes."""
    count = max(_FEWEST_SAMPLES, size >> 20)
    if size <= count * _SAMPLED_BYTES:
        return list(range(0, size, _SAMPLED_BYTES))
    return np.linspace(0, size - _SAMPLED_BYTES, count).astype(int).tolist()
