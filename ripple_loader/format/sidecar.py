"""Open a sidecar, look things up in it, and check it.

Dimension key: R rows of a bundle, S = R - 1 rows that select, N neurons, H hidden.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from crc32c import crc32c
from torch import Tensor

from ripple_loader.checkpoint.shards import fingerprint, read_shards, sha256, stamp
from ripple_loader.config import check_keys
from ripple_loader.format.bundles import unpack_bundles
from ripple_loader.format.checks import SECTIONS, LayerChecks
from ripple_loader.format.layout import CHECKSUM_CHUNK, SIDECAR, VERSION, Array, SidecarHeader, Vectors
from ripple_loader.format.predictor import Predictor

HEADER_LIMIT = 100 << 20  # safetensors' own


class Sidecar:
    """A sidecar opened for looking things up; `storage.reader.Reader` reads the weights while it is used.

    Raises:
        FileNotFoundError: the directory has no sidecar.
        ValueError: the file is damaged, cut short, or of another version.
    """

    def __init__(self, directory: str | Path) -> None:
        self.path = Path(directory).absolute() / SIDECAR  # copies open it again, perhaps from elsewhere
        if not self.path.is_file():
            raise FileNotFoundError(
                f"{directory} must hold {SIDECAR}, but does not: make a streaming copy of the model with "
                f"`ripple reorder {directory} --calibration TEXT --out NEW_DIRECTORY` and load that."
            )
        self.header = self._read_header()
        self.layout, self._sizes = self.header.layout(), self.header.section_bytes()
        with self.path.open("rb") as file:
            container = file.read(len(self.layout.container))
        if container != self.layout.container:
            raise self._damaged(0, "its table of sections contradicts its description")
        if (size := self.path.stat().st_size) != self.layout.file_bytes:
            raise self._damaged(size, f"it must have {self.layout.file_bytes} bytes")

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
        return self.layout.offsets[f"layers.{layer}.{kind}"], self._sizes[kind]

    def _read(self, layer: int, kind: str) -> Array:
        """A whole section, uint8, after its checksum was checked."""
        offset, size = self.section(layer, kind)
        data = np.fromfile(self.path, np.uint8, size, offset=offset)
        if kind in SECTIONS and crc32c(data.data) != self.checks(layer).sections[kind]:
            raise self.damaged(layer, kind)
        return data

    def damaged(self, layer: int, kind: str, skip: int = 0) -> ValueError:
        """The error for a section whose bytes from `skip` on do not match their checksum."""
        offset = self.section(layer, kind)[0] + skip
        return self._damaged(offset, f"the {kind} of MLP {layer} do not match their checksum")

    def checks(self, layer: int) -> LayerChecks:
        """The checksums of a layer."""
        checks = LayerChecks.unpack(self._read(layer, "checks").tobytes())
        if checks is None:
            raise self.damaged(layer, "checks")
        return checks

    def permutation(self, layer: int) -> Array:
        """int32, shape (N,): the model's own index of the neuron at each place."""
        return self._read(layer, "permutation").view("<i4")

    def vectors(self, layer: int) -> Vectors:
        """The small numbers of a layer."""
        data = self._read(layer, "vectors")
        return Vectors.unpack(data.data, self.header.rows, self.header.neurons, self.header.hidden)

    def predictor(self, layer: int) -> Predictor:
        """A layer's predictor, of a sidecar whose header has a rank."""
        header, data = self.header, self._read(layer, "predictor")
        return Predictor.unpack(torch.from_numpy(data), header.rank, header.neurons, header.hidden)

    def bundles(self, layer: int) -> Tensor:
        """The bundles of a layer as they are stored: uint8, shape (N, bytes of a bundle)."""
        return torch.from_numpy(self._read(layer, "bundles")).view(self.header.neurons, -1)

    def bundle(self, layer: int, place: int) -> Tensor:
        """One neuron's bundle in float32, shape (R, H)."""
        skip = place * self.header.bundle_bytes
        offset = self.section(layer, "bundles")[0] + skip
        data = np.fromfile(self.path, np.uint8, self.header.bundle_bytes, offset=offset)
        if crc32c(data.data) != self.checks(layer).bundles[place]:
            raise self.damaged(layer, "bundles", skip)
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
        """Check that the sidecar belongs to the weight files, by default those beside it.

        Files with the size, time of modification and inode that were recorded are those that were written.
        One that was changed since is compared by its SHA-256; copies are compared by samples of every tensor.
        """
        files = files or [shard.path for shard in read_shards(self.path.parent)]
        stamps = {file.name: stamp(file) for file in files}
        recorded = self.header.stamps
        if stamps == recorded:
            return
        changed = [
            file
            for file in files
            if stamps[file.name] != recorded.get(file.name)
            and stamps[file.name][-1:] == recorded.get(file.name, [])[-1:]
        ]
        if (
            any(sha256(file) != self.header.files.get(file.name) for file in changed)
            or fingerprint(files) != self.header.checkpoint
        ):
            where = files[0].parent
            raise ValueError(
                f"{self.path} must lie beside the weights that it was written with, but those of "
                f"{where.readlink() if where.is_symlink() else where} differ: reorder that model again."
            )
