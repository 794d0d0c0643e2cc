"""Triton: adding rows in place, without the atomics that torch's index_add_ needs for repeated rows.

Legend: N rows of the stream, M chosen rows, D hidden width.
"""

# mypy: disable-error-code="no-untyped-def,import-untyped,import-not-found"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

TILE_COLUMNS = 1024  # columns of a row that one program adds


@triton.jit
def _scatter_add(x, update, rows, width, sx_n, su_m, tile: tl.constexpr):
    m = tl.program_id(0).to(tl.int64)
    n = tl.load(rows + m)
    d = tl.program_id(1) * tile + tl.arange(0, tile)
    inside = d < width
    old = tl.load(x + n * sx_n + d, mask=inside, other=0.0).to(tl.float32)
    added = tl.load(update + m * su_m + d, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + n * sx_n + d, (old + added).to(x.dtype.element_ty), mask=inside)


def scatter_add_(x_ND: Tensor, update_MD: Tensor, rows_M: Tensor) -> None:
    """As `torch_rows.scatter_add_`; `rows_M` are distinct."""
    update_MD = update_MD if update_MD.stride(1) == 1 else update_MD.contiguous()
    count, width = update_MD.shape
    if update_MD.numel():
        tile = min(TILE_COLUMNS, triton.next_power_of_2(width))
        grid = (count, triton.cdiv(width, tile))
        _scatter_add[grid](x_ND, update_MD, rows_M, width, x_ND.stride(0), update_MD.stride(0), tile=tile)
