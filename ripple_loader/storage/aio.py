"""Linux's native asynchronous reads (`io_submit`): many requests in one system call, without a thread each.

The requests are rows of a numpy array, so that no Python runs per request and the GIL is free while the drive
works. The kernel's interface, from `linux/aio_abi.h`, has no wrapper in libc; it needs O_DIRECT, or
`io_submit` blocks until the data is there.

Dimension key: Q requests.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import sys
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_SETUP, _DESTROY, _SUBMIT, _GETEVENTS = range(4)
_NUMBERS = {"x86_64": (206, 207, 209, 208), "aarch64": (0, 1, 2, 4), "riscv64": (0, 1, 2, 4)}
_REQUEST = np.dtype(
    {
        "names": ["data", "descriptor", "address", "length", "offset"],
        "formats": ["<u8", "<u4", "<u8", "<u8", "<i8"],
        "offsets": [0, 20, 24, 32, 40],
        "itemsize": 64,  # the rest is zero: IOCB_CMD_PREAD, no flags, no priority
    }
)
_EVENT = np.dtype([("data", "<u8"), ("request", "<u8"), ("result", "<i8"), ("more", "<i8")])


class AsyncReads:
    """Reads of one file with a number of requests in flight; used by one thread at a time.

    Args:
        descriptor: of a file opened with O_DIRECT.
        depth: requests in flight.

    Raises:
        OSError: the kernel offers no asynchronous reads here.
    """

    def __init__(self, descriptor: int, depth: int) -> None:
        self.depth, self._descriptor = depth, descriptor
        self._context = ctypes.c_ulong(0)
        self._numbers = _NUMBERS.get(platform.machine())
        if not sys.platform.startswith("linux") or sys.byteorder != "little" or self._numbers is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long
        self._events = np.zeros(depth, _EVENT)
        if (failed := -self._call(_SETUP, depth, ctypes.byref(self._context))) > 0:
            raise OSError(failed, os.strerror(failed))

    def _call(self, which: int, *arguments: Any) -> int:
        """A system call; its result, or the negative error number."""
        assert self._numbers is not None
        longs = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
        result: int = self._libc.syscall(ctypes.c_long(self._numbers[which]), *longs)
        return -ctypes.get_errno() if result < 0 else result

    def read(self, offsets: Array, lengths: Array, addresses: Array) -> Array:
        """Do some reads.

        Args:
            offsets, lengths: byte ranges of the file, aligned as O_DIRECT wants them, shape (Q,).
            addresses: the address in memory of each, shape (Q,).

        Returns:
            Bytes read of each, or a negative error number, int64, shape (Q,).
        """
        count = len(offsets)
        requests = np.zeros(count, _REQUEST)
        requests["data"], requests["descriptor"] = np.arange(count), self._descriptor
        requests["address"], requests["length"], requests["offset"] = addresses, lengths, offsets
        pointers = requests.ctypes.data + _REQUEST.itemsize * np.arange(count, dtype=np.uint64)
        results = np.zeros(count, np.int64)
        started = in_flight = 0
        while started < count or in_flight:
            space = min(self.depth - in_flight, count - started)
            if space:
                got = self._call(
                    _SUBMIT, self._context, space, ctypes.c_void_p(pointers.ctypes.data + 8 * started)
                )
                if got >= 0:
                    started, in_flight = started + got, in_flight + got
                elif not (got == -errno.EAGAIN and in_flight):  # the queue is full until some are done
                    results[started], started = got, started + 1
                    continue
            # Wait for half of the queue, to refill it at once, and at the end for all of it.
            least = in_flight if started == count else max(1, in_flight // 2)
            got = self._call(
                _GETEVENTS, self._context, least, self.depth, ctypes.c_void_p(self._events.ctypes.data), None
            )
            if got == -errno.EINTR:
                continue
            assert got > 0, os.strerror(-got)
            done = self._events[:got]
            results[done["data"].astype(np.int64)] = done["result"]
            in_flight -= got
        return results

    def close(self) -> None:
        """Release the kernel's queue."""
        self._call(_DESTROY, self._context)
