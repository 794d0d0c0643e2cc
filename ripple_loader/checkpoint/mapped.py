"""The MLP weights of a directory as tensors that are mapped from its weight files, not read into memory."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import torch
from torch import Tensor

from ripple_loader.checkpoint.shards import DTYPES, TensorSpot
from ripple_loader.checkpoint.source import open_source


def mapped(spot: TensorSpot) -> Tensor:
    """A tensor of a weight file whose bytes are read when they are used; writing to it changes no file."""
    start = spot.start // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
    with spot.path.open("rb") as file:
        memory = mmap.mmap(file.fileno(), spot.stop - start, access=mmap.ACCESS_COPY, offset=start)
    dtype = DTYPES[spot.dtype]
    count = (spot.stop - spot.start) // dtype.itemsize
    return torch.frombuffer(memory, dtype=dtype, count=count, offset=spot.start - start).view(spot.shape)


class StoredWeights:
    """The weights of a directory's MLPs, for saving a model that streams them.

    Args:
        directory: a model directory.

    Raises:
        FileNotFoundError: the directory or its weights are missing.
    """

    def __init__(self, directory: Path) -> None:
        self._source = open_source(directory)

    def linears(self, layer: int) -> dict[tuple[str, str], Tensor]:
        """The tensors of an MLP by linear and "weight" or "bias", as the weight files have them."""
        return {key: mapped(spot) for key, spot in self._source.mlp[layer].items()}

    def named(self, first: int, count: int) -> dict[str, Tensor]:
        """The tensors of the MLPs from `first` on by their names behind the layer's number."""
        wanted = range(first, first + count)
        behind = re.compile(rf"{self._source.architecture.layer_pattern()}\.(?P<inner>.*)")
        found = {}
        for name, pieces in self._source.pieces.items():
            if pieces[0].mlp in wanted and (match := behind.fullmatch(name)):
                found[match["inner"]] = mapped(self._source.spots[name])
        return found
