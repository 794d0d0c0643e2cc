"""Write, open and check a sidecar; make bundles and sketches of a layer's weights.

Dimension key: R rows of a bundle, S = R - 1 rows that select, N neurons, H hidden.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from ripple_loader.checkpoint import fingerprint, read_shards
from ripple_loader.config import check_keys
from ripple_loader.encoding import Encoding
from ripple_loader.predictor import Predictor
from ripple_loader.selection import sketch_rows
from ripple_loader.sidecar import (
    CHECKSUM_CHUNK,
    SIDECAR,
    VERSION,
    Array,
    SidecarHeader,
    Vectors,
    align,
)

HEADER_LIMIT = 100 << 20  # safetensors' own


def pack_bundles(rows_RNH: list[Tensor], encoding: Encoding) -> Tensor:
    """Encode and interleave the rows of each neuron: uint8, shape (N, bytes of a bundle)."""
    return torch.cat([encoding.encode(row_NH) for row_NH in rows_RNH], dim=1)


def unpack_bundles(
    bytes_NB: Tensor, header: SidecarHeader, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Decode bundles to `dtype`, shape (N, R, H): a view where they are stored so, else in `out` if given."""
    shape = len(bytes_NB), header.rows, header.hidden
    if header.encoding.stores(dtype):
        return bytes_NB.view(dtype).view(shape)
    rows_NRH = torch.empty(shape, dtype=dtype, device="cpu") if out is None else out
    for row, row_NB in enumerate(bytes_NB.split(header.row_bytes, dim=1)):
        header.encoding.decode(row_NB, rows_NRH[:, row])
    return rows_NRH


class SidecarWriter:
    """Writes a sidecar front to back, a layer at a time.

    Args:
        path: the file to make.
        header: all that its sizes follow from.
    """

    def __init__(self, path: Path, header: SidecarHeader) -> None:
        self.header, self.layout = header, header.layout()
        self._file = path.open("wb")
        self._file.write(self.layout.container)
        self._chunk, self._crc, self._left = [zlib.crc32(self.layout.container)], 0, CHECKSUM_CHUNK

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._left < CHECKSUM_CHUNK:
                    self._chunk.append(self._crc)
                self._file.write(np.array(self._chunk, "<u4").tobytes())
                self._file.flush()
                os.fsync(self._file.fileno())
                assert self._file.tell() == self.layout.file_bytes
        finally:
            self._file.close()

    def write_layer(
        self,
        rows_RNH: list[Tensor],
        biases: dict[int, Tensor],
        permutation_N: Array,
        inputs_MH: Tensor | None = None,
    ) -> None:
        """Append one layer.

        Args:
            rows_RNH: its bundle rows, each (N, H), already in placement order, in any float dtype.
            biases: bias of each row that has one, in placement order; the last row's is the output's.
            permutation_N: the model's own index of the neuron at each place.
            inputs_MH: some of its inputs, which its predictor is fitted to if the header has a rank.
        """
        N, H, S = self.header.neurons, self.header.hidden, self.header.rows - 1
        bundles = pack_bundles(rows_RNH, self.header.encoding)
        self._write(bundles.numpy())
        # The sketch is of what will be computed with, which is what bounds its error.
        stored_NRH = unpack_bundles(bundles, self.header, torch.float32)
        sketches, scales, errors = zip(*(sketch_rows(stored_NRH[:, row]) for row in range(S)), strict=True)
        self._write(np.stack(sketches))
        bias_SN = [biases[row].float().numpy() if row in biases else np.zeros(N) for row in range(S)]
        down_bias_H = biases[S].float().numpy() if S in biases else np.zeros(H)
        vectors = Vectors(np.stack(bias_SN), down_bias_H, np.stack(scales), np.stack(errors))
        self._write(np.frombuffer(vectors.pack(), np.uint8))
        self._write(permutation_N.astype("<i4"))
        if self.header.rank:
            assert inputs_MH is not None
            bias_N = torch.from_numpy(bias_SN[0]).float()
            predictor = Predictor.fit(inputs_MH, stored_NRH[:, 0], bias_N, self.header.rank)
            self._write(np.frombuffer(predictor.pack(), np.uint8))

    def _write(self, array: Array) -> None:
        """Append one section, padded to a block."""
        data = np.ascontiguousarray(array).data.cast("B")
        for part in (data, memoryview(bytes(align(len(data)) - len(data)))):
            self._file.write(part)
            while len(part):
                taken, part = part[: self._left], part[self._left :]
                self._crc = zlib.crc32(taken, self._crc)
                self._left -= len(taken)
                if not self._left:
                    self._chunk.append(self._crc)
                    self._crc, self._left = 0, CHECKSUM_CHUNK


class Sidecar:
    """A sidecar opened for looking things up; the weights are read by `reader.Reader`.

    Raises:
        FileNotFoundError: the directory has no sidecar.
        ValueError: the file is damaged, cut short, or of another version.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory) / SIDECAR
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{directory} should hold {SIDECAR}, but does not: make a streaming copy of the model with "
                f"`ripple reorder {directory} --calibration TEXT --out NEW_DIRECTORY` and load that."
            )
        self.header = self._read_header()
        self.layout = self.header.layout()
        with self.path.open("rb") as file:
            container = file.read(len(self.layout.container))
        if container != self.layout.container:
            raise self._damaged(0, "its table of sections does not follow from its description")
        if (size := self.path.stat().st_size) != self.layout.file_bytes:
            raise self._damaged(size, f"it should have {self.layout.file_bytes} bytes")

    def _damaged(self, offset: int, reason: str) -> ValueError:
        return ValueError(f"{self.path} is damaged at byte {offset}: {reason}; reorder the model again.")

    def _read_header(self) -> SidecarHeader:
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(HEADER_LIMIT, self.path.stat().st_size - 8):
                raise self._damaged(0, f"it claims a header of {length} bytes")
            text = file.read(length)
        try:
            fields: dict[str, Any] = json.loads(json.loads(text)["__metadata__"]["ripple"])
            version = fields["version"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise self._damaged(8, "its header cannot be read") from None
        if version != VERSION:
            raise ValueError(
                f"{self.path} has format version {version!r}, this package reads version {VERSION}: "
                "reorder the model again or install the matching package."
            )
        try:
            check_keys(fields, SidecarHeader.__dataclass_fields__, "a sidecar header")
            header = SidecarHeader(**fields)
            if header.layers > length or len(header.hot) != header.layers:
                raise ValueError(f"{header.layers} layers do not fit in it")
            return header
        except (ValueError, TypeError) as error:
            raise self._damaged(8, f"its header is not valid: {error}") from None

    def section(self, layer: int, kind: str) -> tuple[int, int]:
        """Byte offset and unpadded size of a layer's section."""
        return self.layout.offsets[f"layers.{layer}.{kind}"], self.header.section_bytes()[kind]

    def permutation(self, layer: int) -> Array:
        """int32, shape (N,): the model's own index of the neuron at each place."""
        offset, _ = self.section(layer, "permutation")
        return np.fromfile(self.path, "<i4", self.header.neurons, offset=offset)

    def predictor(self, layer: int) -> Predictor:
        """What predicts the active neurons of a layer, where the header has a rank."""
        header, (offset, size) = self.header, self.section(layer, "predictor")
        data = np.fromfile(self.path, np.uint8, size, offset=offset)
        return Predictor.unpack(torch.from_numpy(data), header.rank, header.neurons, header.hidden)

    def bundles(self, layer: int) -> Tensor:
        """The bundles of a layer as they are stored: uint8, shape (N, bytes of a bundle)."""
        offset, size = self.section(layer, "bundles")
        data = np.fromfile(self.path, np.uint8, size, offset=offset)
        return torch.from_numpy(data).view(self.header.neurons, -1)

    def bundle(self, layer: int, place: int) -> Tensor:
        """One neuron's bundle in float32, shape (R, H)."""
        offset = self.section(layer, "bundles")[0] + place * self.header.bundle_bytes
        data = np.fromfile(self.path, np.uint8, self.header.bundle_bytes, offset=offset)
        return unpack_bundles(torch.from_numpy(data)[None], self.header, torch.float32)[0]

    def chunks(self) -> Iterator[tuple[int, bytes]]:
        """The checksummed parts in order: byte offset and bytes."""
        with self.path.open("rb") as file:
            yield 0, file.read(len(self.layout.container))
            while (offset := file.tell()) < self.layout.checksums_at:
                yield offset, file.read(min(CHECKSUM_CHUNK, self.layout.checksums_at - offset))

    def verify(self) -> None:
        """Check every checksum; ValueError names the first damaged MiB."""
        expected = np.fromfile(self.path, "<u4", offset=self.layout.checksums_at)
        for crc, (offset, data) in zip(expected, self.chunks(), strict=True):
            if zlib.crc32(data) != crc:
                raise self._damaged(offset, f"the next {len(data)} bytes do not match their checksum")

    def check_weights(self, files: list[Path] | None = None) -> None:
        """Check that the weight files, by default those beside it, are those the sidecar was made with."""
        files = files or [shard.path for shard in read_shards(self.path.parent)]
        if fingerprint(files) != self.header.checkpoint:
            raise ValueError(
                f"{self.path} should lie beside the weights it was made with, but those of "
                f"{files[0].parent} differ: reorder that model again."
            )
