"""Bundles: one neuron's rows and column of its MLP's weights, encoded and stored together.

Dimension key: R rows of a bundle, N neurons, B bytes of a bundle, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ripple_loader.format.encoding import Encoding
from ripple_loader.format.layout import SidecarHeader


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
