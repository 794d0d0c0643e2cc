"""Write the permuted checkpoint and its sidecar.

The copy is a standard checkpoint: rows and columns of each MLP are permuted together, which leaves its
function unchanged, and every weight file keeps its own header. Beside the weights lies the sidecar. With
`sidecar_only` a link to the original directory and an index of its weight files stand for the copy of these.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ripple_loader.checkpoint.shards import (
    ORIGINAL,
    Shard,
    TensorSpot,
    fingerprint,
    safetensors_name,
    sha256,
    stamp,
)
from ripple_loader.checkpoint.source import SourceModel
from ripple_loader.files import LEFTOVERS, check_space, whole_file
from ripple_loader.format.encoding import ENCODINGS, Encoding, rounding_error
from ripple_loader.format.layout import SIDECAR, SidecarHeader
from ripple_loader.format.writer import SidecarWriter
from ripple_loader.offline.orders import ReorderPlan
from ripple_loader.offline.placement import Order
from ripple_loader.offline.trace import Trace
from ripple_loader.registry import BUNDLES

_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".ripple"}
_SAMPLED_MLPS = 8


def write_copy(source: SourceModel, plan: ReorderPlan, trace: Trace, out: Path) -> None:
    """Write into `out`, keeping finished files; takes the memory of about six copies of one MLP.

    Args:
        source: the model.
        plan: its orders.
        trace: the trace of these orders; predictors are fitted to its inputs.
        out: a directory.

    Raises:
        OSError: not enough disk space.
    """
    shards, sidecar = output_bytes(source, plan)
    for path in out.glob(LEFTOVERS):
        path.unlink()
    (out / ORIGINAL).unlink(missing_ok=True)
    written = sum(path.stat().st_size for path in out.iterdir())
    check_space(out, shards + sidecar - written)
    names = _weight_files(source, plan)
    _copy_others(source, names, out)
    if plan.sidecar_only:
        (out / ORIGINAL).symlink_to(source.directory.absolute(), target_is_directory=True)
    paths = [out / name for name in names]
    with tqdm(total=shards + sidecar, unit="B", unit_scale=True, desc="write") as bar:
        base, files = {}, {}
        for shard, path in zip(source.shards, paths, strict=True):
            if plan.sidecar_only:
                base[path.name] = files[path.name] = sha256(path)
            else:
                base[shard.path.name], files[path.name] = _write_shard(source, plan, shard, path, bar)
        header = _sidecar_header(source, plan, checkpoint=fingerprint(paths), files=files, base=base)
        header = replace(header, stamps={path.name: stamp(path) for path in paths})
        with whole_file(out / SIDECAR) as partial, SidecarWriter(partial, header) as writer:
            for layer, order in enumerate(plan.orders):
                inputs = trace.inputs(layer) if plan.rank else None
                writer.write_layer(*_bundle_parts(source, layer, order), order, inputs)
                bar.update(sidecar // source.layers)


def _weight_files(source: SourceModel, plan: ReorderPlan) -> list[str]:
    """The copy's weight files, one for each of the source's; other formats become safetensors."""
    names = [shard.path.name for shard in source.shards]
    if plan.sidecar_only:
        return [f"{ORIGINAL}/{name}" for name in names]
    if source.variant is None and all(name.endswith(".safetensors") for name in names):
        return names
    return [safetensors_name(number, len(names)) for number in range(len(names))]


def _copy_others(source: SourceModel, names: list[str], out: Path) -> None:
    """Copy all files but weights, and write the index of the weight files if they need another."""
    for path in sorted(source.directory.iterdir()):
        if path.is_file() and path.suffix not in _WEIGHT_FILES and ".index." not in path.name:
            shutil.copyfile(path, out / path.name)
    form = "pytorch_model.bin" if names[0].endswith(".bin") else "model.safetensors"
    index = f"{form}.index.json"
    if names == [shard.path.name for shard in source.shards] and (source.directory / index).is_file():
        shutil.copyfile(source.directory / index, out / index)
    elif names != [form]:
        files = {
            tensor: name for shard, name in zip(source.shards, names, strict=True) for tensor in shard.tensors
        }
        size = sum(spot.stop - spot.start for spot in source.spots.values())
        (out / index).write_text(
            json.dumps({"metadata": {"total_size": size}, "weight_map": files}, indent=2)
        )


def output_bytes(source: SourceModel, plan: ReorderPlan) -> tuple[int, int]:
    """Bytes of the weight files, and of the sidecar without the profile in its header."""
    base = {shard.path.name: "0" * 64 for shard in source.shards}
    plan = replace(plan, orders=[], profile={})
    header = _sidecar_header(source, plan, checkpoint="0" * 64, files=base, base=base)
    shards = 0 if plan.sidecar_only else sum(shard.path.stat().st_size for shard in source.shards)
    return shards, header.layout().file_bytes


def stored_as(source: SourceModel, bundles: str) -> str:
    """The encoding for `ReorderConfig.bundles`, a key of `format.encoding.ENCODINGS`."""
    return BUNDLES[bundles] or source.down.dtype


def _sidecar_header(
    source: SourceModel, plan: ReorderPlan, *, checkpoint: str, files: dict[str, str], base: dict[str, str]
) -> SidecarHeader:
    dtype = stored_as(source, plan.bundles)
    error = {}
    if plan.orders and dtype != source.down.dtype:
        error["rounding_error"] = _rounding_error(source, ENCODINGS[dtype])
    return SidecarHeader(
        model_type=source.model_type,
        layers=source.layers,
        experts=source.experts,
        neurons=source.neurons,
        hidden=source.hidden,
        rows=len(source.architecture.bundle),
        dtype=dtype,
        exact_zeros=plan.exact_zeros,
        hot=plan.hot,
        rank=plan.rank,
        sketches=plan.sketches,
        checkpoint=checkpoint,
        files=files,
        base=base,
        profile=plan.profile | error,
    )


def _rounding_error(source: SourceModel, encoding: Encoding) -> float:
    """Mean relative error of the bundles' rows, over a few MLPs."""
    chosen = np.unique(np.linspace(0, source.layers - 1, _SAMPLED_MLPS).astype(int))
    parts = [source.part(layer, role, "weight") for layer in chosen for role in source.architecture.bundle]
    return float(np.mean([rounding_error(encoding, part) for part in parts if part is not None]))


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


def _write_shard(
    source: SourceModel, plan: ReorderPlan, shard: Shard, path: Path, bar: Any
) -> tuple[str, str]:
    """Copy a weight file as safetensors with its MLP tensors permuted, unless `path` is written already.

    Returns:
        The SHA-256 of the original file and of the copy.
    """
    if path.exists():
        bar.update(path.stat().st_size)
        return sha256(shard.path), sha256(path)
    before, after = hashlib.sha256(shard.header), hashlib.sha256(shard.header)

    with whole_file(path) as partial, partial.open("wb") as file:
        file.write(shard.header)
        for name, spot in shard.tensors.items():
            for original, written in _copies(source, plan, name, spot):
                before.update(original)
                after.update(written)
                file.write(written)
            bar.update(spot.stop - spot.start)
    pickled = shard.path.suffix == ".bin"  # whose own bytes are others
    return sha256(shard.path) if pickled else before.hexdigest(), after.hexdigest()


def _copies(source: SourceModel, plan: ReorderPlan, name: str, spot: TensorSpot) -> Iterator[tuple[Any, Any]]:
    """A tensor's bytes part by part: the original's and the copy's."""
    if name not in source.pieces:
        yield from ((chunk, chunk) for chunk in spot.raw_chunks())
    for piece in source.pieces.get(name, ()):
        tensor, order = piece.spot.read(), torch.from_numpy(plan.orders[piece.mlp])
        yield _bytes_of(tensor), _bytes_of(permuted(source, tensor, piece.linear, order))


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
