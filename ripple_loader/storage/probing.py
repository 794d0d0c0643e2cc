"""Measure the drive under a path: bandwidth and requests a second by read size and depth, with O_DIRECT."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np

from ripple_loader.files import check_space
from ripple_loader.report import RippleReport
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import ReadPlan
from ripple_loader.storage.drive import (
    DEFAULT,
    DOUBTFUL,
    DriveModel,
    DriveProfile,
    Measurement,
    device_of,
    profile_path,
)
from ripple_loader.storage.reader import Reader

SIZES = (4 << 10, 8 << 10, 16 << 10, 64 << 10, 256 << 10)
DEPTHS = (1, 4, 16, 32, 64)
SMALLEST_FILE = 64 << 20
_WRITTEN = 256 << 20
_BUFFER_BYTES = 8 << 20
_TIMED_ROUNDS = 3


class _Bench:
    """Times reads at random places of a file.

    Args:
        reader: of the file.
        buffer: memory that all reads go to.
    """

    def __init__(self, reader: Reader, buffer: AlignedBuffer) -> None:
        self._reader, self._buffer, self._depth = reader, buffer, reader.depth
        self._buffer.bytes.zero_()  # so that its pages exist before anything is timed
        self._random = np.random.default_rng(0)

    def reads(self, size: int, requests: int) -> float:
        """Seconds that `requests` reads of `size` bytes take."""
        blocks = self._reader.path.stat().st_size // size
        offsets = self._random.integers(0, blocks, requests) * size
        lengths = np.full(requests, size)
        targets = np.arange(requests) % (len(self._buffer.bytes) // size) * size
        plan = ReadPlan(offsets, offsets, lengths, targets, targets)
        start = time.perf_counter()
        for read in self._reader.submit(plan, self._buffer):
            read.result()
        return time.perf_counter() - start

    def measure(self, size: int, seconds: float) -> Measurement:
        """The fastest of some rounds that take about `seconds` together."""
        first = self.reads(size, 2 * self._depth) / (2 * self._depth)
        requests = int(np.clip(seconds / _TIMED_ROUNDS / first, 2 * self._depth, 4096))
        best = min(self.reads(size, requests) for _ in range(_TIMED_ROUNDS))
        return Measurement(size=size, depth=self._depth, requests=requests, seconds=best)


@contextmanager
def _probed_file(path: Path) -> Iterator[Path]:
    """A file to read: the given one, a large one of the directory, or a temporary one."""
    if path.is_file() and path.stat().st_size >= SMALLEST_FILE:
        yield path
        return
    directory = path if path.is_dir() else path.parent
    if not path.exists():
        raise FileNotFoundError(
            f"`path` must be a file or directory of the drive, but {path} does not exist."
        )
    large = [file for file in directory.iterdir() if file.is_file() and file.stat().st_size >= SMALLEST_FILE]
    if large:
        yield max(large, key=lambda file: file.stat().st_size)
        return
    check_space(directory, _WRITTEN)
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".ripple-probe-") as file:
        for _ in range(_WRITTEN >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(file.name)


def probe(path: str | Path, *, seconds: float = 3.0) -> DriveProfile:
    """Measure a drive.

    Args:
        path: a file or directory on it; a directory without a file of 64 MiB gets a temporary one of 256 MiB.
        seconds: about how long the reads take.

    Raises:
        ValueError: `seconds` is not positive.
        FileNotFoundError: the path does not exist.
        OSError: the drive has no room for the file, or cannot be read.
    """
    if not 0 < seconds < 3600:
        raise ValueError(f"`seconds` must be positive and at most an hour, got {seconds!r}.")
    with _probed_file(Path(path)) as file:
        share = seconds / (len(SIZES) * len(DEPTHS))
        measurements, direct, buffer = [], True, AlignedBuffer(_BUFFER_BYTES)
        for depth in DEPTHS:
            reader = Reader(file, depth, RippleReport(directory="", layers=1, neurons=1, budget=0))
            direct, bench = reader.direct, _Bench(reader, buffer)
            measurements += [bench.measure(size, share) for size in SIZES]
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        return DriveProfile(device=device_of(file), date=now, direct=direct, measurements=measurements)


def describe(profile: DriveProfile) -> None:
    """Print the measurements beside the predictions of the fitted models."""
    from rich.console import Console
    from rich.table import Table

    how = "O_DIRECT" if profile.direct else "through the page cache"
    caption = "MB/s as measured (and by the fit for the depth)"
    table = Table(title=f"Drive {profile.device}, {how}", caption=caption)
    table.add_column("KiB a read", justify="right")
    models = {depth: profile.at(depth) for depth in profile.depths}
    for depth in models:
        table.add_column(f"{depth} in flight", justify="right")
    timed = {(m.size, m.depth): m for m in profile.measurements}
    for size in sorted({m.size for m in profile.measurements}):
        cells = []
        for depth, model in models.items():
            m = timed[size, depth]
            measured, fitted = (
                m.requests * size / seconds / 1e6
                for seconds in (m.seconds, model.seconds(m.requests, m.requests * size))
            )
            cells.append(f"{measured:,.0f} ({fitted:,.0f})")
        table.add_row(f"{size >> 10}", *cells)
    table.add_section()
    table.add_row("requests/s", *(f"{1 / model.request_seconds:,.0f}" for model in models.values()))
    table.add_row("MB/s", *(f"{1e-6 / model.byte_seconds:,.0f}" for model in models.values()))
    table.add_row("p", *(f"{model.norm:g}" for model in models.values()))
    table.add_row("fit error", *(f"{model.error:.0%}" for model in models.values()))
    Console().print(table)
    doubtful = [f"{depth} in flight ({model.error:.0%})" for depth, model in models.items() if model.doubtful]
    if doubtful:
        print(
            f"the fit is off by more than {DOUBTFUL:.0%} with {', '.join(doubtful)}: other work may have "
            "used the drive; probe again when it is idle, for longer with `--seconds 10`.",
            file=sys.stderr,
        )


def known_drive(reader: Reader) -> DriveModel:
    """The model of a sidecar's drive: as probed, else a common drive's, which its reads correct.

    Args:
        reader: of the sidecar; a probe that cannot be read is noted in its report.
    """
    kept = profile_path(device_of(reader.path))
    if kept.exists():
        try:
            return DriveProfile.load(kept).at(reader.depth)
        except (ValueError, OSError) as error:
            reader.report.fall_back(f"{error}; it is ignored: run `ripple probe` again")
    return replace(DEFAULT, depth=reader.depth)
