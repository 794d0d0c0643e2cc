"""Products of a few tokens with neurons, straight from their stored bytes.

Dimension key: T tokens, U neurons, S rows of a bundle that select, H hidden.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ripple_loader.kernels.compiling import library

MOST_TOKENS = 8
"""That one pass over the bytes serves."""

_CODES = {"F32": 0, "BF16": 1, "F16": 2, "I8": 3, "I4": 4}
_SMALL = 1 << 18  # bytes of weights for which starting threads takes longer than they save

_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True  # the threads of OpenMP stay with the parent, and its child would wait for them for ever


os.register_at_fork(after_in_child=_after_fork)


@dataclass(frozen=True)
class StoredProducts:
    """Products with the neurons of one sidecar.

    Attributes:
        encoding: the name that sidecars have for the encoding of the rows.
        row_bytes: of a row.
        hidden: weights of a row.
        selecting: S, the rows of a bundle before its last.
    """

    encoding: str
    row_bytes: int
    hidden: int
    selecting: int

    def project(self, memory: Tensor, offsets: np.ndarray[Any, Any], x_TH: Tensor) -> Tensor:
        """The rows that select, times some inputs: float32, shape (S, T, U).

        Args:
            memory: where the bundles lie, uint8, flat.
            offsets: the byte at which each bundle begins, int64, shape (U,).
            x_TH: any number of tokens, float32, contiguous; every `MOST_TOKENS` take a pass.
        """
        parts = []
        for part_TH in x_TH.split(MOST_TOKENS):
            shape = self.selecting, len(part_TH), len(offsets)
            parts.append(torch.empty(shape, dtype=torch.float32, device="cpu"))
            sizes = self.selecting, self.row_bytes, self.hidden, len(part_TH)
            self._run("ripple_project", memory, offsets, sizes, part_TH, parts[-1])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def accumulate(self, memory: Tensor, offsets: np.ndarray[Any, Any], a_TU: Tensor, y_TH: Tensor) -> None:
        """Add neurons times their last rows to `y_TH`; both float32, contiguous. See `project`."""
        for part_TU, part_TH in zip(a_TU.split(MOST_TOKENS), y_TH.split(MOST_TOKENS), strict=True):
            sizes = self.selecting * self.row_bytes, self.hidden, len(part_TU)
            self._run("ripple_accumulate", memory, offsets, sizes, part_TU, part_TH)

    def _run(
        self, name: str, memory: Tensor, offsets: np.ndarray[Any, Any], sizes: tuple[int, ...], *both: Tensor
    ) -> None:
        width = (self.selecting + 1) * self.row_bytes
        if len(offsets) and not (offsets.min() >= 0 and offsets.max() + width <= memory.numel()):
            raise IndexError(f"bundles must lie within {memory.numel()} bytes")
        for tensor in both:
            if tensor.dtype != torch.float32 or not tensor.is_contiguous():
                raise ValueError(f"tensors must be contiguous and float32, got {tensor.dtype}")
        offsets = np.ascontiguousarray(offsets, np.int64)
        threads = 1 if _forked or len(offsets) * width < _SMALL else torch.get_num_threads()
        function: Callable[..., int] = getattr(library(), name)
        failed = function(
            ctypes.c_int64(_CODES[self.encoding]),
            ctypes.c_void_p(memory.data_ptr()),
            ctypes.c_void_p(offsets.ctypes.data),
            ctypes.c_int64(len(offsets)),
            *map(ctypes.c_int64, sizes),
            *(ctypes.c_void_p(tensor.data_ptr()) for tensor in both),
            ctypes.c_int(threads),
        )
        if failed:
            raise MemoryError("no memory for a copy of the inputs")


def stored_products(encoding: str, row_bytes: int, hidden: int, selecting: int) -> StoredProducts | None:
    """Products with bundles, or None for an encoding that is registered from outside.

    Raises:
        OSError: they cannot be compiled here.
    """
    if encoding not in _CODES:
        return None
    library()
    return StoredProducts(encoding, row_bytes, hidden, selecting)
