"""How near the reading engine comes to fio: reads a second and MB/s at equal size and depth.

    python scripts/bench/ripple_engine.py [--file FILE] [--rounds 5] [--seconds 0.4]

Every contender reads random places of one file with O_DIRECT, in turn. fio runs with libaio, one job of that
depth, and with psync, a thread for each read in flight. fio must be installed.
"""

import json
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from common import Table, assets, option, parse
from harness import Race
from ripple_parts import Reads

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
    return float(json.loads(output[output.index("{") :])["jobs"][0]["read"]["iops"])


def rate(reads: Reads, file: Path, size: int, seconds: float) -> float:
    """Reads a second at random offsets, as many at once as the buffer holds."""
    random, blocks, count = np.random.default_rng(0), file.stat().st_size // size, BUFFER // size
    done, start = 0, time.perf_counter()
    while (took := time.perf_counter() - start) < seconds:
        reads(random.integers(0, blocks, count) * size, np.full(count, size))
        done += count
    return done / took


def contenders_of(file: Path, size: int, depth: int, seconds: float) -> dict[str, Callable[[], float]]:
    """Calls that return reads a second."""
    found: dict[str, Callable[[], float]] = {}
    for engine in ("aio", "threads"):
        reads = Reads(file, depth, BUFFER, engine)
        found[f"Ripple, {engine}"] = partial(rate, reads, file, size, seconds)
    for engine in ("libaio", "psync"):
        found[f"fio, {engine}"] = partial(fio, engine, file, size, depth, seconds)
    return found


def main() -> None:
    options = parse(__doc__, file=option(Path, "by default SmolLM2's weights"), rounds=5, seconds=0.4)
    if not shutil.which("fio"):
        raise SystemExit("ripple_engine: fio must be installed, for example by apt-get install fio.")
    file = options.file or assets.model_dir() / "model.safetensors"
    table = Table(
        "ripple_engine",
        "Ripple's reading engine beside fio",
        f"O_DIRECT, random reads of a file of {file.stat().st_size >> 20} MiB; median of {options.rounds} "
        f"rounds of {options.seconds} s, contenders in turn; share: of the better fio",
    )
    for kib, depth in CASES:
        size = kib << 10
        race = Race(contenders_of(file, size, depth, options.seconds), equal=None, keep=True)
        rates = {name: times.results for name, times in race.run(options.rounds).items()}
        reads = {name: statistics.median(each) for name, each in rates.items()}
        best = max(value for name, value in reads.items() if "fio" in name)
        for name, value in reads.items():
            row = {"reads_per_s": value, "MB_per_s": value * size / 1e6, "share": value / best}
            table.add(f"{kib} KiB, {depth} in flight: {name}", **row, slowest=min(rates[name]))
    table.finish()


if __name__ == "__main__":
    main()
