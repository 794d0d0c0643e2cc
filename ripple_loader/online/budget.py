"""The division of a DRAM budget: buffers first, then sketches or predictors, then the neuron cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ripple_loader.config import RippleConfig, parse_size
from ripple_loader.format.layout import SidecarHeader, Vectors
from ripple_loader.format.predictor import Predictor
from ripple_loader.format.profile import cache_shares, spread_uses
from ripple_loader.registry import CACHE_POLICIES
from ripple_loader.storage.blocks import BLOCK, align

_BUFFER_SHARE = 8
"""A read buffer takes at most an eighth of the budget: with the scratch they take at most half of it."""

_PARTS, _LEAST_BUFFER, _LARGEST_BUFFER = 8, 2 << 20, 16 << 20  # of an MLP's neurons, by default

BUFFERS = 3
"""One for computing, one for reading, and one between them when their speeds differ."""


@dataclass(frozen=True)
class Allocation:
    """The memory that Ripple holds.

    Attributes:
        budget: bytes it may hold.
        buffer: bytes of each read buffer.
        scratch: bytes of working memory for some neurons, as stored and, if that differs, in the model's
            dtype.
        rows: neurons that fit into the scratch.
        sketch_layers: layers whose sketch is resident; the others read theirs in every forward call.
        rank: of the predictors that are held instead of sketches; 0 if sketches are.
        cache_slots: cached neurons of each MLP, hot ones included.
        resident: bytes by kind.
    """

    budget: int
    buffer: int
    scratch: int
    rows: int
    sketch_layers: int
    rank: int
    cache_slots: list[int]
    resident: dict[str, int]


def rank_in_use(header: SidecarHeader, config: RippleConfig) -> int:
    """The rank of the predictors that select, 0 where sketches do.

    Raises:
        ValueError: `recall` needs predictors, but the sidecar has none.
    """
    if config.recall == 1:
        return 0
    if not header.exact_zeros:
        raise ValueError(
            f"`recall` must be 1 for this {header.model_type}, whose activations are never exactly zero: "
            "use `keep`."
        )
    if config.strategy == "dense":
        return 0
    if not header.rank:
        raise ValueError(
            "`recall` below 1 needs predictors, but the sidecar has none: reorder the model again "
            "with `predictor` above 0."
        )
    return header.rank


def needs_sketch(header: SidecarHeader, config: RippleConfig) -> bool:
    """Whether neurons are selected at all, by sketches or predictors; otherwise every one is read.

    Raises:
        ValueError: sketches would have to select them, but the sidecar has none.
    """
    wanted = header.exact_zeros or config.keep < 1
    if not wanted or header.sketches or config.recall < 1 or config.strategy == "dense":
        return wanted
    if config.keep < 1 or config.strategy == "sparse":
        raise ValueError(
            "a sidecar must have sketches to select neurons with, but this one was written without them: "
            "reorder the model again with `sketches`, or load with `keep` 1 and `strategy` auto or dense."
        )
    return False


def allocate(
    header: SidecarHeader, config: RippleConfig, dtype: torch.dtype, *, selective: bool | None = None
) -> Allocation:
    """Divide the budget.

    Args:
        header: of the sidecar to stream.
        config: the budget, and the options that need memory.
        dtype: the model's, in which neurons are computed; they are cached as they are stored.
        selective: whether neurons are selected; by default as `needs_sketch` says.

    Raises:
        ValueError: the budget is too small for the buffers and predictors, or the predictors are missing.
    """
    budget = parse_size(config.dram_budget, "dram_budget", total=header.weight_bytes)
    vectors = header.layers * 4 * Vectors.size(header.rows, header.neurons, header.hidden)
    smallest = align(header.bundle_bytes + BLOCK)  # one bundle at any offset in its blocks
    largest = header.section_bytes()["bundles"] + 2 * BLOCK
    decoded = header.rows * header.hidden * dtype.itemsize
    converted = 0 if header.encoding.stores(dtype) else decoded
    rank = rank_in_use(header, config)
    predictors = header.layers * Predictor.size(rank, header.neurons, header.hidden)
    checksums = 4 * header.layers * header.neurons if config.check_reads else 0
    affordable = (budget - vectors - predictors - checksums - align(converted)) // _BUFFER_SHARE
    wished = _fitting(header) if config.buffer == "auto" else parse_size(config.buffer, "buffer")
    buffer = max(smallest, align(min(wished, largest, affordable)))
    rows = min(header.neurons, max(1, buffer // max(header.bundle_bytes, decoded)))
    scratch = align(rows * header.bundle_bytes) + align(rows * converted)
    selecting = needs_sketch(header, config) if selective is None else selective
    resident = {
        "buffers": BUFFERS * buffer + scratch,
        "vectors": vectors,
        "predictors": predictors * selecting,
        "checksums": checksums,
        "sketch": 0,
        "index": 0,
        "cache": 0,
    }
    spare = budget - sum(resident.values())
    if spare < 0:
        raise ValueError(
            f"`dram_budget` must be at least {sum(resident.values())} bytes for this model, got {budget}: "
            "raise it."
        )
    sketch_bytes = header.section_bytes().get("sketch", 0)
    sketched = selecting and not rank and header.sketches
    sketch_layers = min(header.layers, spare // sketch_bytes) if sketched else 0
    resident["sketch"] = sketch_layers * sketch_bytes
    spare -= resident["sketch"]
    index = header.layers * header.neurons * CACHE_POLICIES[config.cache_policy].index_bytes
    cache_slots = _divide(header, max(0, (spare - index) // header.bundle_bytes), selective=selecting)
    if any(cache_slots):
        resident["index"], resident["cache"] = index, sum(cache_slots) * header.bundle_bytes
    return Allocation(budget, buffer, scratch, rows, sketch_layers, rank * selecting, cache_slots, resident)


def _fitting(header: SidecarHeader) -> int:
    """A buffer's size: each costs the same time beside its reads, and all take memory from the cache."""
    return min(max(header.section_bytes()["bundles"] // _PARTS, _LEAST_BUFFER), _LARGEST_BUFFER)


def _divide(header: SidecarHeader, slots: int, *, selective: bool) -> list[int]:
    """Slots of each MLP, by the uses in the trace; equal parts without them, or if all neurons are read."""
    uses = header.profile.get("uses")
    if not uses or not selective:
        return [min(slots // header.layers, header.neurons)] * header.layers
    return cache_shares([spread_uses(groups, header.neurons) for groups in uses], slots)
