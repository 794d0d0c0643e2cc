"""Access collapse: which byte ranges to read for a set of neurons, with reads joined over small gaps.

Dimension key: U neurons to read, Q read requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ripple_loader.sidecar import BLOCK

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class ReadPlan:
    """Reads that bring a set of neurons into a buffer, packed from its start.

    Attributes:
        places: the neurons, ascending, shape (U,).
        offsets, lengths: byte ranges of the file, whole blocks, shape (Q,).
        targets: where each range lands in the buffer, shape (Q,).
        spots: where each neuron's bundle lies in the buffer, shape (U,).
    """

    places: Places
    offsets: Places
    lengths: Places
    targets: Places
    spots: Places

    @property
    def size(self) -> int:
        """Bytes read, and of the buffer used."""
        return int(self.lengths.sum())


def plan_reads(places: Places, *, base: int, stride: int, width: int, merge_gap: int) -> ReadPlan:
    """Cover neurons by block-aligned ranges; ranges at most `merge_gap` bytes apart become one.

    Args:
        places: ascending and distinct, shape (U,), U > 0.
        base: byte offset of the bundles in the file, a whole number of blocks.
        stride, width: bytes between bundles, and of one.
        merge_gap: unneeded bytes worth reading to save a request.
    """
    starts = base + places * stride
    first = starts // BLOCK * BLOCK
    last = -(-(starts + width) // BLOCK) * BLOCK
    opens = np.append(True, first[1:] - last[:-1] > merge_gap)
    offsets = first[opens]
    lengths = last[np.append(opens[1:], True)] - offsets
    targets = np.cumsum(lengths) - lengths
    request = np.cumsum(opens) - 1
    return ReadPlan(places, offsets, lengths, targets, targets[request] + starts - offsets[request])


def waves(
    places: Places, capacity: int, *, base: int, stride: int, width: int, merge_gap: int
) -> Iterator[ReadPlan]:
    """Split the reads of `plan_reads` into plans of at most `capacity` bytes each.

    `capacity` must hold one bundle at its worst alignment: width + 2 blocks.
    """
    while len(places):
        plan = plan_reads(places, base=base, stride=stride, width=width, merge_gap=merge_gap)
        if plan.size <= capacity:
            yield plan
            return
        ends = -(-(plan.spots + width) // BLOCK) * BLOCK
        count = max(1, int(np.searchsorted(ends, capacity, side="right")))
        yield plan_reads(places[:count], base=base, stride=stride, width=width, merge_gap=merge_gap)
        places = places[count:]
