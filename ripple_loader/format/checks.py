"""CRC-32C of everything that is read from a sidecar, checked as it is read.

Every layer has a section with one number for each bundle, one for each of its other sections, and a last one
of these numbers. CRC-32C has an instruction of its own on x86-64 and ARM, so that it costs a small part of
the read.

Dimension key: N neurons, U of them read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from crc32c import crc32c

Numbers = npt.NDArray[np.uint32]
SECTIONS = ("sketch", "vectors", "permutation", "predictor")
"""The sections of a layer that are checked as a whole, in the order of their numbers."""


def numbers_of(memory: memoryview, spots: npt.NDArray[np.integer], width: int) -> Numbers:
    """The CRC-32C of each stretch of `width` bytes that begins at one of some spots, shape (U,)."""
    return np.array([crc32c(memory[spot : spot + width]) for spot in spots.tolist()], np.uint32)


@dataclass(frozen=True)
class LayerChecks:
    """The numbers of one layer.

    Attributes:
        bundles: of each bundle in placement order, uint32, shape (N,).
        sections: of each of `SECTIONS`; 0 for a section that the sidecar lacks.
    """

    bundles: Numbers
    sections: dict[str, int]

    @staticmethod
    def size(neurons: int) -> int:
        """Bytes of a packed object."""
        return 4 * (neurons + len(SECTIONS) + 1)

    def pack(self) -> bytes:
        """All numbers and the CRC-32C of these."""
        others = [self.sections.get(kind, 0) for kind in SECTIONS]
        data = np.concatenate([self.bundles, np.array(others, np.uint32)]).astype("<u4").tobytes()
        return data + np.array([crc32c(data)], "<u4").tobytes()

    @classmethod
    def unpack(cls, data: bytes) -> Self | None:
        """The numbers of a packed object; None if it is damaged."""
        if crc32c(data[:-4]) != int.from_bytes(data[-4:], "little"):
            return None
        whole = np.frombuffer(data[:-4], "<u4")
        others = whole[-len(SECTIONS) :].tolist()
        return cls(whole[: -len(SECTIONS)], dict(zip(SECTIONS, others, strict=True)))
