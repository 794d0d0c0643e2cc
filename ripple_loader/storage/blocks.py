"""Blocks: O_DIRECT reads whole ones, at aligned offsets, into aligned memory."""

from __future__ import annotations

import mmap

import torch

BLOCK = 4096
"""Bytes that every drive takes as a unit; sections of a sidecar start and end on it."""

SECTOR = 512
"""Bytes that many drives take as a unit."""


def align(size: int) -> int:
    """`size` rounded up to a whole number of blocks."""
    return -(-size // BLOCK) * BLOCK


class AlignedBuffer:
    """Page-aligned memory that O_DIRECT can read into, also seen as a tensor of any dtype."""

    def __init__(self, size: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, size))
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)
