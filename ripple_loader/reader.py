"""Reads from the sidecar: O_DIRECT `preadv` from a pool of threads into block-aligned buffers."""

from __future__ import annotations

import errno
import mmap
import os
import warnings
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Self

import torch

from ripple_loader.access import ReadPlan
from ripple_loader.report import RippleReport
from ripple_loader.sidecar import BLOCK

SECTOR = 512
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
_LONGEST_READ = 256 << 10  # longer ranges are read by several threads


class AlignedBuffer:
    """Page-aligned memory that O_DIRECT can read into, also seen as a tensor of any dtype."""

    def __init__(self, size: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, size))
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)


class Reader:
    """Reads byte ranges of one file with several requests in flight.

    Where the file system refuses O_DIRECT it warns once, notes it in the report and reads through the page
    cache. The file and the threads are released with the object.

    Args:
        path: the file.
        threads: requests in flight.
        report: counts requests and bytes.

    Attributes:
        block: what offsets, lengths and buffer addresses have to be multiples of: 512 where the drive takes
            it, else 4096.
        direct: whether reads go past the page cache.
    """

    def __init__(self, path: Path, threads: int, report: RippleReport) -> None:
        self.path, self.report, self.threads = path, report, threads
        self._descriptor, self.block, refusal = _open_direct(path)
        self.direct = refusal is None
        if refusal is not None:
            report.fallbacks.append(
                f"{path} is read through the page cache, which the DRAM budget does not count: {refusal}"
            )
            warnings.warn(report.fallbacks[-1], stacklevel=2)
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="ripple-read")
        weakref.finalize(self, _release, self._pool, self._descriptor)

    def submit(self, plan: ReadPlan, buffer: AlignedBuffer) -> list[Future[None]]:
        """Start a plan's reads; the buffer is filled once all the results are in."""
        pieces = [
            (offset + skip, min(length - skip, _LONGEST_READ), target + skip)
            for offset, length, target in zip(
                plan.offsets.tolist(), plan.lengths.tolist(), plan.targets.tolist(), strict=True
            )
            for skip in range(0, length, _LONGEST_READ)
        ]
        self.report.requests += len(pieces)
        self.report.bytes_read += plan.size
        hands = min(self.threads, len(pieces))
        return [self._pool.submit(self._read, pieces[hand::hands], buffer) for hand in range(hands)]

    def _read(self, pieces: list[tuple[int, int, int]], buffer: AlignedBuffer) -> None:
        for offset, length, target in pieces:
            done = 0
            while done < length:
                # After a short read O_DIRECT has to go on from the start of a block.
                start = done - done % self.block if self.direct else done
                space = buffer.memory[target + start : target + length]
                try:
                    got = os.preadv(self._descriptor, [space], offset + start)
                except OSError as error:
                    raise OSError(
                        error.errno,
                        f"{self.path} cannot be read at byte {offset + start} ({error.strerror}): "
                        "check the drive, then reorder the model again",
                    ) from None
                if start + got <= done:
                    raise OSError(
                        errno.EIO,
                        f"{self.path} ends at byte {offset + done}, inside a bundle: reorder the model again",
                    )
                done = start + got


class Prefetch:
    """Runs read plans in order through two buffers: while one batch is used, the next is read.

    The first read starts at once. Leaving the context waits for what is still in flight.
    """

    def __init__(self, reader: Reader, plans: list[ReadPlan], buffers: Sequence[AlignedBuffer]) -> None:
        self._reader, self._plans, self._buffers = reader, plans, buffers
        self._started = 0
        self._reads: list[Future[None]] = []
        self._start_next()

    def _start_next(self) -> None:
        self._reads = []
        if self._started < len(self._plans):
            buffer = self._buffers[self._started % 2]
            self._reads = self._reader.submit(self._plans[self._started], buffer)
            self._started += 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()

    def wait(self) -> None:
        """Wait until nothing is in flight."""
        wait(self._reads)

    def __iter__(self) -> Iterator[tuple[ReadPlan, AlignedBuffer]]:
        """Each plan with the buffer it was read into, which holds until the next step."""
        for number, plan in enumerate(self._plans):
            for read in self._reads:
                read.result()
            self._start_next()
            yield plan, self._buffers[number % 2]


def _open_direct(path: Path) -> tuple[int, int, str | None]:
    """A descriptor, the block that reads have to keep to, and why it is not O_DIRECT where it is not."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except AttributeError:
        return os.open(path, os.O_RDONLY), BLOCK, "this system has no O_DIRECT"
    except OSError as error:
        if error.errno not in _REFUSALS:
            raise
        return os.open(path, os.O_RDONLY), BLOCK, f"its file system refuses O_DIRECT ({error.strerror})"
    for block in (SECTOR, BLOCK):
        try:
            os.preadv(descriptor, [AlignedBuffer(2 * BLOCK).memory[block : 2 * block]], block)
            return descriptor, block, None
        except OSError as error:
            if error.errno not in _REFUSALS:
                raise
            refusal = f"its file system refuses O_DIRECT ({error.strerror})"
    os.close(descriptor)
    return os.open(path, os.O_RDONLY), BLOCK, refusal


def _release(pool: ThreadPoolExecutor, descriptor: int) -> None:
    pool.shutdown(wait=False)  # this may run in one of its threads; a read in progress would hold the Reader
    os.close(descriptor)
