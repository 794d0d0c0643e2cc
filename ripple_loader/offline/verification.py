"""Prove that a reordered directory is whole and lost nothing of the original."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from ripple_loader.checkpoint.dequantizing import open_quantized
from ripple_loader.checkpoint.hub import local_directory
from ripple_loader.checkpoint.shards import DTYPES, sha256
from ripple_loader.checkpoint.source import SourceModel, open_source
from ripple_loader.config import RippleConfig
from ripple_loader.format.bundles import pack_bundles
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.model.classes import text_inputs
from ripple_loader.offline.reference import bundled, load_reference
from ripple_loader.offline.writing import permuted

_TOKENS = 32
_BUDGET = "256MiB"
_COPY_TOLERANCE = 1e-3
_TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}


def verify(
    directory: str | Path, original: str | Path | None = None, *, revision: str | None = None
) -> Iterator[tuple[str, str]]:
    """Run the checks one by one; yields the name and the result of each that holds.

    Args:
        directory: a reordered directory.
        original: directory or hub id of the original model; without it only integrity is checked.
        revision: branch, tag or commit of the original's hub id.

    Raises:
        FileNotFoundError: a directory or file is missing.
        ValueError: a check fails; names the file and the difference.
    """
    sidecar = Sidecar(directory)
    sidecar.verify()
    yield "checksums", f"{sidecar.layout.checksums} hold"
    copy = open_source(Path(directory))
    for shard in copy.shards:
        if sha256(shard.path) != sidecar.header.files.get(shard.path.name):
            raise ValueError(
                f"{shard.path} must be as `ripple reorder` wrote it, but it was changed or damaged: "
                "reorder the model again."
            )
    yield "files", f"SHA-256 of {len(copy.shards)} weight files as written"
    orders = [_order(sidecar, layer) for layer in range(sidecar.header.layers)]
    unmoved = [torch.arange(sidecar.header.neurons)] * copy.layers
    in_original_order = sidecar.header.in_original_order
    for layer, order in enumerate(orders if in_original_order else unmoved):
        _check_bundles(sidecar, copy, layer, order)
    yield "bundles", f"equal the weights beside them, {copy.layers} layers of {copy.neurons} neurons"
    if original is None:
        return
    in_files = unmoved if in_original_order else orders
    path = local_directory(original, revision=revision)
    quantized = open_quantized(path)
    if quantized is None:
        yield from _compare(sidecar, copy, open_source(path), in_files)
        return
    with TemporaryDirectory(prefix=".ripple-", dir=Path(directory).absolute().parent) as plain:
        quantized.write(Path(plain))
        yield from _compare(sidecar, copy, open_source(Path(plain)), in_files)


def _compare(
    sidecar: Sidecar, copy: SourceModel, source: SourceModel, orders: list[Tensor]
) -> Iterator[tuple[str, str]]:
    """The checks against the original, dequantized if it is quantized."""
    for shard in source.shards:
        if sha256(shard.path) != sidecar.header.base.get(shard.path.name):
            raise ValueError(
                f"{copy.directory} must be made from {shard.path}, but that file differs from its source."
            )
    yield "original", f"SHA-256 of {len(source.shards)} files as recorded"
    _check_tensors(source, copy, orders)
    yield "tensors", f"{len(source.spots)} equal the original's, MLPs up to the order of their neurons"
    rounded = sidecar.header.dtype != source.down.dtype
    yield from _check_logits(source, copy, sidecar.header.dtype if rounded else None)


def _order(sidecar: Sidecar, layer: int) -> Tensor:
    order = torch.from_numpy(sidecar.permutation(layer)).long()
    if not torch.equal(order.sort().values, torch.arange(sidecar.header.neurons, device="cpu")):
        raise ValueError(f"{sidecar.path} must order each neuron of layer {layer} once, but does not.")
    return order


def _check_bundles(sidecar: Sidecar, copy: SourceModel, layer: int, order: Tensor) -> None:
    """Compare the bundles with the weights beside them, whose neurons are put in this order."""
    rows = [copy.part(layer, role, "weight") for role in copy.architecture.bundle]
    weights = [weight_NH[order] for weight_NH in rows if weight_NH is not None]
    if not torch.equal(sidecar.bundles(layer), pack_bundles(weights, sidecar.header.encoding)):
        raise ValueError(f"{sidecar.path} must hold the weights of MLP {layer} beside it, but they differ.")


def _check_tensors(source: SourceModel, copy: SourceModel, orders: list[Tensor]) -> None:
    for name, spot in source.spots.items():
        if name not in copy.spots:
            raise ValueError(f"{copy.directory} must hold the tensor {name}, but does not.")
        if name in source.pieces:
            same = all(
                torch.equal(permuted(source, a.spot.read(), a.linear, orders[a.mlp]), b.spot.read())
                for a, b in zip(source.pieces[name], copy.pieces[name], strict=True)
            )
        else:
            same = all(a == b for a, b in zip(spot.raw_chunks(), copy.spots[name].raw_chunks(), strict=True))
        if not same:
            raise ValueError(f"{copy.directory} must hold the original's {name}, but it differs.")


def _check_logits(
    source: SourceModel, copy: SourceModel, rounded_to: str | None
) -> Iterator[tuple[str, str]]:
    """Compare the original's logits with those of the copy, from its weight files and from the sidecar.

    No model is ever whole in memory. If the bundles are rounded, the difference of the streamed logits is
    reported, not checked.
    """
    reference = _logits(load_reference(source))
    tolerance = _TOLERANCE[DTYPES[source.down.dtype]]
    loaders = {
        "logits": lambda: load_reference(copy),
        "streamed logits": lambda: _streamed(copy, "auto"),
    }
    for kind, load in loaders.items():
        error = _difference(_logits(load()), reference)
        if rounded_to is not None and kind == "streamed logits":
            yield kind, f"differ by {error:.1e} (relative), because the bundles are rounded to {rounded_to}"
            continue
        if not error <= tolerance:
            raise ValueError(
                f"the {kind} of {copy.directory} must be within {tolerance:.0e} of the original's, "
                f"got {error:.1e}."
            )
        yield kind, f"within {error:.1e} of the original's (relative, {_TOKENS} random tokens)"


def check_copy(source: SourceModel, directory: Path) -> None:
    """Compare the logits of a few tokens: the stock model's with the copy's, from its files and streamed.

    Computed in float32, so that rounding cannot hide or feign a difference, with one layer's MLP in memory.

    Raises:
        ValueError: the copy computes something else.
    """
    copy, sidecar = open_source(directory), Sidecar(directory)
    reference = _logits(load_reference(source, dtype=torch.float32))
    stored = _logits(load_reference(copy, dtype=torch.float32))
    rounded = sidecar.header.dtype != source.down.dtype
    wanted = reference
    if rounded:
        wanted = _logits(load_reference(copy, bundled(sidecar, copy), dtype=torch.float32))
    streamed = _logits(_streamed(copy, torch.float32))
    for kind, got, expected in (("files", stored, reference), ("sidecar", streamed, wanted)):
        error = _difference(got, expected)
        if not error <= _COPY_TOLERANCE:
            raise ValueError(
                f"the {source.model_type} must compute the same from the {kind} of the copy, but its logits "
                f"differ by {error:.1e} (relative): the entry in ripple_loader.model.architectures does "
                "not describe its MLPs."
            )


def _difference(got: Tensor, expected: Tensor) -> float:
    """The largest difference, relative to the largest value; values that are not finite must be equal."""
    same = (got == expected) | (got.isnan() & expected.isnan())
    scale = expected[expected.isfinite()].abs().amax() if expected.isfinite().any() else 1.0
    return float(torch.where(same, 0.0, (got - expected).abs() / scale).amax())


def _streamed(copy: SourceModel, dtype: torch.dtype | str) -> Any:
    config = RippleConfig(dram_budget=_BUDGET)
    return copy.loader.from_pretrained(copy.directory, dtype=dtype, quantization_config=config)


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    """Logits of random tokens, float32."""
    generator = torch.Generator().manual_seed(0)
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (1, _TOKENS), generator=generator)
    return model(**text_inputs(model.config, ids), use_cache=False).logits.float()
