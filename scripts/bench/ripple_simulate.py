"""What reading a token's neurons takes, against the paper's rivals: on paper, throttled, on this drive.

    python scripts/bench/ripple_simulate.py [--model smollm2] [--cache 0.1] [--on ufs-4.0 throttled drive]

A trace is replayed (`ripple_loader.studies.simulation`), the same for every contender: which neurons are
missing from a cache of equal size, and which reads bring them. The last tokens, of held-out text, are
replayed; the others shaped order and cache. In the "-code" cases the last are of modules of Python's library
that the ReLU model has not seen, after an order from prose about Python.

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
from ripple_parts import Reads, drop_from_page_cache, limited_drive
from train_relu_lm import documents

from ripple_loader import ReorderConfig
from ripple_loader.checkpoint.source import open_source
from ripple_loader.format.encoding import ENCODINGS
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import trace_source
from ripple_loader.offline.writing import stored_as
from ripple_loader.storage.devices import load_devices
from ripple_loader.storage.probing import probe
from ripple_loader.studies import simulation
from ripple_loader.studies.simulation import RIPPLE

WARM_UP = 64
SLOWED = 20  # the throttled drive is UFS 4.0 with a twentieth of its reads and bytes a second
PAUSE = 0.5  # seconds; the kernel lets through at once what was not used in the last slice
IN_FLIGHT = 32
TRACES = ROOT / ".cache" / "ripple-traces"


@dataclass(frozen=True)
class Case:
    """A model to stream: what is active, how many tokens are replayed, and of which text."""

    directory: Path
    config: ReorderConfig
    replayed: int
    note: str
    code: bool = False


RELU, SMOLLM2 = ROOT / ".cache" / "relu-lm", assets.cache_dir() / assets.SMOLLM2
_RELU = ReorderConfig(tokens=4096, sequence_length=256)
_HALF = ReorderConfig(tokens=1280, sequence_length=256, active="top_k", active_share=0.5)
CASES = {
    "relu-lm": Case(RELU, _RELU, 512, "ReLU model trained here"),
    "relu-lm-code": Case(RELU, _RELU, 512, "ReLU model trained here, Python code replayed", True),
    "smollm2": Case(SMOLLM2, _HALF, 192, "half of the neurons"),
    "smollm2-code": Case(SMOLLM2, _HALF, 192, "half of the neurons, Python code replayed", True),
}


def bundle_bytes(source: Any, bundles: str) -> int:
    """The bytes of a neuron."""
    return len(source.architecture.bundle) * ENCODINGS[stored_as(source, bundles)].row_bytes(source.hidden)


def traced(name: str, case: Case) -> tuple[simulation.Workload, Any]:
    """What is replayed, the last tokens of a trace that is kept for the next run; and the model."""
    source, sequences = open_source(case.directory), []
    replayed = documents()[1][-40:] if case.code else assets.texts("held_out")
    parts = (assets.texts("train"), case.config.tokens - case.replayed), (replayed, case.replayed)
    for texts, tokens in parts:
        sequences += cut_sequences(source, texts, replace(case.config, tokens=tokens))
    trace = trace_source(source, sequences, case.config, TRACES / name)
    return simulation.workload_of(trace, bundle_bytes(source, "same"), case.replayed), source


Rivals = dict[str, tuple[simulation.Workload, simulation.Contender, Any]]
"""The weights that a contender reads, the contender, and the orders that it reads them in."""


def rivals_of(case: Case, work: simulation.Workload, width_int8: int) -> Rivals:
    """What is compared: Ripple's rivals, and Ripple without some of its parts, or with one more.

    Only the linked, spectral and frequency orders pin neurons. Where as much is pinned as the cache holds,
    its policy has nothing to do, so policies are compared where nothing is.
    """
    contenders = simulation.CONTENDERS | {
        "Ripple, equal cache shares": replace(RIPPLE, shares=False),
        "Ripple, spectral order": replace(RIPPLE, placement="spectral"),
        "Ripple, the model's order": replace(RIPPLE, placement="identity"),
        "Ripple, no collapse": replace(RIPPLE, collapse=False),
    }
    placements = {contender.placement for contender in contenders.values()}
    placed = {placement: simulation.place_all(work, placement, case.config) for placement in placements}
    unpinned = simulation.place_all(work, "linked", replace(case.config, hot_share=0.0))
    return {
        **{name: (work, each, placed[each.placement]) for name, each in contenders.items()},
        "Ripple, nothing pinned": (work, RIPPLE, unpinned),
        "Ripple, nothing pinned, S3-FIFO": (work, replace(RIPPLE, cache_policy="s3fifo"), unpinned),
        "Ripple, nothing pinned, LRU": (work, replace(RIPPLE, cache_policy="lru"), unpinned),
        "Ripple, int8 bundles": (replace(work, bundle_bytes=width_int8), RIPPLE, placed["linked"]),
    }


@dataclass
class Study:
    """A case with its rivals, the cache's share of the MLPs, the tokens to read; then a drive's replays."""

    case: Case
    work: simulation.Workload
    rivals: Rivals
    cache: float
    read: int

    def replay(self, model: Any, block: int) -> None:
        """The reads of every rival on a drive."""
        priced = {"cache_bytes": int(self.cache * self.work.weight_bytes), "block": block}
        self.model = model
        self.replays = {name: simulation.replay(*each, model, **priced) for name, each in self.rivals.items()}

    def row(self, name: str, measured: list[float] | None) -> dict[str, float | str]:
        found = self.replays[name]
        predicted = np.bincount(found.token, found.seconds(self.model), self.work.tokens)
        seconds, steps = predicted[WARM_UP:] if measured is None else measured, len(found.token)
        row = {"ms": float(np.mean(seconds) * 1e3), "p95_ms": float(np.quantile(seconds, 0.95) * 1e3)}
        if measured is not None:
            row["predicted_ms"] = float(predicted[-len(seconds) :].mean() * 1e3)
        row |= {"reads": len(found.lengths) / steps, "KiB": float(found.lengths.sum()) / steps / 2**10}
        return row | {"hits": f"{found.hits / max(1, found.active):.0%}"}

    def plans(self, name: str) -> list[list[tuple[Any, Any]]]:
        """For each of the last tokens, offsets and lengths of the reads of each layer that reads."""
        found = self.replays[name]
        by_token: list[list[tuple[Any, Any]]] = [[] for _ in range(self.work.tokens)]
        steps, first = np.unique(found.step, return_index=True)
        reads = zip(np.split(found.offsets, first[1:]), np.split(found.lengths, first[1:]), strict=True)
        for step, each in zip(steps, reads, strict=False):
            by_token[found.token[step]].append(each)
        return by_token[-self.read - 1 :]

    def finish(self, medium: str, more: str, measured: dict[str, list[float]]) -> None:
        case, work = self.case, self.work
        table = Table(
            "ripple_simulate",
            f"Ripple, reads of a token, {medium}",
            f"{case.directory.name}, {case.note}; {len(work.replayed)} MLPs of {work.neurons} neurons of "
            f"{work.bundle_bytes} bytes; order from {case.config.tokens - work.tokens} tokens; cache of "
            f"{self.cache:.0%} of the MLPs; {more}; reads, KiB: a token and layer, over all replayed tokens",
        )
        for name in self.replays:
            table.add(name, **self.row(name, measured.get(name)))
        table.finish()


@contextlib.contextmanager
def real_reads(work: simulation.Workload) -> Iterator[Reads]:
    """Reads of a file as large as the weights on this drive, which is not in the page cache."""
    with scratch() as folder:
        file = folder / "weights"
        file.write_bytes(os.urandom(work.weight_bytes + (1 << 20)))
        os.sync()
        drop_from_page_cache(file)
        yield Reads(file, IN_FLIGHT, 2 * (work.layer_bytes + (1 << 20)))


def read_next(reads: Reads, plans: Iterator[list[tuple[Any, Any]]]) -> None:
    """The reads of the next token, each layer's after the one before it, as decoding would have it."""
    for offsets, lengths in next(plans):
        reads(offsets, lengths)


def on_paper(study: Study) -> None:
    device = load_devices()["ufs-4.0"]
    study.replay(device.model, device.block)
    counted = f"{study.work.tokens - WARM_UP} tokens after {WARM_UP}"
    study.finish("UFS 4.0 profile", f"{counted}; {device.source}", {})


def throttled(study: Study) -> None:
    device = load_devices()["ufs-4.0"]
    slow = replace(device, iops=device.iops // SLOWED, bandwidth=device.bandwidth // SLOWED)
    study.replay(slow.model, slow.block)
    limits, measured = {"iops": int(slow.iops), "bandwidth": int(slow.bandwidth)}, {}
    with real_reads(study.work) as reads, limited_drive(reads.reader.path, **limits):
        for name in study.replays:
            time.sleep(PAUSE)
            call = partial(read_next, reads, iter(study.plans(name)))
            measured[name] = Race({name: call}, equal=None).run(1, samples=study.read)[name].wall
    told = f"{slow.iops:,} reads and {slow.bandwidth:,} bytes a second"
    study.finish("throttled by the kernel", told, measured)


def on_drive(study: Study) -> None:
    with real_reads(study.work) as reads:
        model = probe(reads.reader.path).at(IN_FLIGHT)
        study.replay(model, reads.reader.block)
        calls = {}
        for name in study.replays:
            pairs = itertools.pairwise(study.plans(name))  # untimed, timed
            calls[name] = partial(read_next, reads, itertools.chain.from_iterable(pairs))
        times = Race(calls, equal=None).run(study.read)
    told = f"the last {study.read} tokens; {model.summary()}, p = {model.norm:g}"
    study.finish("this machine's drive", told, {name: each.wall for name, each in times.items()})


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
        work, source = traced(name, case)
        rivals = rivals_of(case, work, bundle_bytes(source, "int8"))
        for medium in options.on:
            MEDIA[medium](Study(case, work, rivals, options.cache, options.read))


if __name__ == "__main__":
    main()
