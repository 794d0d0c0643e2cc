"""The offline stage: trace a model, place its neurons, write a streaming copy of its directory.

The copy is a standard checkpoint: rows and columns of each MLP are permuted together, which leaves its
function unchanged, and every weight file keeps its own header. Beside the weights lies the sidecar.
"""

from __future__ import annotations

import functools
import hashlib
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ripple_loader.atomic import check_new, check_space, writing_directory
from ripple_loader.bundles import SidecarWriter
from ripple_loader.checkpoint import Shard, fingerprint
from ripple_loader.config import ReorderConfig
from ripple_loader.placement import Order, expected_reads, place
from ripple_loader.sidecar import SIDECAR, SidecarHeader
from ripple_loader.source import SourceModel, open_source
from ripple_loader.trace import BitSets, calibration_sequences, trace, unpack

_HELD_BACK = 8
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ripple"}


@dataclass(frozen=True)
class Trace:
    """What the calibration text made active.

    Attributes:
        sets: active sets of each layer.
        exact_zeros: whether inactive neurons are exactly zero.
    """

    sets: list[BitSets]
    exact_zeros: bool


@dataclass(frozen=True)
class Plan:
    """An order for every layer and what it is expected to cost.

    Attributes:
        orders: one permutation a layer.
        exact_zeros: whether inactive neurons are exactly zero.
        profile: placement, tokens, share of neurons active, and reads per token and layer in the model's own
            order and in this one, counted on tokens that did not shape it.
    """

    orders: list[Order]
    exact_zeros: bool
    profile: dict[str, Any]


def reorder(
    model_dir: str | Path,
    out_dir: str | Path,
    calibration: Iterable[Any],
    config: ReorderConfig | None = None,
) -> Plan:
    """Write a streaming copy of a model: `out_dir` appears whole or not at all.

    Args:
        model_dir: a causal LM saved as safetensors in float32, float16 or bfloat16.
        out_dir: a directory that does not exist yet.
        calibration: texts, rows with a "text" or "input_ids" column, or tensors of token ids.
        config: how to trace and place.

    Returns:
        The orders and the expected reads, which are also printed to stderr before anything is written.

    Raises:
        FileNotFoundError: the model's directory or files are missing.
        FileExistsError: `out_dir` exists.
        ValueError: unsupported, quantized or damaged checkpoint.
        OSError: not enough disk space.
    """
    config = config or ReorderConfig()
    out = Path(out_dir)
    check_new(out)
    source = open_source(Path(model_dir))
    if (source.directory / SIDECAR).exists():
        raise ValueError(f"{model_dir} is reordered already: give the original model's directory.")
    check_space(out, sum(_output_bytes(source)))
    plan = plan_orders(source, trace_source(source, calibration, config), config)
    tqdm.write(
        "expected reads per token and layer: {reads_identity:.1f} in the model's order, {reads:.1f} in "
        "{placement} order; {activity:.1%} of the neurons active".format(**plan.profile),
        file=sys.stderr,
    )
    write_reordered(source, plan, out)
    return plan


def trace_source(source: SourceModel, calibration: Iterable[Any], config: ReorderConfig) -> Trace:
    """Load the model, run the calibration set through it and record its active sets.

    Memory is the model's plus tokens x layers x neurons / 8 bytes.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = functools.cache(lambda: AutoTokenizer.from_pretrained(source.directory))
    sequences = calibration_sequences(calibration, tokenizer, config.tokens, config.sequence_length)
    model = AutoModelForCausalLM.from_pretrained(source.directory, dtype="auto")
    sets = trace(
        model, source.architecture, sequences, active_share=config.active_share, tokens=config.tokens
    )
    return Trace(sets, source.architecture.find(model)[0].has_exact_zeros)


def plan_orders(source: SourceModel, trace: Trace, config: ReorderConfig) -> Plan:
    """Place the neurons of every layer."""
    orders, before, after, activity = [], [], [], []
    for layer, sets in enumerate(tqdm(trace.sets, unit="layer", desc="place")):
        held_back = np.arange(len(sets)) % _HELD_BACK == _HELD_BACK - 1
        order = place(sets[~held_back], source.neurons, layer, config)
        orders.append(order)
        before.append(expected_reads(sets[held_back], np.arange(source.neurons)))
        after.append(expected_reads(sets[held_back], order))
        activity.append(unpack(sets, source.neurons).mean())
    profile = {
        "placement": config.placement,
        "tokens": len(trace.sets[0]),
        "activity": float(np.mean(activity)),
        "reads_identity": float(np.mean(before)),
        "reads": float(np.mean(after)),
    }
    return Plan(orders, trace.exact_zeros, profile)


def write_reordered(source: SourceModel, plan: Plan, out: Path) -> None:
    """Write the permuted checkpoint and its sidecar; memory is about five copies of one layer's MLP.

    Raises:
        FileExistsError: `out` exists.
        OSError: not enough disk space.
    """
    with writing_directory(out) as partial:
        shards, sidecar = _output_bytes(source)
        check_space(partial, shards + sidecar)
        for path in sorted(source.directory.iterdir()):
            if path.is_file() and path.suffix not in _WEIGHT_FILES:
                shutil.copyfile(path, partial / path.name)
        with tqdm(total=shards + sidecar, unit="B", unit_scale=True, desc="write") as bar:
            base = {}
            for shard in source.shards:
                base[shard.path.name] = _write_shard(source, plan, shard, partial / shard.path.name, bar)
            checkpoint = fingerprint([partial / name for name in base])
            header = _sidecar_header(source, plan, checkpoint=checkpoint, base=base)
            with SidecarWriter(partial / SIDECAR, header) as writer:
                for layer, order in enumerate(plan.orders):
                    writer.write_layer(*_bundle_parts(source, layer, order), order)
                    bar.update(sidecar // source.layers)


def _output_bytes(source: SourceModel) -> tuple[int, int]:
    """Bytes of the weight files and of the sidecar, up to what the profile adds to its header."""
    base = {shard.path.name: "0" * 64 for shard in source.shards}
    header = _sidecar_header(source, Plan([], False, {}), checkpoint="0" * 64, base=base)
    return sum(shard.path.stat().st_size for shard in source.shards), header.layout().file_bytes


def _sidecar_header(
    source: SourceModel, plan: Plan, *, checkpoint: str, base: dict[str, str]
) -> SidecarHeader:
    return SidecarHeader(
        model_type=source.model_type,
        layers=source.layers,
        neurons=source.neurons,
        hidden=source.hidden,
        rows=len(source.architecture.bundle),
        dtype=source.down.dtype,
        exact_zeros=plan.exact_zeros,
        checkpoint=checkpoint,
        base=base,
        profile=plan.profile,
    )


def _bundle_parts(source: SourceModel, layer: int, order: Order) -> tuple[list[Tensor], dict[int, Tensor]]:
    """A layer's bundle rows and biases in placement order, as `SidecarWriter.write_layer` takes them."""
    rows, biases = [], {}
    places = torch.from_numpy(order)
    for row, role in enumerate(source.architecture.bundle):
        weight = source.part(layer, role, "weight")
        assert weight is not None
        rows.append(weight[places])
        bias = source.part(layer, role, "bias")
        if bias is not None:
            biases[row] = bias if role == "down" else bias[places]
    return rows, biases


def _write_shard(source: SourceModel, plan: Plan, shard: Shard, path: Path, bar: Any) -> str:
    """Copy a weight file with its MLP tensors permuted; returns the SHA-256 of the original file."""
    mlp = {name: (layer, key) for layer, names in enumerate(source.mlp) for key, name in names.items()}
    digest = hashlib.sha256(shard.header)
    with path.open("wb") as file:
        file.write(shard.header)
        for name, spot in shard.tensors.items():
            if name not in mlp:
                for chunk in spot.raw_chunks():
                    digest.update(chunk)
                    file.write(chunk)
            else:
                layer, (linear, _) = mlp[name]
                tensor = spot.read()
                digest.update(_bytes_of(tensor))
                file.write(_bytes_of(permuted(source, tensor, linear, torch.from_numpy(plan.orders[layer]))))
            bar.update(spot.stop - spot.start)
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy()).cast("B")


def permuted(source: SourceModel, tensor: Tensor, linear: str, places: Tensor) -> Tensor:
    """An MLP weight or bias with its neurons in placement order.

    Args:
        source: the model it belongs to.
        tensor: the weight or bias.
        linear: name of its linear.
        places: the model's own index of the neuron at each place, int64, shape (N,).
    """
    projection = next(p for p in source.architecture.projections.values() if p.linear == linear)
    if tensor.dim() == 1 and projection == source.architecture.down:
        return tensor
    if projection.half is not None:
        places = torch.cat([places, places + source.neurons])
    return tensor.index_select(projection.neuron_axis if tensor.dim() == 2 else 0, places)
