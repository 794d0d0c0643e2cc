"""Reference of adding rows in place."""

from __future__ import annotations

from torch import Tensor


def scatter_add_(x_ND: Tensor, update_MD: Tensor, rows_M: Tensor) -> None:
    """Add `update_MD` to `x_ND` at the rows `rows_M`."""
    x_ND.index_add_(0, rows_M, update_MD.to(x_ND.dtype))
