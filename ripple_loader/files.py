"""Write files and directories that appear whole or not at all, and resume after the process was killed."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


def check_space(path: Path, needed: int) -> None:
    """Raise OSError when the file system that `path` is or will be on has fewer than `needed` bytes free."""
    directory = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OSError(
            f"{directory} must have {needed / 2**20:,.0f} MiB free for the output, got "
            f"{free / 2**20:,.0f} MiB: free some space or write to another disk."
        )


def cache_folder(kind: str) -> Path:
    """The folder in the user's cache for things of this kind; it need not exist."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ripple_loader" / kind


LEFTOVERS = ".*.part"
"""Matches the unfinished files that `whole_file` leaves behind when its process is killed."""


class Workspace:
    """A hidden directory that holds the stages of some work until it is done.

    Args:
        path: the directory.
    """

    OUTPUT = "output"

    def __init__(self, path: Path) -> None:
        self.path = path

    def stage(self, name: str, key: Any) -> Path:
        """The directory of a stage, with the files of an earlier run if its key was the same, else empty.

        Args:
            name: of the stage; `Workspace.OUTPUT` becomes the result.
            key: everything that the stage's content depends on, as JSON.
        """
        stage, stamp, text = self.path / name, self.path / f"{name}.json", json.dumps(key, sort_keys=True)
        if not (stage.is_dir() and stamp.is_file() and stamp.read_text() == text):
            stamp.unlink(missing_ok=True)
            shutil.rmtree(stage, ignore_errors=True)
            stage.mkdir()
            stamp.write_text(text)
        return stage


@contextmanager
def working_on(out: Path) -> Iterator[Workspace]:
    """Yield a workspace beside `out`; on success its output stage is synced and becomes `out`.

    After Ctrl-C or kill -9 the workspace stays, and the next call resumes from it. After an error the output
    stage, which may have filled the disk, is removed and the others stay.

    Raises:
        FileExistsError: `out` exists, or another process is working on it.
    """
    work = Workspace(out.parent / f".{out.name}.partial")
    work.path.mkdir(parents=True, exist_ok=True)
    lock = os.open(work.path, os.O_RDONLY)
    try:
        _lock(lock, out)
        check_new(out)  # another process may have finished while it held the lock
        try:
            yield work
            output = work.path / Workspace.OUTPUT
            for path in output.iterdir():
                sync(path)
            sync(output)
            os.rename(output, out)
            sync(out.parent)
            shutil.rmtree(work.path)
        except BaseException as error:
            if isinstance(error, Exception):
                shutil.rmtree(work.path / Workspace.OUTPUT, ignore_errors=True)
            print(f"{work.path} keeps the work so far: run again to resume, or remove it.", file=sys.stderr)
            raise
    finally:
        os.close(lock)


def _lock(descriptor: int, out: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise FileExistsError(
            f"{out} must be written by one process, but another is writing it: wait for that one or choose "
            "another directory."
        ) from None


def check_new(out: Path) -> None:
    """Raise FileExistsError when `out` exists."""
    if out.exists() or out.is_symlink():
        raise FileExistsError(f"{out} must not exist yet, but does: remove it or choose another directory.")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path; the file written there is synced and moved to `path` at the end."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    yield partial
    sync(partial)
    os.replace(partial, path)


def sync(path: Path) -> None:
    """Flush a file's or a directory's content to the drive."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
