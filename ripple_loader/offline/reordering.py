"""The offline stage: trace a model, place its neurons, write a streaming copy of its directory."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from ripple_loader.checkpoint.dequantizing import open_quantized
from ripple_loader.checkpoint.hub import local_directory
from ripple_loader.checkpoint.source import SourceModel, open_source
from ripple_loader.config import ReorderConfig
from ripple_loader.files import Workspace, check_new, check_space, working_on
from ripple_loader.format.layout import SIDECAR
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.orders import ReorderPlan, plan_orders, predictor_rank
from ripple_loader.offline.trace import Trace, trace_description, trace_source
from ripple_loader.offline.verification import check_copy
from ripple_loader.offline.writing import output_bytes, write_copy


def reorder(
    model_dir: str | Path,
    out_dir: str | Path,
    calibration: Iterable[Any] | None = None,
    config: ReorderConfig | None = None,
    *,
    trace: str | Path | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> ReorderPlan:
    """Write a streaming copy of a model: `out_dir` appears whole or not at all.

    After an interruption the next run with the same arguments resumes: it keeps traced sequences, placed MLPs
    and written weight files.

    Args:
        model_dir: directory or hub id of a language model in float32, float16 or bfloat16, saved as
            safetensors or as `pytorch_model.bin`; or a model quantized with fp8, GPTQ, AWQ,
            compressed-tensors or bitsandbytes, or a GGUF file, which is first written dequantized beside
            `out_dir`, one tensor at a time.
        out_dir: a directory that does not exist yet.
        calibration: texts, rows with a "text" or "input_ids" column, or tensors of token ids.
        config: how to trace and place.
        trace: directory of a finished trace of this model, instead of `calibration`.
        revision: branch, tag or commit of a hub id.
        variant: of the weight files, such as "fp16".

    Returns:
        The orders and the expected reads, which are also printed to stderr before anything is written.

    Raises:
        FileNotFoundError: the model's directory or files are missing.
        FileExistsError: `out_dir` exists.
        ValueError: unsupported, quantized or damaged checkpoint, a trace of another model, or a copy that
            computes other logits than the model.
        OSError: not enough disk space.
    """
    config, out = config or ReorderConfig(), Path(out_dir)
    check_new(out)
    if (trace is None) == (calibration is None):
        got = "neither" if trace is None else "both"
        raise ValueError(f"one of `calibration` and `trace` must be given, got {got}.")
    directory = local_directory(model_dir, revision=revision, variant=variant)
    quantized = open_quantized(directory, variant)
    if quantized is not None:
        if config.sidecar_only:
            raise ValueError(
                "`sidecar_only` streams from the original's weight files, which must hold plain floats, but "
                f"{directory} is quantized: leave it out."
            )
        with working_on(out) as work:
            stage = work.stage("dequantized", quantized.description)
            quantized.write(stage)
            source = open_source(stage)
            return _write(source, *_texts(source, calibration, trace, config), config, work)
    source = open_reorderable(directory, variant=variant)
    check_space(out, sum(output_bytes(source, ReorderPlan.unplaced(source, config))))
    texts = _texts(source, calibration, trace, config)
    with working_on(out) as work:
        return _write(source, *texts, config, work)


def _texts(
    source: SourceModel, calibration: Iterable[Any] | None, trace: str | Path | None, config: ReorderConfig
) -> tuple[list[Tensor], Trace | None]:
    """The calibration set as token ids, or the finished trace."""
    if trace is None:
        return cut_sequences(source, calibration or (), config), None
    traced = trace_of(source, Path(trace))
    if predictor_rank(source, config):
        traced.check_inputs()
    return [], traced


def _write(
    source: SourceModel,
    sequences: list[Tensor],
    traced: Trace | None,
    config: ReorderConfig,
    work: Workspace,
) -> ReorderPlan:
    """Trace, place and write; all in stages of `work`."""
    if traced is None:
        stage = work.stage("trace", trace_description(source, sequences, config))
        traced = trace_source(source, sequences, config, stage)
    plan = plan_orders(source, traced, config, work)
    tqdm.write(
        "expected reads per token and MLP: {reads_identity:.1f} in the model's order, {reads:.1f} in "
        "{placement} order; {activity:.1%} of the neurons active, {hot:.1%} hot".format(**plan.profile),
        file=sys.stderr,
    )
    orders = [hashlib.sha256(order.tobytes()).hexdigest() for order in plan.orders]
    written = [config.bundles, config.sketches, config.sidecar_only]
    output = work.stage(Workspace.OUTPUT, [traced.description, written, plan.hot, plan.rank, orders])
    write_copy(source, plan, traced, output)
    check_copy(source, output)
    return plan


def open_reorderable(
    model: str | Path, revision: str | None = None, variant: str | None = None
) -> SourceModel:
    """Like `open_source`, for a hub id too, but refuses a directory that is reordered already."""
    directory = local_directory(model, revision=revision, variant=variant)
    source = open_source(directory, variant)
    if (directory / SIDECAR).exists():
        raise ValueError(f"{directory} is reordered already: give the original model's directory.")
    return source


def trace_of(source: SourceModel, directory: Path) -> Trace:
    """Open a finished trace; ValueError if it is of another model."""
    trace = Trace(directory)
    expected = trace_description(source, [], ReorderConfig())
    for name in ("model", "mlps", "neurons"):
        if trace.description.get(name) != expected[name]:
            raise ValueError(
                f"{directory} must be a trace of {source.directory}, but is one of another model: "
                "trace this model."
            )
    return trace
