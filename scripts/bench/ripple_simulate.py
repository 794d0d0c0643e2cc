"""What reading a token's neurons would take on a phone with UFS 4.0, against the paper's rivals.

    python scripts/bench/ripple_simulate.py [--model smollm2] [--cache 0.1]

A trace is replayed (`ripple_loader.simulate`), the same for every contender: which neurons are missing from a
cache of equal size, which reads bring them, and what the published numbers of UFS 4.0 make of these. The last
tokens, of held-out text, are replayed; the others shaped order and cache. Nothing is read or timed: the
numbers do not depend on the machine.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, Table  # also makes `assets` importable

from ripple_loader import ReorderConfig
from ripple_loader.devices import load_devices
from ripple_loader.drive import DriveModel
from ripple_loader.encoding import ENCODINGS
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
from ripple_loader.source import open_source
from ripple_loader.trace import Trace, cut_sequences, trace_source

WARM_UP = 64
TRACES = ROOT / ".cache" / "ripple-traces"


@dataclass(frozen=True)
class Case:
    """A model to stream: where it lies, what is active, how many tokens are replayed."""

    directory: Path
    config: ReorderConfig
    replayed: int
    note: str


def cases() -> dict[str, Case]:
    import assets

    relu = ReorderConfig(tokens=4096, sequence_length=256)
    half = ReorderConfig(tokens=1280, sequence_length=256, active="top_k", active_share=0.5)
    tenth = replace(half, active_share=0.1)
    smollm2 = assets.model_dir()
    return {
        "relu-lm": Case(ROOT / ".cache" / "relu-lm", relu, 512, "ReLU model trained here"),
        "smollm2": Case(smollm2, half, 192, "half of the neurons"),
        "smollm2-tenth": Case(smollm2, tenth, 192, "a tenth of the neurons: sparsity, not quality"),
    }


def traced(name: str, case: Case) -> tuple[Trace, int]:
    """The model's trace, its last tokens of held-out text, kept for the next run; the bytes of a neuron."""
    import assets

    source, sequences = open_source(case.directory), []
    for split, tokens in (("train", case.config.tokens - case.replayed), ("held_out", case.replayed)):
        sequences += cut_sequences(source, assets.texts(split), replace(case.config, tokens=tokens))
    trace = trace_source(source, sequences, case.config, TRACES / name)
    return trace, len(source.architecture.bundle) * ENCODINGS[source.down.dtype].row_bytes(source.hidden)


def token_seconds(found: Replay, model: DriveModel, tokens: int) -> Any:
    """Predicted seconds of each token after the warm-up."""
    return np.bincount(found.token, found.seconds(model), tokens)[WARM_UP:]


def ablations(strategies: dict[str, Strategy]) -> dict[str, Strategy]:
    """Ripple without one of its parts at a time."""
    return strategies | {
        "Ripple, equal cache shares": replace(RIPPLE, shares=False),
        "Ripple, S3-FIFO": replace(RIPPLE, cache_policy="s3fifo"),
        "Ripple, LRU": replace(RIPPLE, cache_policy="lru"),
        "Ripple, spectral order": replace(RIPPLE, placement="spectral"),
        "Ripple, the model's order": replace(RIPPLE, placement="identity"),
        "Ripple, no collapse": replace(RIPPLE, collapse=False),
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
        f"{work.tokens - WARM_UP} tokens after {WARM_UP}",
        more,
        "reads, KiB: a token and layer",
    )
    table = Table("ripple_simulate", f"Ripple, reads of a token, {medium}. {ratios}", "; ".join(conditions))
    for contender, metrics in rows.items():
        table.add(contender, **metrics)
    table.finish()


def simulated(case: Case, work: Workload, placed: dict[str, Any], cache: float) -> None:
    device = load_devices()["ufs-4.0"]
    rows = {}
    for contender, strategy in ablations(STRATEGIES).items():
        order, size = placed[strategy.placement], int(cache * work.weight_bytes)
        found = replay(work, strategy, order, device.model, cache_bytes=size, block=device.block)
        seconds = token_seconds(found, device.model, work.tokens)
        rows[contender] = {
            "ms": float(seconds.mean() * 1e3),
            "p95_ms": float(np.quantile(seconds, 0.95) * 1e3),
        }
        rows[contender] |= row(found)
    finish(case, "UFS 4.0 profile", work, rows, f"cache of {cache:.0%} of the MLPs; {device.source}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", choices=sorted(cases()), default=["smollm2"])
    parser.add_argument("--cache", type=float, default=0.1, help="share of the MLPs")
    options = parser.parse_args()
    for name in options.model:
        case = cases()[name]
        trace, width = traced(name, case)
        work = workload_of(trace, width, case.replayed)
        placements = {strategy.placement for strategy in ablations(STRATEGIES).values()}
        placed = {placement: place_all(work, placement, case.config) for placement in sorted(placements)}
        simulated(case, work, placed, options.cache)


if __name__ == "__main__":
    main()
