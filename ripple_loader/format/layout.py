"""The sidecar's layout: the sections of `neurons.ripple` and their offsets.

It is a safetensors container, which any safetensors tool can list, under a name that no loader mistakes for
weights. Its sections are byte tensors that start and end on a 4096-byte boundary:

    layers.I.bundles      one bundle a neuron, in placement order: [gate | up | down^T], or [fc1 | fc2^T],
                          each row as `encoding.ENCODINGS` stores it
    layers.I.sketch       int8 copy of the rows that select: gate and up, or fc1
    layers.I.vectors      float32 biases and sketch scales, see `Vectors`
    layers.I.permutation  int32: the model's own index of the neuron at each place
    layers.I.predictor    of ReLU models: predicts their active neurons, see `predictor.Predictor`
    layers.I.checks       uint32: CRC-32C of each bundle and of each section before, see `checks.LayerChecks`
    checksums             uint32: CRC-32 of the container's header, then of each MiB of the sections before

I counts the streamed MLPs: the layers, or, in a mixture of experts, the experts of the first layer that has
any, then those of the next. Bundles follow each other without padding; a read is widened to the blocks of the
drive it comes from.

Dimension key: R rows of a bundle (3 with a gate, 2 without), S = R - 1 rows that select, N neurons, H hidden.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass, field, fields
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from ripple_loader.format.checks import LayerChecks
from ripple_loader.format.encoding import ENCODINGS, Encoding
from ripple_loader.format.predictor import Predictor
from ripple_loader.storage.blocks import align

SIDECAR = "neurons.ripple"
VERSION = 5
CHECKSUM_CHUNK = 1 << 20

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class SidecarHeader:
    """The description in a sidecar.

    Attributes:
        model_type: transformers' name of the architecture.
        layers, neurons, hidden: MLPs streamed, neurons in each (N), hidden size (H).
        experts: how many MLPs in a row are experts of one layer; None if the model is dense.
        rows: rows of a bundle (R): 3 with a gate, 2 without.
        dtype: the encoding of the bundles: a key of `encoding.ENCODINGS`.
        exact_zeros: whether the activation zeroes inactive neurons, which makes sparse reads exact.
        hot: for each MLP, how many of its first places hold neurons that stay in memory.
        checkpoint: fingerprint of the weight files beside the sidecar.
        files: SHA-256 of each of these weight files.
        stamps: size in bytes, time of modification in ns, and inode of each of these weight files.
        base: SHA-256 of each weight file of the model that was reordered.
        rank: of the predictors; 0 in a sidecar without predictors.
        sketches: whether the sidecar has the sketches.
        profile: figures of the order: placement, calibration tokens, activity, expected reads.
        version: of this format.
    """

    model_type: str
    layers: int
    neurons: int
    hidden: int
    rows: int
    dtype: str
    exact_zeros: bool
    hot: list[int]
    checkpoint: str
    files: dict[str, str]
    base: dict[str, str]
    stamps: dict[str, list[int]] = field(default_factory=dict)
    experts: int | None = None
    rank: int = 0
    sketches: bool = True
    profile: dict[str, Any] = field(default_factory=dict)
    version: int = VERSION

    def __post_init__(self) -> None:
        for name in ("layers", "neurons", "hidden"):
            if type(getattr(self, name)) is not int or not 0 < getattr(self, name) < 1 << 31:
                raise ValueError(f"`{name}` must be a positive int32, got {getattr(self, name)!r}")
        if type(self.rank) is not int or not 0 <= self.rank <= self.hidden:
            raise ValueError(f"`rank` must be at most {self.hidden}, got {self.rank!r}")
        if type(self.sketches) is not bool:
            raise ValueError(f"`sketches` must be true or false, got {self.sketches!r}")
        if self.rows not in (2, 3):
            raise ValueError(f"`rows` must be 2 or 3, got {self.rows!r}")
        if self.dtype not in ENCODINGS:
            raise ValueError(f"`dtype` must be one of {', '.join(ENCODINGS)}, got {self.dtype!r}")
        if type(self.hot) is not list or not all(type(n) is int and 0 <= n <= self.neurons for n in self.hot):
            raise ValueError(f"`hot` must count neurons of each MLP, got {self.hot!r}")
        if self.experts is not None and (
            type(self.experts) is not int or self.experts < 1 or self.layers % self.experts
        ):
            raise ValueError(f"`experts` must divide the {self.layers} MLPs, got {self.experts!r}")

    @property
    def in_original_order(self) -> bool:
        """Whether the weight files are the original's, so that their neurons are in the model's own order."""
        return self.files == self.base

    @property
    def encoding(self) -> Encoding:
        return ENCODINGS[self.dtype]

    @property
    def row_bytes(self) -> int:
        return self.encoding.row_bytes(self.hidden)

    @property
    def bundle_bytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def weight_bytes(self) -> int:
        """Bytes of the MLP weights that are streamed instead of loaded."""
        return self.layers * self.neurons * self.bundle_bytes

    def section_bytes(self) -> dict[str, int]:
        """Unpadded size of each section of one layer, in file order."""
        sizes = {
            "bundles": self.neurons * self.bundle_bytes,
            "sketch": self.sketches * (self.rows - 1) * self.neurons * self.hidden,
            "vectors": 4 * Vectors.size(self.rows, self.neurons, self.hidden),
            "permutation": 4 * self.neurons,
            "predictor": Predictor.size(self.rank, self.neurons, self.hidden),
            "checks": LayerChecks.size(self.neurons),
        }
        return {kind: size for kind, size in sizes.items() if size}

    def layout(self) -> SidecarLayout:
        """The offsets of all sections."""
        description = {part.name: getattr(self, part.name) for part in fields(self)}
        if self.sketches:  # sidecars were written without this name when all had sketches
            del description["sketches"]
        entries: dict[str, Any] = {"__metadata__": {"ripple": json.dumps(description)}}
        starts, end = {}, 0
        padded = {kind: align(size) for kind, size in self.section_bytes().items()}
        for layer in range(self.layers):
            for kind, size in padded.items():
                name, start, end = f"layers.{layer}.{kind}", end, end + size
                entries[name] = {"dtype": "U8", "shape": [end - start], "data_offsets": [start, end]}
                starts[name] = start
        checksums = 1 + -(-end // CHECKSUM_CHUNK)
        spot = [end, end + 4 * checksums]
        entries["checksums"] = {"dtype": "U32", "shape": [checksums], "data_offsets": spot}
        text = json.dumps(entries).encode()
        text = text.ljust(align(len(text) + 8) - 8)
        container = struct.pack("<Q", len(text)) + text
        offsets = {name: len(container) + start for name, start in starts.items()}
        return SidecarLayout(container, offsets, len(container) + end, checksums)


@dataclass(frozen=True)
class SidecarLayout:
    """Offsets in a sidecar file.

    Attributes:
        container: the safetensors header that the file starts with.
        offsets: byte offset of each section.
        checksums_at, checksums: byte offset and number of the checksums, which end the file.
    """

    container: bytes
    offsets: dict[str, int]
    checksums_at: int
    checksums: int

    @property
    def file_bytes(self) -> int:
        return self.checksums_at + 4 * self.checksums


@dataclass(frozen=True)
class Vectors:
    """The small numbers of a layer, float32; absent biases are zeros.

    Attributes:
        bias: biases of the rows that select, shape (S, N).
        down_bias: bias of the output, shape (H,).
        scale: float value of one step of the int8 sketch, shape (S, N).
        error: Euclidean norm of each row's rounding error in the sketch, shape (S, N).
    """

    bias: Array
    down_bias: Array
    scale: Array
    error: Array

    @staticmethod
    def size(rows: int, neurons: int, hidden: int) -> int:
        return 3 * (rows - 1) * neurons + hidden

    def pack(self) -> bytes:
        parts = [np.asarray(getattr(self, part.name), np.float32).ravel() for part in fields(self)]
        return np.concatenate(parts).tobytes()

    @classmethod
    def unpack(cls, data: bytes | memoryview, rows: int, neurons: int, hidden: int) -> Self:
        SN = (rows - 1) * neurons
        numbers = np.frombuffer(data, np.float32, cls.size(rows, neurons, hidden))
        bias, down, scale, error = np.split(numbers, [SN, SN + hidden, 2 * SN + hidden])
        shape = (rows - 1, neurons)
        return cls(bias.reshape(shape), down, scale.reshape(shape), error.reshape(shape))
