"""What reading a token's neurons takes, against the paper's rivals: on paper, throttled, on this drive.

    python scripts/bench/ripple_simulate.py [--model smollm2] [--cache 0.1] [--on ufs-4.0 throttled drive]

A trace is replayed (`ripple_loader.simulate`), the same for every contender: which neurons are missing from a
cache of equal size, and which reads bring them. The last tokens, of held-out text, are replayed; the others
shaped order and cache. In the "-code" cases the last are of modules of Python's library that the ReLU model
has not seen, after an order from prose about Python.

- ufs-4.0: what the published numbers of that phone drive make of the reads. Nothing is read, and the numbers
  do not depend on the machine.
- throttled: the same reads, issued with O_DIRECT while the kernel holds this process to a twentieth of the
  reads and bytes a second of UFS 4.0 (a cgroup, which takes root). Each contender reads its tokens in one go,
  because the kernel counts in slices of 100 ms, and an equal wait in front of it empties the account.
- drive: the reads for this machine's drive as `ripple probe` has just measured it, issued with O_DIRECT, the
  contenders in turn at every token.

"predicted" is what the drive's model says of the reads beside what they took.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, Table  # also makes `assets` importable
from throttle import limited_drive
from train_relu_lm import documents

from ripple_loader import ReorderConfig, RippleReport
from ripple_loader.checkpoint.source import SourceModel, open_source
from ripple_loader.format.encoding import ENCODINGS
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.placement import Placed
from ripple_loader.offline.trace import Trace, trace_source
from ripple_loader.offline.writing import stored_as
from ripple_loader.storage.blocks import AlignedBuffer
from ripple_loader.storage.collapse import ReadPlan
from ripple_loader.storage.devices import load_devices
from ripple_loader.storage.drive import DriveModel
from ripple_loader.storage.probing import probe
from ripple_loader.storage.reader import Reader
from ripple_loader.studies.simulation import (
    CONTENDERS as STRATEGIES,
)
from ripple_loader.studies.simulation import (
    RIPPLE,
    Replay,
    Workload,
    place_all,
    replay,
    workload_of,
)
from ripple_loader.studies.simulation import (
    Contender as Strategy,
)

WARM_UP = 64
SLOWED = 20  # the throttled drive is UFS 4.0 with a twentieth of its reads and bytes a second
PAUSE = 0.5  # seconds; the kernel lets through at once what was not used in the last slice
IN_FLIGHT = 32
TRACES = ROOT / ".cache" / "ripple-traces"


@dataclass(frozen=True)
class Case:
    """A model to stream: where it lies, what is active, how many tokens are replayed, and of which text."""

    directory: Path
    config: ReorderConfig
    replayed: int
    note: str
    code: bool = False


def cases() -> dict[str, Case]:
    import assets

    relu = ReorderConfig(tokens=4096, sequence_length=256)
    half = ReorderConfig(tokens=1280, sequence_length=256, active="top_k", active_share=0.5)
    tenth = replace(half, active_share=0.1)
    relu_lm, smollm2 = ROOT / ".cache" / "relu-lm", assets.model_dir()
    return {
        "relu-lm": Case(relu_lm, relu, 512, "ReLU model trained here"),
        "relu-lm-code": Case(relu_lm, relu, 512, "ReLU model trained here, Python code replayed", True),
        "smollm2": Case(smollm2, half, 192, "half of the neurons"),
        "smollm2-code": Case(smollm2, half, 192, "half of the neurons, Python code replayed", True),
        "smollm2-tenth": Case(smollm2, tenth, 192, "a tenth of the neurons: sparsity, not quality"),
    }


def bundle_bytes(source: SourceModel, bundles: str) -> int:
    """The bytes of a neuron."""
    return len(source.architecture.bundle) * ENCODINGS[stored_as(source, bundles)].row_bytes(source.hidden)


def traced(name: str, case: Case) -> tuple[Trace, SourceModel]:
    """The model's trace, its last tokens of held-out text, kept for the next run; and the model."""
    import assets

    source, sequences = open_source(case.directory), []
    replayed = documents()[1][-40:] if case.code else assets.texts("held_out")
    parts = (assets.texts("train"), case.config.tokens - case.replayed), (replayed, case.replayed)
    for texts, tokens in parts:
        sequences += cut_sequences(source, texts, replace(case.config, tokens=tokens))
    return trace_source(source, sequences, case.config, TRACES / name), source


def token_seconds(found: Replay, model: DriveModel, tokens: int) -> Any:
    """Predicted seconds of each token."""
    return np.bincount(found.token, found.seconds(model), tokens)


@dataclass(frozen=True)
class Contender:
    """A strategy with the orders it reads in, and the weights it reads."""

    strategy: Strategy
    placed: list[Placed]
    work: Workload


def contenders(case: Case, work: Workload, width_int8: int) -> dict[str, Contender]:
    """What is compared: Ripple's rivals, and Ripple without some of its parts, or with one more.

    Only the linked, spectral and frequency orders pin neurons. Where as much is pinned as the cache holds,
    its policy has nothing to do, so policies are compared where nothing is.
    """
    strategies = STRATEGIES | {
        "Ripple, equal cache shares": replace(RIPPLE, shares=False),
        "Ripple, spectral order": replace(RIPPLE, placement="spectral"),
        "Ripple, the model's order": replace(RIPPLE, placement="identity"),
        "Ripple, no collapse": replace(RIPPLE, collapse=False),
    }
    placements = sorted({strategy.placement for strategy in strategies.values()})
    placed = {placement: place_all(work, placement, case.config) for placement in placements}
    found = {name: Contender(each, placed[each.placement], work) for name, each in strategies.items()}
    unpinned = place_all(work, "linked", replace(case.config, hot_share=0.0))
    int8 = replace(work, bundle_bytes=width_int8)
    return found | {
        "Ripple, nothing pinned": Contender(RIPPLE, unpinned, work),
        "Ripple, nothing pinned, S3-FIFO": Contender(replace(RIPPLE, cache_policy="s3fifo"), unpinned, work),
        "Ripple, nothing pinned, LRU": Contender(replace(RIPPLE, cache_policy="lru"), unpinned, work),
        "Ripple, int8 bundles": Contender(RIPPLE, placed["linked"], int8),
    }


def row(found: Replay) -> dict[str, float | str]:
    steps = len(found.token)
    return {
        "reads": len(found.lengths) / steps,
        "KiB": float(found.lengths.sum()) / steps / 2**10,
        "hits": f"{found.hits / max(1, found.active):.0%}",
    }


def finish(case: Case, medium: str, work: Workload, rows: dict[str, Any], more: str) -> None:
    dense, flash = rows["dense"]["ms"], rows["LLM in a Flash"]["ms"]
    frequency, ripple = rows["frequency, collapse"]["ms"], rows["Ripple"]["ms"]
    ratios = f"Ripple: {dense / ripple:.2f}x over dense, {flash / ripple:.2f}x over LLM in a Flash, "
    ratios += f"{frequency / ripple:.2f}x over frequency"
    conditions = (
        f"{case.directory.name}, {case.note}",
        f"{len(work.replayed)} MLPs of {work.neurons} neurons of {work.bundle_bytes} bytes",
        f"order from {case.config.tokens - work.tokens} tokens",
        more,
        "reads, KiB: a token and layer, over all replayed tokens",
    )
    table = Table("ripple_simulate", f"Ripple, reads of a token, {medium}. {ratios}", "; ".join(conditions))
    for contender, metrics in rows.items():
        table.add(contender, **metrics)
    table.finish()


@dataclass(frozen=True)
class Run:
    """The trace's reads under every strategy, for one drive."""

    work: Workload
    model: DriveModel
    found: dict[str, Replay]

    @classmethod
    def of(
        cls, work: Workload, rivals: dict[str, Contender], cache: float, model: DriveModel, block: int
    ) -> Run:
        size = int(cache * work.weight_bytes)
        found = {
            name: replay(each.work, each.strategy, each.placed, model, cache_bytes=size, block=block)
            for name, each in rivals.items()
        }
        return cls(work, model, found)

    def rows(self, measured: dict[str, Any]) -> dict[str, dict[str, float | str]]:
        """A row a contender; `measured` seconds of its tokens, where they were read."""
        rows = {}
        for name, found in self.found.items():
            predicted = token_seconds(found, self.model, self.work.tokens)
            seconds = measured.get(name, predicted[WARM_UP:])
            rows[name] = {
                "ms": float(np.mean(seconds) * 1e3),
                "p95_ms": float(np.quantile(seconds, 0.95) * 1e3),
            }
            if name in measured:
                rows[name]["predicted_ms"] = float(predicted[-len(seconds) :].mean() * 1e3)
            rows[name] |= row(found)
        return rows


class RealReads:
    """Issues the reads of replays from a file, layer by layer as decoding would.

    Args:
        file: as large as the weights; what is in it does not matter.
        work: whose layers bound a read.
    """

    def __init__(self, file: Path, work: Workload) -> None:
        self.reader = Reader(file, IN_FLIGHT, RippleReport(directory="", layers=1, neurons=1, budget=0))
        self.buffer = AlignedBuffer(2 * (work.layer_bytes + (1 << 20)))
        self.buffer.bytes.zero_()  # its pages are there before anything is timed

    def plans(self, found: Replay, tokens: int) -> list[list[ReadPlan]]:
        """For each token, the reads of each layer that reads something."""
        starts = np.flatnonzero(np.diff(found.step, prepend=-1))
        by_token: list[list[ReadPlan]] = [[] for _ in range(tokens)]
        for first, last in itertools.pairwise([*starts, len(found.step)]):
            offsets, lengths = found.offsets[first:last], found.lengths[first:last]
            targets = np.cumsum(lengths) - lengths
            plan = ReadPlan(offsets, offsets, lengths, targets, targets)
            by_token[found.token[found.step[first]]].append(plan)
        return by_token

    def seconds(self, plans: list[ReadPlan]) -> float:
        """What a token's reads take, each layer's after the one before it."""
        start = time.perf_counter()
        for plan in plans:
            for read in self.reader.submit(plan, self.buffer):
                read.result()
        return time.perf_counter() - start


@contextlib.contextmanager
def written(size: int) -> Iterator[Path]:
    """A file of so many random bytes on this drive, not in the page cache."""
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=ROOT / "out") as file:
        for _ in range(-(-size >> 20)):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(file.name)


def on_paper(case: Case, work: Workload, rivals: dict[str, Contender], cache: float, tokens: int) -> None:
    device = load_devices()["ufs-4.0"]
    run = Run.of(work, rivals, cache, device.model, device.block)
    counted = f"{work.tokens - WARM_UP} tokens after {WARM_UP}"
    conditions = f"cache of {cache:.0%} of the MLPs; {counted}; {device.source}"
    finish(case, "UFS 4.0 profile", work, run.rows({}), conditions)


def throttled(case: Case, work: Workload, rivals: dict[str, Contender], cache: float, tokens: int) -> None:
    device = load_devices()["ufs-4.0"]
    slow = replace(device, iops=device.iops // SLOWED, bandwidth=device.bandwidth // SLOWED)
    run, measured = Run.of(work, rivals, cache, slow.model, slow.block), {}
    with written(work.weight_bytes + (1 << 20)) as file:
        reads = RealReads(file, work)
        with limited_drive(file, iops=int(slow.iops), bandwidth=int(slow.bandwidth)):
            for name, found in run.found.items():
                before, *plans = reads.plans(found, work.tokens)[-tokens - 1 :]
                time.sleep(PAUSE)
                reads.seconds(before)
                measured[name] = [reads.seconds(plan) for plan in plans]
    conditions = (
        f"cache of {cache:.0%} of the MLPs; {slow.iops:,} reads and {slow.bandwidth:,} bytes a second"
    )
    finish(case, "throttled by the kernel", work, run.rows(measured), conditions)


def on_drive(case: Case, work: Workload, rivals: dict[str, Contender], cache: float, tokens: int) -> None:
    with written(work.weight_bytes + (1 << 20)) as file:
        reads = RealReads(file, work)
        model = probe(file).at(IN_FLIGHT)
        run = Run.of(work, rivals, cache, model, reads.reader.block)
        plans = {name: reads.plans(found, work.tokens) for name, found in run.found.items()}
        measured: dict[str, list[float]] = {name: [] for name in plans}
        for token in range(work.tokens - tokens, work.tokens):
            for name, by_token in plans.items():
                measured[name].append(reads.seconds(by_token[token]))
    conditions = (
        f"cache of {cache:.0%} of the MLPs; the last {tokens} tokens; {1 / model.request_seconds:,.0f} "
        f"reads and {1 / model.byte_seconds:,.0f} bytes a second, p = {model.norm:g}"
    )
    finish(case, "this machine's drive", work, run.rows(measured), conditions)


MEDIA = {"ufs-4.0": on_paper, "throttled": throttled, "drive": on_drive}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=sorted(cases()), default=["smollm2"])
    parser.add_argument("--cache", type=float, default=0.1, help="share of the MLPs")
    parser.add_argument("--on", nargs="+", choices=MEDIA, default=["ufs-4.0"])
    parser.add_argument("--read", type=int, default=32, help="tokens that are read, not only priced")
    options = parser.parse_args()
    for name in options.model:
        case = cases()[name]
        trace, source = traced(name, case)
        work = workload_of(trace, bundle_bytes(source, "same"), case.replayed)
        rivals = contenders(case, work, bundle_bytes(source, "int8"))
        for medium in options.on:
            MEDIA[medium](case, work, rivals, options.cache, options.read)


if __name__ == "__main__":
    main()
