"""Working memory for some neurons: scattered ones are gathered in it, and ones stored otherwise are decoded.

Dimension key: U neurons, R rows of a bundle, B its bytes, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ripple_loader.format.bundles import unpack_bundles
from ripple_loader.format.layout import SidecarHeader
from ripple_loader.online.budget import Allocation
from ripple_loader.online.cache import Slots
from ripple_loader.report import RippleReport
from ripple_loader.storage.blocks import align

_ROWS_DECODED_AT_ONCE = 64  # int4 takes memory beyond the budget for them


def staging(size: int, report: RippleReport) -> Tensor:
    """Memory for gathered neurons, uint8: pinned where there is a GPU, which then reads it directly."""
    if torch.cuda.is_available():
        try:
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        except RuntimeError as error:  # such as a limit on locked memory
            reason = str(error).partition("\n")[0]
            report.fall_back(f"neurons are copied to the GPU from pageable memory: {reason}")
    return torch.empty(size, dtype=torch.uint8)


class Scratch:
    """Copies neurons into working memory; each copy holds until the next.

    Args:
        header: of the sidecar that the neurons come from.
        allocation: how large it is: [gathered bundles | decoded rows].
        dtype: the model's, to which bundles are decoded.
        report: records if the memory cannot be pinned.
    """

    def __init__(
        self, header: SidecarHeader, allocation: Allocation, dtype: torch.dtype, report: RippleReport
    ) -> None:
        self._header, self._rows, self._dtype = header, allocation.rows, dtype
        self._memory = staging(allocation.scratch, report)

    def rows_at_once(self, count: int, *, copied: bool) -> int:
        """How many of `count` neurons to hand out at once: all, if no copy is needed."""
        if copied or not self._header.encoding.stores(self._dtype):
            return self._rows
        return max(1, count)

    def gather(self, rows: Tensor, index: Slots) -> Tensor:
        """A copy of the indexed rows, uint8."""
        out = self._memory[: len(index) * rows.shape[1]].view(len(index), -1)
        return torch.index_select(rows, 0, torch.from_numpy(index), out=out)

    def decode(self, stored_UB: Tensor) -> Tensor:
        """Bundles in the model's dtype, shape (U, R, H): a view, where they are stored so."""
        header, dtype = self._header, self._dtype
        if header.encoding.stores(dtype):
            return unpack_bundles(stored_UB, header, dtype)
        skip = align(self._rows * header.bundle_bytes)
        size = len(stored_UB) * header.rows * header.hidden
        rows = self._memory[skip : skip + size * dtype.itemsize].view(dtype)
        rows = rows.view(len(stored_UB), header.rows, header.hidden)
        parts = stored_UB.split(_ROWS_DECODED_AT_ONCE), rows.split(_ROWS_DECODED_AT_ONCE)
        for part, out in zip(*parts, strict=True):
            unpack_bundles(part, header, dtype, out)
        return rows
