"""A model directory's safetensors files, read and copied tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


_INDEX = "model.safetensors.index.json"
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

    def read(self) -> Tensor:
        """Load the whole tensor; its dtype must be one of `DTYPES`."""
        data = np.fromfile(self.path, np.uint8, self.stop - self.start, offset=self.start)
        return torch.from_numpy(data).view(DTYPES[self.dtype]).view(self.shape)

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
    """One safetensors file: its header bytes as they are, and its tensors in file order."""

    path: Path
    header: bytes
    tensors: dict[str, TensorSpot]


def read_shard(path: Path) -> Shard:
    """Read a file's table of tensors.

    Raises:
        ValueError: it is not a whole safetensors file.
    """
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


def read_shards(directory: Path) -> list[Shard]:
    """All weight files of a model directory.

    Raises:
        FileNotFoundError: no safetensors checkpoint, or a file of its index is missing.
        ValueError: the index is not valid or names a file outside the directory.
    """
    index = directory / _INDEX
    if not index.exists():
        if not (directory / "model.safetensors").exists():
            raise FileNotFoundError(
                f"{directory} must hold model.safetensors or {_INDEX}, but holds neither: save the model "
                "there with `save_pretrained`."
            )
        return [read_shard(directory / "model.safetensors")]
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{index} must map tensors to files under `weight_map`, but does not.") from None
    held = {path.name for path in directory.iterdir() if path.is_file()}
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} must name files in its own directory, got {name!r}.")
        if name not in held:
            raise FileNotFoundError(
                f"{index} names {name}, but {directory} does not hold it: fetch it again."
            )
    return [read_shard(directory / name) for name in names]


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
