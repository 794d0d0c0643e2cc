"""Reads of one file with O_DIRECT, many in flight, into block-aligned buffers."""

from __future__ import annotations

import errno
import os
import time
import weakref
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import numpy.typing as npt

from ripple_loader.config import IOEngine
from ripple_loader.report import RippleReport
from ripple_loader.storage.aio import AsyncReads
from ripple_loader.storage.blocks import BLOCK, SECTOR, AlignedBuffer
from ripple_loader.storage.collapse import ReadPlan
from ripple_loader.storage.meter import Meter

Array = npt.NDArray[Any]
_REFUSALS = (errno.EINVAL, errno.EOPNOTSUPP)
LONGEST_READ = 256 << 10  # longer ranges are read in pieces, at once
_PLANS_AT_ONCE = 2  # the next plan's reads keep the drive busy during the last ones of a plan
_MOST_THREADS = 16  # without asynchronous reads; more threads mostly contend with each other


class _Busy:
    """How long the drive takes for plans whose reads overlap, counted together.

    While the reads of two plans are in flight they share the drive, so that no plan has a time of its own.
    """

    ENOUGH = 2  # wait for twice the plans in flight, so that partial work at both ends cancels out

    def __init__(self) -> None:
        self._lock = Lock()
        self._since, self._running, self._ended, self._requests, self._size = 0.0, 0, 0, 0, 0

    def begin(self) -> None:
        """A plan's reads are about to start."""
        with self._lock:
            if not self._running:
                self._since, self._ended, self._requests, self._size = time.perf_counter(), 0, 0, 0
            self._running += 1

    def end(self, requests: int, size: int) -> tuple[int, int, float] | None:
        """A plan's reads are done; returns requests, bytes and seconds of all plans once there are enough."""
        with self._lock:
            self._running -= 1
            self._ended += 1
            self._requests += requests
            self._size += size
            if self._ended < self.ENOUGH * self._running:
                return None
            now = time.perf_counter()
            total = self._requests, self._size, now - self._since
            self._since, self._ended, self._requests, self._size = now, 0, 0, 0
            return total


class _Parts:
    """Counts the parts of one plan's reads, `requests` of `size` bytes in all, over several threads."""

    def __init__(self, parts: int, requests: int, size: int) -> None:
        self.requests, self.size = requests, size
        self._lock, self._waiting, self._unfinished = Lock(), parts, parts

    def first(self) -> bool:
        """Whether the part that starts is the first to do so."""
        with self._lock:
            self._waiting, before = 0, self._waiting
            return before > 0

    def last(self) -> bool:
        """Whether the part that ends is the last to do so."""
        with self._lock:
            self._unfinished -= 1
            return not self._unfinished


class Reader:
    """Reads byte ranges of one file with several requests in flight.

    If the file system refuses O_DIRECT, or the kernel asynchronous reads, it warns once, notes it in the
    report, and reads through the page cache or with a thread for each request. The file and the threads are
    released with the object.

    Args:
        path: the file.
        depth: requests in flight.
        report: counts requests and bytes.
        engine: how reads are submitted, see `RippleConfig.io_engine`.

    Attributes:
        block: offsets, lengths and buffer addresses must be multiples of it: 512 if the drive takes that,
            else 4096.
        direct: whether reads bypass the page cache.
        engine: "aio" or "threads".
        meter: observes how long reads take, if it is set.
    """

    def __init__(self, path: Path, depth: int, report: RippleReport, engine: IOEngine = "auto") -> None:
        self.path, self.report, self.depth = path, report, depth
        self.meter: Meter | None = None
        self._busy = _Busy()
        self._descriptor, self.block, refusal = _open_direct(path)
        self.direct = refusal is None
        if refusal is not None:
            self._fall_back(
                f"is read through the page cache, which the DRAM budget does not count: {refusal}"
            )
        self._queues = self._open_queues(engine)
        self.engine: IOEngine = "aio" if self._queues else "threads"
        self._threads = len(self._queues) or min(depth, _MOST_THREADS)
        self._start_threads()

    def _start_threads(self) -> None:
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="ripple-read")
        self._finalizer = weakref.finalize(
            self, _release, self._pool, self._queues, self._descriptor, os.getpid()
        )

    def restart(self) -> None:
        """Wait for all submitted reads, even those of an interrupted call, and start new threads."""
        self._finalizer.detach()
        self._pool.shutdown()
        self._start_threads()

    def _fall_back(self, what: str) -> None:
        self.report.fall_back(f"{self.path} {what}", stacklevel=3)

    def _open_queues(self, engine: IOEngine) -> deque[AsyncReads]:
        """The kernel's queues for asynchronous reads; an empty list if threads read."""
        queues: deque[AsyncReads] = deque()
        if engine == "threads" or not self.direct:
            return queues
        try:
            while len(queues) < _PLANS_AT_ONCE:
                queues.append(AsyncReads(self._descriptor, self.depth))
        except OSError as error:
            while queues:
                queues.pop().close()
            self._fall_back(f"is read by threads: the kernel refuses asynchronous reads ({error.strerror})")
        return queues

    def submit(self, plan: ReadPlan, buffer: AlignedBuffer) -> list[Future[None]]:
        """Start a plan's reads; the buffer is filled once all the results are in."""
        counts = -(-plan.lengths // LONGEST_READ)
        skips = (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)) * LONGEST_READ
        offsets, targets = np.repeat(plan.offsets, counts) + skips, np.repeat(plan.targets, counts) + skips
        lengths = np.minimum(np.repeat(plan.lengths, counts) - skips, LONGEST_READ)
        self.report.requests += len(offsets)
        self.report.bytes_read += plan.size
        parts = 1 if self.engine == "aio" else min(self._threads, len(offsets))
        pieces = [(offsets[part::parts], lengths[part::parts], targets[part::parts]) for part in range(parts)]
        whole = _Parts(parts, len(offsets), plan.size)
        return [self._pool.submit(self._read, whole, *piece, buffer) for piece in pieces]

    def _read(
        self, parts: _Parts, offsets: Array, lengths: Array, targets: Array, buffer: AlignedBuffer
    ) -> None:
        """Read a part of a plan, in a thread of the pool; after the last, tell the meter how long it took."""
        if parts.first():
            self._busy.begin()
        try:
            self._read_pieces(offsets, lengths, targets, buffer)
        finally:
            total = self._busy.end(parts.requests, parts.size) if parts.last() else None
        if total and self.meter is not None:
            self.meter.observe(*total)

    def _read_pieces(self, offsets: Array, lengths: Array, targets: Array, buffer: AlignedBuffer) -> None:
        unread = np.arange(len(offsets))
        if self.engine == "aio":
            queue = self._queues.popleft()
            try:
                results = queue.read(offsets, lengths, buffer.bytes.data_ptr() + targets)
            finally:
                self._queues.append(queue)
            # Read short or failed pieces again, to get the drive's own error.
            unread = np.flatnonzero(results != lengths)
        for piece in unread.tolist():
            self._read_piece(int(offsets[piece]), int(lengths[piece]), int(targets[piece]), buffer)

    def _read_piece(self, offset: int, length: int, target: int, buffer: AlignedBuffer) -> None:
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


def _open_direct(path: Path) -> tuple[int, int, str | None]:
    """A descriptor, the block size of its reads, and the reason if it is not O_DIRECT."""
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


def _release(pool: ThreadPoolExecutor, queues: deque[AsyncReads], descriptor: int, owner: int) -> None:
    if os.getpid() != owner:  # a forked child has a descriptor of its own, but neither threads nor queues
        os.close(descriptor)
        return
    pool.shutdown(wait=False)  # this may run in one of its own threads
    for queue in queues:
        queue.close()
    os.close(descriptor)
