"""How near the reading engine comes to fio: reads a second and MB/s at equal size and depth.

    python scripts/bench/ripple_engine.py [--file FILE] [--rounds 5] [--seconds 0.4]

Every contender reads random places of one file with O_DIRECT, in turn. fio runs with libaio, one job of that
depth, and with psync, a thread for each read in flight. Where fio is not installed its rows are missing, and
a bare loop around preadv, one read after the other, is all there is to compare with.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import Table  # also makes `assets` importable

from ripple_loader import RippleReport
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import ReadPlan
from ripple_loader.storage.reader import Reader

CASES = ((4, 1), (4, 16), (4, 32), (16, 16), (64, 16), (256, 4), (256, 16))  # KiB a read, in flight
BUFFER = 16 << 20


def fio(engine: str, file: Path, size: int, depth: int, seconds: float) -> float:
    """Reads a second."""
    flight = [f"--iodepth={depth}"] if engine == "libaio" else [f"--numjobs={depth}", "--thread"]
    command = [
        "fio", "--name=x", f"--filename={file}", "--readonly", "--direct=1", "--rw=randread", f"--bs={size}",
        f"--ioengine={engine}", *flight, f"--runtime={seconds * 1000:.0f}ms", "--time_based",
        "--group_reporting", "--output-format=json",
    ]  # fmt: skip
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    job: dict[str, Any] = json.loads(output[output.index("{") :])["jobs"][0]["read"]
    return float(job["iops"])


class Ripple:
    """`reader.Reader` with one of its engines."""

    def __init__(self, engine: Any, file: Path, depth: int, buffer: AlignedBuffer) -> None:
        report = RippleReport(directory="", layers=1, neurons=1, budget=0)
        self.reader, self.buffer = Reader(file, depth, report, engine), buffer
        self.random = np.random.default_rng(0)

    def __call__(self, size: int, seconds: float) -> float:
        done, start = 0, time.perf_counter()
        while (took := time.perf_counter() - start) < seconds:
            count = len(self.buffer.bytes) // size
            offsets = self.random.integers(0, self.reader.path.stat().st_size // size, count) * size
            lengths, targets = np.full(count, size), np.arange(count) * size
            for read in self.reader.submit(
                ReadPlan(offsets, offsets, lengths, targets, targets), self.buffer
            ):
                read.result()
            done += count
        return done / took


def bare(file: Path, buffer: AlignedBuffer, size: int, seconds: float) -> float:
    """A loop around preadv."""
    descriptor, blocks = os.open(file, os.O_RDONLY | os.O_DIRECT), file.stat().st_size // size
    places = (np.random.default_rng(0).integers(0, blocks, 100_000) * size).tolist()
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        os.preadv(descriptor, [buffer.memory[:size]], places[done])
        done += 1
    os.close(descriptor)
    return done / took


def contenders_of(
    file: Path, buffer: AlignedBuffer, size: int, depth: int, seconds: float
) -> dict[str, Callable[[], float]]:
    """What each contender is called, and what measures it: reads a second."""
    found: dict[str, Callable[[], float]] = {
        f"Ripple, {engine}": partial(Ripple(engine, file, depth, buffer), size, seconds)
        for engine in ("aio", "threads")
    }
    if depth == 1:
        found["bare preadv"] = partial(bare, file, buffer, size, seconds)
    if shutil.which("fio"):
        for engine in ("libaio", "psync"):
            found[f"fio, {engine}"] = partial(fio, engine, file, size, depth, seconds)
    return found


def main(file: Path, rounds: int, seconds: float) -> None:
    buffer = AlignedBuffer(BUFFER)
    buffer.bytes.zero_()  # its pages are there before anything is timed
    table = Table(
        "ripple_engine",
        "Ripple's reading engine beside fio",
        f"O_DIRECT, random reads of a file of {file.stat().st_size >> 20} MiB; median of {rounds} rounds of "
        f"{seconds} s, contenders in turn; share: of the better fio",
    )
    for kib, depth in CASES:
        size, contenders = kib << 10, contenders_of(file, buffer, kib << 10, depth, seconds)
        found: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(rounds):
            for name, run in contenders.items():
                found[name].append(run())
        reads = {name: statistics.median(values) for name, values in found.items()}
        best = max((value for name, value in reads.items() if "fio" in name), default=float("nan"))
        for name, value in reads.items():
            row = {"reads_per_s": value, "MB_per_s": value * size / 1e6, "share": value / best}
            table.add(f"{kib} KiB, {depth} in flight: {name}", **row, slowest=min(found[name]))
    table.finish()


if __name__ == "__main__":
    import assets

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--file", type=Path, default=None, help="by default SmolLM2's weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.4)
    arguments = parser.parse_args()
    main(arguments.file or assets.model_dir() / "model.safetensors", arguments.rounds, arguments.seconds)
