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
_PLANS_AT_ONCE = 2  # the last reads of one plan leave the drive idle; those of the next fill it
_MOST_THREADS = 16  # without asynchronous reads: more of them spend their time on each other


class _Busy:
    """How long the drive takes for plans whose reads overlap, counted together.

    A plan has no time of its own while another's reads are in flight: they share the drive, and the last to
    end would seem to have taken none.
    """

    ENOUGH = 2  # times as many as are in flight, which at the end are about as far as others at the start

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
        """They are done; returns requests, bytes and seconds of all since the last time it did, or None."""
        with self._lock:
            self._running -= 1
            self._ended += 1
            self._requests += requests
            self._size += size
            if self._ended < self.ENOUGH * self._running:
                return None
            now = time.perf_counter()
            found = self._requests, self._size, now - self._since
            self._since, self._ended, self._requests, self._size = now, 0, 0, 0
            return found


class _Parts:
    """Counts the parts of one plan's reads, which several threads do; of `requests`, `size` bytes in all."""

    def __init__(self, parts: int, requests: int, size: int) -> None:
        self.requests, self.size = requests, size
        self._lock, self._waiting, self._left = Lock(), parts, parts

    def first(self) -> bool:
        """Whether the part that starts is the first to do so."""
        with self._lock:
            self._waiting, before = 0, self._waiting
            return before > 0

    def last(self) -> bool:
        """Whether the part that ends is the last to do so."""
        with self._lock:
            self._left -= 1
            return not self._left


class Reader:
    """Reads byte ranges of one file with several requests in flight.

    Where the file system refuses O_DIRECT, or the kernel asynchronous reads, it warns once, notes it in the
    report and goes on through the page cache or with a thread for each request. The file and the threads are
    released with the object.

    Args:
        path: the file.
        depth: requests in flight.
        report: counts requests and bytes.
        engine: what does the reads, see `RippleConfig.io_engine`.

    Attributes:
        block: what offsets, lengths and buffer addresses have to be multiples of: 512 where the drive takes
            it, else 4096.
        direct: whether reads go past the page cache.
        engine: "aio" or "threads".
        meter: told how long reads take, if it is set.
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
        self._finalizer = weakref.finalize(self, _release, self._pool, self._queues, self._descriptor)

    def restart(self) -> None:
        """Wait for all reads that were submitted, even by a call that was interrupted, and start anew."""
        self._finalizer.detach()
        self._pool.shutdown()
        self._start_threads()

    def _fall_back(self, what: str) -> None:
        self.report.fall_back(f"{self.path} {what}", stacklevel=3)

    def _open_queues(self, engine: IOEngine) -> deque[AsyncReads]:
        """The kernel's queues for asynchronous reads; none where threads do them."""
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
            found = self._busy.end(parts.requests, parts.size) if parts.last() else None
        if found and self.meter is not None:
            self.meter.observe(*found)

    def _read_pieces(self, offsets: Array, lengths: Array, targets: Array, buffer: AlignedBuffer) -> None:
        left = np.arange(len(offsets))
        if self.engine == "aio":
            queue = self._queues.popleft()
            try:
                results = queue.read(offsets, lengths, buffer.bytes.data_ptr() + targets)
            finally:
                self._queues.append(queue)
            left = np.flatnonzero(
                results != lengths
            )  # short or failed: read again, for the drive's own error
        for piece in left.tolist():
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


def _release(pool: ThreadPoolExecutor, queues: deque[AsyncReads], descriptor: int) -> None:
    pool.shutdown(wait=False)  # this may run in one of its threads; a read in progress would hold the Reader
    for queue in queues:
        queue.close()
    os.close(descriptor)
