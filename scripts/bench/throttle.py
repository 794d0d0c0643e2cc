"""Limits of the kernel on this process, by cgroups, which takes root: a slower drive or less memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")


def drive_of(path: Path) -> str:
    """Major and minor number of the whole drive that a path lies on, which is what can be limited."""
    number = os.stat(path).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    if (device / "partition").exists():
        device = device.parent
    return (device / "dev").read_text().strip()


@contextlib.contextmanager
def _group(controller: str, v1: dict[str, str], v2: dict[str, str]) -> Iterator[None]:
    """This process in a group of its own with these limits, of whichever version of cgroups the system has.

    Raises:
        OSError: neither can be written.
    """
    old = (_ROOT / controller).is_dir()
    base = _ROOT / controller if old else _ROOT
    lines = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next(path for _, names, path in lines if names == (controller if old else ""))
    parent = base / own.strip("/")
    group = parent / f"ripple-bench-{os.getpid()}"
    group.mkdir()
    try:
        for name, value in (v1 if old else v2).items():
            (group / name).write_text(value)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (parent / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()


def limited_drive(path: Path, *, iops: int, bandwidth: int) -> contextlib.AbstractContextManager[None]:
    """Hold this process to so many reads and bytes a second from the drive under `path`."""
    drive = drive_of(path)
    v1 = {
        "blkio.throttle.read_iops_device": f"{drive} {iops}",
        "blkio.throttle.read_bps_device": f"{drive} {bandwidth}",
    }
    return _group("blkio", v1, {"io.max": f"{drive} riops={iops} rbps={bandwidth}"})


def limited_memory(size: int) -> contextlib.AbstractContextManager[None]:
    """Hold this process to so many bytes more than it has, the page cache of what it reads included."""
    return _group("memory", {"memory.limit_in_bytes": str(size)}, {"memory.max": str(size)})
