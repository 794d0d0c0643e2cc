"""Access collapse: the byte ranges to read for a set of neurons, with reads joined over gaps where that pays.

Reading a gap saves a request and costs its bytes. A drive's seconds grow with the number of requests and with
their bytes (`drive.DriveModel`). Among all ways to leave k gaps unread, leaving the k widest reads the fewest
bytes; so for any cost that grows with both, some number of the narrowest gaps is the best set to read. There
are as many candidates as gaps, and all are priced at once: no search over subsets, no fixed threshold.

Dimension key: U neurons to read, G gaps between their ranges, Q read requests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ripple_loader.storage.drive import DriveModel

Places = npt.NDArray[np.int64]
"""Neurons of one MLP by their place, which is their number in the order on the drive, from 0 on."""

Bytes = npt.NDArray[np.int64]
"""Byte offsets or lengths."""

Mask = npt.NDArray[np.bool_]
Collapse = Callable[[Bytes, int], Mask]
"""Chooses the gaps to read: from their widths in bytes, shape (G,), and the bytes that have to be read."""


@dataclass(frozen=True)
class ReadPlan:
    """Reads that bring a set of neurons into a buffer, packed from its start.

    Attributes:
        places: the neurons, ascending, shape (U,).
        offsets, lengths: byte ranges of the file, whole blocks, shape (Q,).
        targets: the offset of each range in the buffer, shape (Q,).
        spots: the offset of each neuron's bundle in the buffer, shape (U,).
    """

    places: Places
    offsets: Bytes
    lengths: Bytes
    targets: Bytes
    spots: Bytes

    @property
    def size(self) -> int:
        """Bytes that are read, which is also how much of the buffer is used."""
        return int(self.lengths.sum())


def fixed_gap(most: int) -> Collapse:
    """Read all gaps of at most `most` bytes, whatever the drive."""
    return lambda widths_G, size: widths_G <= most


def cheapest(model: DriveModel, *, computing: tuple[float, float] = (0.0, 0.0)) -> Collapse:
    """Read the gaps for which reading, and computing at the same time, takes least.

    Args:
        model: the cost of reads.
        computing: seconds to compute with the neurons if they are gathered from several reads, and if one
            long read brings them in order, with all gaps among them. Reads and computing overlap, so that
            the longer of the two counts.
    """

    def choose(widths_G: Bytes, size: int) -> Mask:
        count = len(widths_G)
        order_G = np.argsort(widths_G, kind="stable")
        sizes = size + np.append(0, np.cumsum(widths_G[order_G]))
        seconds = model.seconds(np.arange(count + 1, 0, -1), sizes)
        if any(computing):
            computed = np.append(np.full(count, computing[0]), computing[1])
            seconds = np.maximum(seconds, computed)
        least = int(np.searchsorted(widths_G[order_G], 0, side="right"))  # touching or sharing a block
        best = least + int(np.argmin(seconds[least:]))
        closed_G = np.zeros(count, bool)
        closed_G[order_G[:best]] = True
        return closed_G

    return choose


def _ranges(places: Places, base: int, width: int, block: int) -> tuple[Bytes, Bytes]:
    """The first byte of each neuron's blocks, and the byte behind the last."""
    starts = base + places * width
    return starts // block * block, -(-(starts + width) // block) * block


def _plan(places: Places, closed: Mask, *, base: int, width: int, block: int) -> ReadPlan:
    first, last = _ranges(places, base, width, block)
    opens = np.append(True, ~closed)
    offsets = first[opens]
    lengths = last[np.append(opens[1:], True)] - offsets
    targets = np.cumsum(lengths) - lengths
    request = np.cumsum(opens) - 1
    spots = targets[request] + base + places * width - offsets[request]
    return ReadPlan(places, offsets, lengths, targets, spots)


def plan_reads(places: Places, *, base: int, width: int, block: int, collapse: Collapse) -> ReadPlan:
    """Cover neurons by block-aligned ranges; those that touch, and those that `collapse` says, become one.

    Args:
        places: ascending and distinct, shape (U,), U > 0.
        base: byte offset of the bundles in the file, a whole number of blocks.
        width: bytes of a bundle.
        block: offsets and lengths of reads are multiples of it.
        collapse: chooses the gaps to read.
    """
    closed = _closed(places, collapse, base, width, block)
    return _plan(places, closed, base=base, width=width, block=block)


def _closed(places: Places, collapse: Collapse, base: int, width: int, block: int) -> Mask:
    first, last = _ranges(places, base, width, block)
    widths_G = first[1:] - last[:-1]
    return collapse(widths_G, int((last - first).sum())) | (widths_G <= 0)


def waves(
    places: Places, capacity: int, *, base: int, width: int, block: int, collapse: Collapse
) -> Iterator[ReadPlan]:
    """Split the reads of `plan_reads` into plans of at most `capacity` bytes each.

    `capacity` must hold one bundle wherever it starts: width + 1 block, in whole blocks.
    """
    if not len(places):
        return
    section: dict[str, Any] = {"base": base, "width": width, "block": block}
    closed = _closed(places, collapse, **section)
    while True:
        plan = _plan(places, closed, **section)
        if plan.size <= capacity:
            yield plan
            return
        ends = -(-(plan.spots + width) // block) * block
        count = max(1, int(np.searchsorted(ends, capacity, side="right")))
        yield _plan(places[:count], closed[: count - 1], **section)
        places, closed = places[count:], closed[count:]
