"""Limits of the kernel on what this process reads from a drive, by a cgroup: a slower drive that is real."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

_V1, _V2 = Path("/sys/fs/cgroup/blkio"), Path("/sys/fs/cgroup")
_NAME = "ripple-bench"


def drive_of(path: Path) -> str:
    """Major and minor number of the whole drive that a path lies on, which is what can be limited."""
    number = os.stat(path).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve(strict=True)
    if (device / "partition").exists():
        device = device.parent
    return (device / "dev").read_text().strip()


@contextlib.contextmanager
def limited(path: Path, *, iops: int, bandwidth: int) -> Iterator[None]:
    """Hold this process to so many reads and bytes a second from the drive under `path`.

    By blkio.throttle of cgroup v1 or io.max of v2, whichever the system has; that takes root.

    Raises:
        OSError: neither can be written.
    """
    drive = drive_of(path)
    if _V1.is_dir():
        root = _V1
        limits = {
            "blkio.throttle.read_iops_device": f"{drive} {iops}",
            "blkio.throttle.read_bps_device": f"{drive} {bandwidth}",
        }
    else:
        root, limits = _V2, {"io.max": f"{drive} riops={iops} rbps={bandwidth}"}
    group = root / _NAME
    group.mkdir(exist_ok=True)
    try:
        for name, value in limits.items():
            (group / name).write_text(value)
        (group / "cgroup.procs").write_text(str(os.getpid()))
        yield
    finally:
        (root / "cgroup.procs").write_text(str(os.getpid()))
        group.rmdir()
