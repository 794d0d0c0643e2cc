"""Access collapse: which byte ranges to read for a set of neurons, with reads joined over small gaps.

Dimension key: U neurons to read, Q read requests.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

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


def plan_reads(places: Places, *, base: int, width: int, block: int, merge_gap: int) -> ReadPlan:
    """Cover neurons by block-aligned ranges; ranges at most `merge_gap` bytes apart become one.

    Args:
        places: ascending and distinct, shape (U,), U > 0.
        base: byte offset of the bundles in the file, a whole number of blocks.
        width: bytes of a bundle.
        block: what offsets and lengths of reads have to be multiples of.
        merge_gap: unneeded bytes worth reading to save a request.
    """
    starts = base + places * width
    first = starts // block * block
    last = -(-(starts + width) // block) * block
    opens = np.append(True, first[1:] - last[:-1] > merge_gap)
    offsets = first[opens]
    lengths = last[np.append(opens[1:], True)] - offsets
    targets = np.cumsum(lengths) - lengths
    request = np.cumsum(opens) - 1
    return ReadPlan(places, offsets, lengths, targets, targets[request] + starts - offsets[request])


def waves(
    places: Places, capacity: int, *, base: int, width: int, block: int, merge_gap: int
) -> Iterator[ReadPlan]:
    """Split the reads of `plan_reads` into plans of at most `capacity` bytes each.

    `capacity` must hold one bundle at its worst alignment: width + 2 blocks.
    """
    while len(places):
        plan = plan_reads(places, base=base, width=width, block=block, merge_gap=merge_gap)
        if plan.size <= capacity:
            yield plan
            return
        ends = -(-(plan.spots + width) // block) * block
        count = max(1, int(np.searchsorted(ends, capacity, side="right")))
        yield plan_reads(places[:count], base=base, width=width, block=block, merge_gap=merge_gap)
        places = places[count:]
