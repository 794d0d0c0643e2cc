"""Write a directory so that it appears whole or not at all."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_space(path: Path, needed: int) -> None:
    """Raise OSError when the file system that `path` is or will be on has fewer than `needed` bytes free."""
    directory = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{directory} should have {needed / 2**20:,.0f} MiB free for the output, got "
            f"{free / 2**20:,.0f} MiB: free some space or write to another disk."
        )


@contextmanager
def writing_directory(out: Path) -> Iterator[Path]:
    """Yield a hidden sibling of `out` to write into; on success sync it and rename it to `out`.

    After any error or Ctrl-C it is removed; what a killed process left behind is removed by the next call.

    Raises:
        FileExistsError: `out` exists, or another process is writing it.
    """
    partial = out.parent / f".{out.name}.partial"
    partial.mkdir(parents=True, exist_ok=True)
    lock = os.open(partial, os.O_RDONLY)
    try:
        _lock(lock, out)
        check_new(out)  # the process that held the lock may have finished it
        try:
            for path in partial.iterdir():
                path.unlink()
            yield partial
            for path in partial.iterdir():
                _sync(path)
            os.fsync(lock)
            os.rename(partial, out)
            _sync(out.parent)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(
            f"{out} should be written by one process, but another is writing it: wait for that one or choose "
            "another directory."
        ) from None


def check_new(out: Path) -> None:
    """Raise FileExistsError when there is something at `out`."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} should not exist yet, but does: remove it or choose another directory.")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
