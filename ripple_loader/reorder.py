"""The offline stage: trace a model, place its neurons, write a streaming copy of its directory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ripple_loader.atomic import Workspace, check_new, check_space, whole_file, working_on
from ripple_loader.config import ReorderConfig
from ripple_loader.placement import (
    Placed,
    Plan,
    expected_reads,
    grouped_uses,
    hot_neurons,
    place,
)
from ripple_loader.predictor import rank_of
from ripple_loader.sidecar import SIDECAR
from ripple_loader.source import SourceModel, open_source
from ripple_loader.trace import Trace, count_uses, cut_sequences, trace_description, trace_source
from ripple_loader.writing import output_bytes, write_copy

_HELD_BACK = 8
_PLACING = ("placement", "partners", "two_opt", "hot_share", "seed")


def reorder(
    model_dir: str | Path,
    out_dir: str | Path,
    calibration: Iterable[Any] | None = None,
    config: ReorderConfig | None = None,
    *,
    trace: str | Path | None = None,
) -> Plan:
    """Write a streaming copy of a model: `out_dir` appears whole or not at all.

    A run that was killed is resumed by the next one with the same arguments: traced sequences, placed MLPs
    and written weight files are kept.

    Args:
        model_dir: a causal LM saved as safetensors in float32, float16 or bfloat16.
        out_dir: a directory that does not exist yet.
        calibration: texts, rows with a "text" or "input_ids" column, or tensors of token ids.
        config: how to trace and place.
        trace: directory of a finished trace of this model, instead of `calibration`.

    Returns:
        The orders and the expected reads, which are also printed to stderr before anything is written.

    Raises:
        FileNotFoundError: the model's directory or files are missing.
        FileExistsError: `out_dir` exists.
        ValueError: unsupported, quantized or damaged checkpoint, or a trace of another model.
        OSError: not enough disk space.
    """
    config, out = config or ReorderConfig(), Path(out_dir)
    check_new(out)
    source = open_reorderable(Path(model_dir))
    check_space(out, sum(output_bytes(source, config.bundles, _rank(source, config))))
    if (trace is None) == (calibration is None):
        got = "none" if trace is None else "both"
        raise ValueError(f"one of `calibration` and `trace` should be given, got {got}.")
    found = trace_of(source, Path(trace)) if trace is not None else None
    if found is not None and _rank(source, config):
        found.check_inputs()
    sequences = cut_sequences(source, calibration, config) if calibration is not None else []
    with working_on(out) as work:
        if found is None:
            stage = work.stage("trace", trace_description(source, sequences, config))
            found = trace_source(source, sequences, config, stage)
        plan = plan_orders(source, found, config, work)
        tqdm.write(
            "expected reads per token and MLP: {reads_identity:.1f} in the model's order, {reads:.1f} in "
            "{placement} order; {activity:.1%} of the neurons active, {hot:.1%} hot".format(**plan.profile),
            file=sys.stderr,
        )
        orders = [hashlib.sha256(order.tobytes()).hexdigest() for order in plan.orders]
        key = [found.description, config.bundles, plan.hot, plan.rank, orders]
        write_copy(source, plan, found, work.stage(Workspace.OUTPUT, key))
    return plan


def open_reorderable(directory: Path) -> SourceModel:
    """`open_source` for a directory that is not a reordered one."""
    source = open_source(directory)
    if (directory / SIDECAR).exists():
        raise ValueError(f"{directory} is reordered already: give the original model's directory.")
    return source


def _rank(source: SourceModel, config: ReorderConfig) -> int:
    """Of the predictors, which only a model with exact zeros has."""
    return rank_of(source.hidden, config.predictor) if source.exact_zeros else 0


def trace_of(source: SourceModel, directory: Path) -> Trace:
    """A finished trace; ValueError where it is one of another model."""
    found = Trace(directory)
    expected = trace_description(source, [], ReorderConfig())
    for name in ("model", "mlps", "neurons"):
        if found.description.get(name) != expected[name]:
            raise ValueError(
                f"{directory} should be a trace of {source.directory}, but is one of another model: "
                "trace this model."
            )
    return found


def plan_orders(source: SourceModel, trace: Trace, config: ReorderConfig, work: Workspace) -> Plan:
    """Place the neurons of every MLP, some at once; what `work` holds already is kept."""
    settings = {name: value for name, value in asdict(config).items() if name in _PLACING}
    stage = work.stage("orders", [trace.description, settings])

    def shaping(layer: int) -> Any:
        """The tokens that an MLP's order is made from; the others tell what it is worth."""
        sets = trace.sets(layer)
        return sets[np.arange(len(sets)) % _HELD_BACK != _HELD_BACK - 1]

    counts = [count_uses(shaping(layer), source.neurons) for layer in range(source.layers)]
    hot = hot_neurons(counts, config.hot_share)

    def one(layer: int) -> tuple[Placed, dict[str, Any]]:
        file, sets = stage / f"{layer}.npz", trace.sets(layer)
        if file.exists():
            with np.load(file) as stored:
                placed = Placed(stored["order"], int(stored["hot"]))
        else:
            placed = place(shaping(layer), source.neurons, layer, config, hot[layer])
            with whole_file(file) as partial, partial.open("wb") as opened:
                np.savez(opened, order=placed.order, hot=placed.hot)
        return placed, _cost(sets, placed)

    with ThreadPoolExecutor(config.workers) as pool:
        bar = tqdm(pool.map(one, range(source.layers)), total=source.layers, unit="MLP", desc="place")
        placed, costs = zip(*bar, strict=True)
    tokens = np.array([cost.pop("tokens") for cost in costs])
    uses = [cost.pop("uses") for cost in costs]
    weights = tokens if tokens.any() else None
    profile = {name: float(np.average([cost[name] for cost in costs], weights=weights)) for name in costs[0]}
    return Plan(
        orders=[one.order for one in placed],
        hot=[one.hot for one in placed],
        exact_zeros=trace.exact_zeros,
        bundles=config.bundles,
        rank=_rank(source, config),
        profile={
            "placement": config.placement,
            "tokens": trace.description["tokens"],
            **profile,
            "uses": uses,
        },
    )


def _cost(sets: Any, placed: Placed) -> dict[str, Any]:
    """What one MLP's order costs, without what it pins; the means over MLPs are the plan's profile."""
    order, held_back = placed.order, sets[_HELD_BACK - 1 :: _HELD_BACK]
    hot = np.zeros(len(order), bool)
    hot[order[: placed.hot]] = True
    counts = count_uses(sets, len(order))
    return {
        "tokens": len(sets),
        "uses": grouped_uses(counts),
        "activity": float(counts.sum()) / max(1, len(sets) * len(order)),
        "hot": float(hot.mean()),
        "reads_identity": expected_reads(held_back, np.arange(len(order)), hot),
        "reads": expected_reads(held_back, order, hot),
    }
