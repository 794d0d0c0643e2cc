"""Write a sidecar, layer by layer: bundles, sketch, vectors, permutation and predictor.

Dimension key: R rows of a bundle, S = R - 1 rows that select, N neurons, H hidden.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import torch
from crc32c import crc32c
from torch import Tensor

from ripple_loader.format.bundles import pack_bundles, unpack_bundles
from ripple_loader.format.checks import LayerChecks, numbers_of
from ripple_loader.format.layout import CHECKSUM_CHUNK, Array, SidecarHeader, Vectors
from ripple_loader.format.predictor import Predictor
from ripple_loader.format.sketch import sketch_rows
from ripple_loader.storage.blocks import align


class SidecarWriter:
    """Writes a sidecar front to back, a layer at a time.

    Args:
        path: the file to make.
        header: the description, which determines all sizes.
    """

    def __init__(self, path: Path, header: SidecarHeader) -> None:
        self.header, self.layout = header, header.layout()
        self._file = path.open("wb")
        self._file.write(self.layout.container)
        self._chunk, self._crc, self._remaining = [zlib.crc32(self.layout.container)], 0, CHECKSUM_CHUNK

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                if self._remaining < CHECKSUM_CHUNK:
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
        self._crcs: dict[str, int] = {}
        N, H, S = self.header.neurons, self.header.hidden, self.header.rows - 1
        bundles = pack_bundles(rows_RNH, self.header.encoding)
        self._write(bundles.numpy())
        starts = np.arange(N) * bundles.shape[1]
        numbers = numbers_of(memoryview(bundles.numpy()).cast("B"), starts, bundles.shape[1])
        # The sketch is of the decoded bundles, so that its error bound holds for the weights that compute.
        stored_NRH = unpack_bundles(bundles, self.header, torch.float32)
        sketches, scales, errors = zip(*(sketch_rows(stored_NRH[:, row]) for row in range(S)), strict=True)
        if self.header.sketches:
            self._write(np.stack(sketches), "sketch")
        bias_SN = [biases[row].float().numpy() if row in biases else np.zeros(N) for row in range(S)]
        down_bias_H = biases[S].float().numpy() if S in biases else np.zeros(H)
        vectors = Vectors(np.stack(bias_SN), down_bias_H, np.stack(scales), np.stack(errors))
        self._write(np.frombuffer(vectors.pack(), np.uint8), "vectors")
        self._write(permutation_N.astype("<i4"), "permutation")
        if self.header.rank:
            assert inputs_MH is not None
            bias_N = torch.from_numpy(bias_SN[0]).float()
            predictor = Predictor.fit(inputs_MH, stored_NRH[:, 0], bias_N, self.header.rank)
            self._write(np.frombuffer(predictor.pack(), np.uint8), "predictor")
        self._write(np.frombuffer(LayerChecks(numbers, self._crcs).pack(), np.uint8))

    def _write(self, array: Array, kind: str = "") -> None:
        """Append one section, padded to a block; its CRC-32C is noted by its kind."""
        data = np.ascontiguousarray(array).data.cast("B")
        if kind:
            self._crcs[kind] = crc32c(data)
        for part in (data, memoryview(bytes(align(len(data)) - len(data)))):
            self._file.write(part)
            while len(part):
                piece, part = part[: self._remaining], part[self._remaining :]
                self._crc = zlib.crc32(piece, self._crc)
                self._remaining -= len(piece)
                if not self._remaining:
                    self._chunk.append(self._crc)
                    self._crc, self._remaining = 0, CHECKSUM_CHUNK
