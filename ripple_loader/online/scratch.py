"""Working memory for some neurons: scattered ones are gathered in it, and ones stored otherwise are decoded.

Dimension key: U neurons, R rows of a bundle, B its bytes, H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from ripple_loader.format.bundles import unpack_bundles
from ripple_loader.format.layout import SidecarHeader
from ripple_loader.online.budget import Allocation
from ripple_loader.online.fetching import Batch
from ripple_loader.report import RippleReport
from ripple_loader.storage.blocks import align
from ripple_loader.storage.collapse import Mask, Places

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

    def decoded(self, batch: Batch) -> Iterator[tuple[Places, Tensor, Mask | None]]:
        """The neurons of a batch, some at a time.

        Yields:
            Places, bundles in the model's dtype, shape (U, R, H), and which are wanted, None for all.
        """
        width, count = self._header.bundle_bytes, len(batch.places)
        in_order = bool((np.diff(batch.offsets) == width).all())
        as_they_lie = in_order and self._header.encoding.stores(self._dtype)
        step = count if as_they_lie else self._rows
        for start in range(0, count, step):
            part = slice(start, start + step)
            stored = self._stored(batch.memory, batch.offsets[part], in_order=in_order)
            wanted = None if batch.wanted is None else batch.wanted[part]
            yield batch.places[part], self._decode(stored), wanted

    def _stored(self, memory: Tensor, offsets: Places, *, in_order: bool) -> Tensor:
        """Bundles of some bytes, uint8, shape (U, B): where they lie, or copied if that is not in order."""
        width, first = self._header.bundle_bytes, int(offsets[0])
        if in_order:
            return memory[first : first + len(offsets) * width].view(len(offsets), width)
        everywhere = memory.as_strided((len(memory) - width + 1, width), (1, 1))
        out = self._memory[: len(offsets) * width].view(len(offsets), width)
        return torch.index_select(everywhere, 0, torch.from_numpy(offsets), out=out)

    def _decode(self, stored_UB: Tensor) -> Tensor:
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
