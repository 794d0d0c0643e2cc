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
  contenders in turn at every token, after an untimed read of the token before.

"predicted" is what the drive's model says of the reads beside what they took.
"""

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, Table, assets, option, parse, scratch
from harness import Race
from ripple_parts import Reads, limited_drive
from train_relu_lm import documents

from ripple_loader import ReorderConfig
from ripple_loader.devices import load_devices
from ripple_loader.drive import DriveModel
from ripple_loader.encoding import ENCODINGS
from ripple_loader.placement import Placed
from ripple_loader.probe import probe
from ripple_loader.simulate import (
    RIPPLE,
    STRATEGIES,
    Replay,
    Strategy,
    Workload,
    place_all,
    replay,
    workload_of,
)
from ripple_loader.source import SourceModel, open_source
from ripple_loader.trace import Trace, cut_sequences, trace_source
from ripple_loader.writing import stored_as

WARM_UP = 64
SLOWED = 20  # the throttled drive is UFS 4.0 with a twentieth of its reads and bytes a second
PAUSE = 0.5  # seconds; the kernel lets through at once what was not used in the last slice
IN_FLIGHT = 32
TRACES = ROOT / ".cache" / "ripple-traces"


@dataclass(frozen=True)
class Case:
    """A model to stream: what is active, how many tokens are replayed, and of which text."""

    model: str
    config: ReorderConfig
    replayed: int
    note: str
    code: bool = False

    @property
    def directory(self) -> Path:
        return ROOT / ".cache" / self.model if self.model == RELU else assets.model_dir(self.model)


RELU, SMOLLM2 = "relu-lm", assets.SMOLLM2
_RELU = ReorderConfig(tokens=4096, sequence_length=256)
_HALF = ReorderConfig(tokens=1280, sequence_length=256, active="top_k", active_share=0.5)
_TENTH = replace(_HALF, active_share=0.1)
CASES = {
    "relu-lm": Case(RELU, _RELU, 512, "ReLU model trained here"),
    "relu-lm-code": Case(RELU, _RELU, 512, "ReLU model trained here, Python code replayed", True),
    "smollm2": Case(SMOLLM2, _HALF, 192, "half of the neurons"),
    "smollm2-code": Case(SMOLLM2, _HALF, 192, "half of the neurons, Python code replayed", True),
    "smollm2-tenth": Case(SMOLLM2, _TENTH, 192, "a tenth of the neurons: sparsity, not quality"),
}


def bundle_bytes(source: SourceModel, bundles: str) -> int:
    """The bytes of a neuron."""
    return len(source.architecture.bundle) * ENCODINGS[stored_as(source, bundles)].row_bytes(source.hidden)


def traced(name: str, case: Case) -> tuple[Trace, SourceModel]:
    """The model's trace, its last tokens of held-out text, kept for the next run; and the model."""
    source, sequences = open_source(case.directory), []
    replayed = documents()[1][-40:] if case.code else assets.texts("held_out")
    parts = (assets.texts("train"), case.config.tokens - case.replayed), (replayed, case.replayed)
    for texts, tokens in parts:
        sequences += cut_sequences(source, texts, replace(case.config, tokens=tokens))
    return trace_source(source, sequences, case.config, TRACES / name), source


@dataclass(frozen=True)
class Rival:
    """A strategy with the orders it reads in, and the weights it reads."""

    strategy: Strategy
    placed: list[Placed]
    work: Workload


def rivals_of(case: Case, work: Workload, width_int8: int) -> dict[str, Rival]:
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
    found = {name: Rival(each, placed[each.placement], work) for name, each in strategies.items()}
    unpinned = place_all(work, "linked", replace(case.config, hot_share=0.0))
    int8 = replace(work, bundle_bytes=width_int8)
    return found | {
        "Ripple, nothing pinned": Rival(RIPPLE, unpinned, work),
        "Ripple, nothing pinned, S3-FIFO": Rival(replace(RIPPLE, cache_policy="s3fifo"), unpinned, work),
        "Ripple, nothing pinned, LRU": Rival(replace(RIPPLE, cache_policy="lru"), unpinned, work),
        "Ripple, int8 bundles": Rival(RIPPLE, placed["linked"], int8),
    }


@dataclass(frozen=True)
class Setting:
    """What every medium is given: a case with its rivals, the cache's share of the MLPs, the tokens to read."""

    case: Case
    work: Workload
    rivals: dict[str, Rival]
    cache: float
    read: int


class Run:
    """A case's reads under every strategy, for one drive, and the time that they took where they were read."""

    def __init__(self, setting: Setting, model: DriveModel, block: int) -> None:
        self.setting, self.work, self.model = setting, setting.work, model
        size = int(setting.cache * self.work.weight_bytes)
        self.replays = {
            name: replay(each.work, each.strategy, each.placed, model, cache_bytes=size, block=block)
            for name, each in setting.rivals.items()
        }

    def row(self, name: str, measured: list[float] | None) -> dict[str, float | str]:
        found = self.replays[name]
        predicted = np.bincount(found.token, found.seconds(self.model), self.work.tokens)
        seconds, steps = predicted[WARM_UP:] if measured is None else measured, len(found.token)
        ms = {"ms": float(np.mean(seconds) * 1e3), "p95_ms": float(np.quantile(seconds, 0.95) * 1e3)}
        if measured is not None:
            ms["predicted_ms"] = float(predicted[-len(seconds) :].mean() * 1e3)
        return {
            **ms,
            "reads": len(found.lengths) / steps,
            "KiB": float(found.lengths.sum()) / steps / 2**10,
            "hits": f"{found.hits / max(1, found.active):.0%}",
        }

    def plans(self, name: str) -> list[list[tuple[Any, Any]]]:
        """For each token, offsets and lengths of the reads of each layer that reads something."""
        found = self.replays[name]
        starts = np.flatnonzero(np.diff(found.step, prepend=-1))
        by_token: list[list[tuple[Any, Any]]] = [[] for _ in range(self.work.tokens)]
        for first, last in itertools.pairwise([*starts, len(found.step)]):
            step = slice(first, last)
            by_token[found.token[found.step[first]]].append((found.offsets[step], found.lengths[step]))
        return by_token

    def finish(self, medium: str, more: str, measured: dict[str, list[float]]) -> None:
        rows = {name: self.row(name, measured.get(name)) for name in self.replays}
        over = {"dense": "dense", "LLM in a Flash": "LLM in a Flash", "frequency": "frequency, collapse"}
        ratios = (
            f"{rows[each]['ms'] / rows['Ripple']['ms']:.2f}x over {name}" for name, each in over.items()
        )
        case, work = self.setting.case, self.work
        conditions = (
            f"{case.directory.name}, {case.note}",
            f"{len(work.replayed)} MLPs of {work.neurons} neurons of {work.bundle_bytes} bytes",
            f"order from {case.config.tokens - work.tokens} tokens",
            f"cache of {self.setting.cache:.0%} of the MLPs",
            more,
            "reads, KiB: a token and layer, over all replayed tokens",
        )
        title = f"Ripple, reads of a token, {medium}. Ripple: {', '.join(ratios)}"
        table = Table("ripple_simulate", title, "; ".join(conditions))
        for name, row in rows.items():
            table.add(name, **row)
        table.finish()


class RealReads(Reads):
    """A file as large as the weights on this drive, not in the page cache, from which replays are read."""

    def __init__(self, file: Any, work: Workload) -> None:
        for _ in range(-(-work.weight_bytes >> 20) + 1):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        super().__init__(Path(file.name), IN_FLIGHT, 2 * (work.layer_bytes + (1 << 20)))

    def tokens(self, plans: Iterator[list[tuple[Any, Any]]]) -> None:
        """The reads of the next token, each layer's after the one before it, as decoding would have it."""
        for offsets, lengths in next(plans):
            self(offsets, lengths)


@contextlib.contextmanager
def real_reads(work: Workload) -> Iterator[RealReads]:
    with scratch() as folder, (folder / "weights").open("wb") as file:
        yield RealReads(file, work)


def on_paper(setting: Setting) -> None:
    device = load_devices()["ufs-4.0"]
    counted = f"{setting.work.tokens - WARM_UP} tokens after {WARM_UP}"
    run = Run(setting, device.model, device.block)
    run.finish("UFS 4.0 profile", f"{counted}; {device.source}", {})


def throttled(setting: Setting) -> None:
    device = load_devices()["ufs-4.0"]
    slow = replace(device, iops=device.iops // SLOWED, bandwidth=device.bandwidth // SLOWED)
    run, measured = Run(setting, slow.model, slow.block), {}
    limits = {"iops": int(slow.iops), "bandwidth": int(slow.bandwidth)}
    with real_reads(setting.work) as reads, limited_drive(reads.reader.path, **limits):
        for name in run.replays:
            time.sleep(PAUSE)
            call = partial(reads.tokens, iter(run.plans(name)[-setting.read - 1 :]))
            times = Race({name: call}, equal=None).run(1, samples=setting.read)
            measured[name] = [each.wall for each in times[name]]
    told = f"{slow.iops:,} reads and {slow.bandwidth:,} bytes a second"
    run.finish("throttled by the kernel", told, measured)


def on_drive(setting: Setting) -> None:
    with real_reads(setting.work) as reads:
        model = probe(reads.reader.path).at(IN_FLIGHT)
        run = Run(setting, model, reads.reader.block)
        calls = {}
        for name in run.replays:
            pairs = itertools.pairwise(run.plans(name)[-setting.read - 1 :])  # untimed, timed
            calls[name] = partial(reads.tokens, itertools.chain.from_iterable(pairs))
        times = Race(calls, equal=None).run(setting.read)
    conditions = (
        f"the last {setting.read} tokens; "
        f"{1 / model.request_seconds:,.0f} reads and {1 / model.byte_seconds:,.0f} bytes a second, p = {model.norm:g}"
    )
    measured = {name: [each.wall for each in found] for name, found in times.items()}
    run.finish("this machine's drive", conditions, measured)


MEDIA = {"ufs-4.0": on_paper, "throttled": throttled, "drive": on_drive}


def main() -> None:
    options = parse(
        __doc__,
        model=option(["smollm2"], choices=CASES),
        cache=option(0.1, "share of the MLPs"),
        on=option(["ufs-4.0"], choices=MEDIA),
        read=option(32, "tokens that are read, not only priced"),
    )
    for name in options.model:
        case = CASES[name]
        trace, source = traced(name, case)
        work = workload_of(trace, bundle_bytes(source, "same"), case.replayed)
        rivals = rivals_of(case, work, bundle_bytes(source, "int8"))
        for medium in options.on:
            MEDIA[medium](Setting(case, work, rivals, options.cache, options.read))


if __name__ == "__main__":
    main()
