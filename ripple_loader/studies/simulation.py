"""Trace-driven replay: the reads that a contender issues for a real trace, and their time on a drive.

Each token reaches each MLP once: a step. Its active neurons are looked up in that MLP's cache, the missing
ones are read, and some of them are admitted. Nothing is computed, and reads do not overlap with anything: the
seconds are those of a `drive.DriveModel` for each step's reads.

Dimension key: T tokens, N neurons, S steps (layer by layer, token by token), Q reads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from ripple_loader.config import ReorderConfig
from ripple_loader.format.profile import cache_shares
from ripple_loader.offline.active_sets import BitSets, count_uses, unpack
from ripple_loader.offline.orders import hot_neurons
from ripple_loader.offline.placement import Placed, place
from ripple_loader.offline.trace import Trace
from ripple_loader.online.cache import make_cache
from ripple_loader.storage.collapse import Collapse, cheapest, fixed_gap, plan_reads
from ripple_loader.storage.devices import Device
from ripple_loader.storage.drive import DriveModel

Array = npt.NDArray[Any]


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A way to stream MLPs; the defaults are Ripple's.

    Attributes:
        placement: order of the neurons on the drive.
        cache_policy: of the neuron cache.
        shares: divide the cache over the layers by the hits expected of it, instead of in equal parts.
        collapse: read gaps between neurons where that is cheaper than another read.
        dense: read every neuron, in order; as many of them as fit stay in memory.
    """

    placement: str = "linked"
    cache_policy: str = "linked"
    shares: bool = True
    collapse: bool = True
    dense: bool = False


RIPPLE = Contender()
CONTENDERS: dict[str, Contender] = {
    "dense": Contender(placement="identity", dense=True, shares=False),
    "LLM in a Flash": Contender(placement="identity", cache_policy="lru", shares=False, collapse=False),
    "random, collapse": replace(RIPPLE, placement="random"),
    "frequency, collapse": replace(RIPPLE, placement="frequency"),
    "Ripple": RIPPLE,
}
"""The contenders of `ripple simulate`. "LLM in a Flash" (arXiv 2312.11514): bundles in model order, LRU."""


@dataclass(frozen=True)
class Workload:
    """The activity to replay.

    Attributes:
        calibration: active sets of each MLP that shape order and cache.
        replayed: those that are replayed, tokens in their order.
        neurons: N.
        bundle_bytes: bytes of a neuron.
        tokens: T; an expert sees fewer of them.
    """

    calibration: list[BitSets]
    replayed: list[BitSets]
    neurons: int
    bundle_bytes: int
    tokens: int

    @property
    def layer_bytes(self) -> int:
        return self.neurons * self.bundle_bytes

    @property
    def weight_bytes(self) -> int:
        return len(self.replayed) * self.layer_bytes


def workload_of(trace: Trace, bundle_bytes: int, tokens: int) -> Workload:
    """The last `tokens` of a trace to replay, and the others to shape order and cache.

    Raises:
        ValueError: the trace does not hold more tokens than are to be replayed.
    """
    traced = trace.description["tokens"]
    if not 0 < tokens < traced:
        raise ValueError(
            f"`tokens` must be positive and leave some of the trace's {traced} tokens to make an order "
            f"from, got {tokens}."
        )
    sets = [trace.sets(layer) for layer in range(trace.description["mlps"])]
    cuts = [round(len(one) * (1 - tokens / traced)) for one in sets]
    return Workload(
        calibration=[one[:cut] for one, cut in zip(sets, cuts, strict=True)],
        replayed=[one[cut:] for one, cut in zip(sets, cuts, strict=True)],
        neurons=trace.description["neurons"],
        bundle_bytes=bundle_bytes,
        tokens=tokens,
    )


@dataclass(frozen=True)
class Replay:
    """The reads of a contender, and how its cache did.

    Attributes:
        offsets, lengths: bytes, the layers' bundles one after the other, shape (Q,).
        step: the step of each read, ascending, shape (Q,).
        token: the token of each step, shape (S,).
        active, hits, evictions: neurons, over all steps.
    """

    offsets: Array
    lengths: Array
    step: Array
    token: Array
    active: int
    hits: int
    evictions: int

    def seconds(self, model: DriveModel) -> Array:
        """The time of each step on a drive, shape (S,); 0 for steps without reads."""
        requests = np.bincount(self.step, minlength=len(self.token))
        size = np.bincount(self.step, self.lengths, len(self.token))
        return np.where(requests > 0, model.seconds(requests, size), 0.0)


def place_all(workload: Workload, placement: str, config: ReorderConfig | None = None) -> list[Placed]:
    """The order of every MLP, from the calibration part of the trace."""
    config = replace(config or ReorderConfig(), placement=placement)
    uses = [count_uses(sets, workload.neurons) for sets in workload.calibration]
    parts = enumerate(zip(workload.calibration, hot_neurons(uses, config.hot_share), strict=True))
    return [place(sets, workload.neurons, layer, config, hot) for layer, (sets, hot) in parts]


def replay(
    workload: Workload,
    contender: Contender,
    placed: list[Placed],
    model: DriveModel,
    *,
    cache_bytes: int,
    block: int = 4096,
) -> Replay:
    """The reads that a contender issues.

    Args:
        workload: the activity.
        contender: how it is streamed.
        placed: the orders, of the contender's placement.
        model: of the drive that reads are collapsed for.
        cache_bytes: memory for neurons, over all layers.
        block: offsets and lengths of reads are multiples of it.
    """
    slots, layers = cache_bytes // workload.bundle_bytes, len(workload.replayed)
    if contender.shares:
        shares = cache_shares([count_uses(sets, workload.neurons) for sets in workload.calibration], slots)
    else:
        shares = [min(slots // layers, workload.neurons)] * layers
    collapse = cheapest(model) if contender.collapse else fixed_gap(0)
    parts = []
    for layer, order in enumerate(placed):
        base = layer * workload.layer_bytes
        if contender.dense:
            parts.append(_dense_layer(workload, layer, base, shares[layer], block))
        else:
            cached = (contender.cache_policy, shares[layer])
            parts.append(_sparse_layer(workload, layer, base, order, cached, collapse, block))
    first = np.cumsum([0, *(len(part.token) for part in parts)])
    return Replay(
        offsets=np.concatenate([part.offsets for part in parts]),
        lengths=np.concatenate([part.lengths for part in parts]),
        step=np.concatenate([part.step + start for part, start in zip(parts, first, strict=False)]),
        token=np.concatenate([part.token for part in parts]),
        active=sum(part.active for part in parts),
        hits=sum(part.hits for part in parts),
        evictions=sum(part.evictions for part in parts),
    )


def replay_contenders(
    workload: Workload,
    placed: dict[str, list[Placed]],
    device: Device,
    *,
    cache_share: float,
    policies: Iterable[str] = (),
) -> dict[str, Replay]:
    """The reads of all `CONTENDERS` on a device.

    Args:
        workload: the activity.
        placed: from `place_contenders`.
        device: the drive.
        cache_share: memory for neurons, as a share of all of them.
        policies: further policies of Ripple's cache, by their registered names.
    """
    others = {f"Ripple, {policy} cache": replace(RIPPLE, cache_policy=policy) for policy in policies}
    size = int(cache_share * workload.weight_bytes)
    return {
        name: replay(
            workload,
            contender,
            placed[contender.placement],
            device.model,
            cache_bytes=size,
            block=device.block,
        )
        for name, contender in (CONTENDERS | others).items()
    }


def place_contenders(workload: Workload) -> dict[str, list[Placed]]:
    """The orders of all `CONTENDERS`, by placement."""
    placements = sorted({contender.placement for contender in CONTENDERS.values()})
    return {placement: place_all(workload, placement) for placement in placements}


def _dense_layer(workload: Workload, layer: int, base: int, resident: int, block: int) -> Replay:
    tokens = len(workload.replayed[layer])
    reads = np.arange(tokens if resident < workload.neurons else 0)
    first = (base + resident * workload.bundle_bytes) // block * block
    last = -(-(base + workload.layer_bytes) // block) * block
    return Replay(
        offsets=np.full(len(reads), first),
        lengths=np.full(len(reads), last - first),
        step=reads,
        token=np.arange(tokens),
        active=tokens * workload.neurons,
        hits=tokens * resident,
        evictions=0,
    )


def _sparse_layer(
    workload: Workload,
    layer: int,
    base: int,
    placed: Placed,
    cached: tuple[str, int],
    collapse: Collapse,
    block: int,
) -> Replay:
    sets, width = workload.replayed[layer], workload.bundle_bytes
    token, spot = np.nonzero(unpack(sets, workload.neurons)[:, placed.order])
    policy, slots = cached
    cache = make_cache(policy, workload.neurons, slots, min(placed.hot, slots))
    plans, step, hits = [], [], 0
    for number, places in enumerate(np.split(spot, np.searchsorted(token, np.arange(1, len(sets))))):
        missing = places[cache.lookup(places) < 0]
        hits += len(places) - len(missing)
        if len(missing):
            plans.append(plan_reads(missing, base=base, width=width, block=block, collapse=collapse))
            step.append(np.full(len(plans[-1].lengths), number))
            cache.offer(missing)
    return Replay(
        offsets=_joined(plan.offsets for plan in plans),
        lengths=_joined(plan.lengths for plan in plans),
        step=_joined(step),
        token=np.arange(len(sets)),
        active=len(spot),
        hits=hits,
        evictions=cache.evictions,
    )


def _joined(parts: Iterable[Array]) -> Array:
    return np.concatenate([np.empty(0, np.int64), *parts])


def summarise(replay: Replay, tokens: int, model: DriveModel) -> dict[str, float]:
    """Milliseconds a token, mean and 95th percentile; ms, reads, KiB, evictions a step; hits; MB/s."""
    seconds, steps = replay.seconds(model), len(replay.token)
    by_token = np.bincount(replay.token, seconds, tokens)
    return {
        "ms_per_token": float(by_token.mean() * 1e3),
        "ms_per_token_p95": float(np.quantile(by_token, 0.95) * 1e3),
        "ms_per_layer": float(seconds.mean() * 1e3),
        "reads": len(replay.lengths) / steps,
        "KiB": float(replay.lengths.sum()) / steps / 2**10,
        "hits": replay.hits / max(1, replay.active),
        "evictions": replay.evictions / steps,
        "MB_per_s": float(replay.lengths.sum() / max(float(seconds.sum()), 1e-12) / 1e6),
    }
