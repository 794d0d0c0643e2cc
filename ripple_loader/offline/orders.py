"""Orders for all MLPs of a model, and their expected reads.

An eighth of the traced tokens is held out from the orders, to count their reads on.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ripple_loader.checkpoint.source import SourceModel
from ripple_loader.config import ReorderConfig
from ripple_loader.files import Workspace, whole_file
from ripple_loader.format.predictor import rank_of
from ripple_loader.format.profile import cache_shares, grouped_uses
from ripple_loader.offline.active_sets import BitSets, count_uses, unpack_in_parts
from ripple_loader.offline.coactivation import Indices
from ripple_loader.offline.placement import Order, Placed, place
from ripple_loader.offline.trace import Trace

_COUNTED_EVERY = 8  # tokens; every eighth is held out from the orders, to count their reads on
_PLACING = ("placement", "partners", "two_opt", "hot_share", "seed")


@dataclass(frozen=True)
class ReorderPlan:
    """An order for every MLP and its expected reads.

    Attributes:
        orders: one permutation an MLP.
        hot: how many of its first places hold neurons that stay in memory.
        exact_zeros: whether inactive neurons are exactly zero.
        bundles: the encoding of the sidecar, see `ReorderConfig`.
        rank: of the predictors; 0 without them.
        sketches, sidecar_only: see `ReorderConfig`.
        profile: placement, tokens, share of neurons active, share of them hot, and reads per token and MLP in
            the model's own order and in this one, without the hot neurons, counted on tokens that did not
            shape it; "uses", for each MLP: see `grouped_uses`.
    """

    orders: list[Order]
    hot: list[int]
    exact_zeros: bool
    bundles: str
    rank: int
    profile: dict[str, Any]
    sketches: bool = True
    sidecar_only: bool = False

    @classmethod
    def unplaced(cls, source: SourceModel, config: ReorderConfig) -> ReorderPlan:
        """A plan without orders, which has the sizes of one that has them."""
        return cls(
            orders=[],
            hot=[0] * source.layers,
            exact_zeros=source.exact_zeros,
            bundles=config.bundles,
            rank=predictor_rank(source, config),
            profile={},
            sketches=config.sketches,
            sidecar_only=config.sidecar_only,
        )


def hot_neurons(uses: list[Indices], share: float) -> list[int]:
    """The number of hot neurons of each MLP: together the most active share of all MLPs' neurons.

    Args:
        uses: tokens that each neuron is active for, shape (N,), by MLP; unused neurons cannot be hot.
        share: from 0 to 1.
    """
    active = sum(int(np.count_nonzero(one)) for one in uses)
    return cache_shares(uses, min(active, round(share * sum(len(one) for one in uses))))


def most_active(counts: Indices, hot: int) -> npt.NDArray[np.bool_]:
    """A mask of the `hot` most active neurons; the first of equally active ones."""
    mask_N = np.zeros(len(counts), bool)
    mask_N[np.argsort(-counts, kind="stable")[:hot]] = True
    return mask_N


def expected_reads(sets: BitSets, order: Order, in_memory: npt.NDArray[np.bool_] | None = None) -> float:
    """Reads per token that `order` needs: the mean number of runs of active neurons, without merging.

    Args:
        sets: active sets to count on.
        order: a permutation of the layer's neurons.
        in_memory: neurons that need no reads, in the model's own order, bool of shape (N,).
    """
    total = 0
    for _, active_TN in unpack_in_parts(sets, len(order)):
        if in_memory is not None:
            active_TN[:, in_memory] = 0
        starts: Any = np.diff(active_TN[:, order].astype(np.int8), axis=1, prepend=np.int8(0)) == 1
        total += int(starts.sum())
    return total / len(sets) if len(sets) else 0.0


def plan_orders(source: SourceModel, trace: Trace, config: ReorderConfig, work: Workspace) -> ReorderPlan:
    """Place the neurons of every MLP, several at once; orders that `work` holds already are kept."""
    settings = {name: value for name, value in asdict(config).items() if name in _PLACING}
    stage = work.stage("orders", [trace.description, settings])

    def shaping(layer: int) -> Any:
        """The tokens that determine an MLP's order; its reads are counted on the others."""
        sets = trace.sets(layer)
        return sets[np.arange(len(sets)) % _COUNTED_EVERY != _COUNTED_EVERY - 1]

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
    return replace(
        ReorderPlan.unplaced(source, config),
        orders=[one.order for one in placed],
        hot=[one.hot for one in placed],
        exact_zeros=trace.exact_zeros,
        profile={
            "placement": config.placement,
            "tokens": trace.description["tokens"],
            **profile,
            "uses": uses,
        },
    )


def predictor_rank(source: SourceModel, config: ReorderConfig) -> int:
    """The rank of the predictors; 0 for a model without exact zeros, which has no predictors."""
    return rank_of(source.hidden, config.predictor) if source.exact_zeros else 0


def _cost(sets: Any, placed: Placed) -> dict[str, Any]:
    """Figures of one MLP's order, with the reads of all but hot neurons; the profile holds their means."""
    order, held_out = placed.order, sets[_COUNTED_EVERY - 1 :: _COUNTED_EVERY]
    hot = np.zeros(len(order), bool)
    hot[order[: placed.hot]] = True
    counts = count_uses(sets, len(order))
    return {
        "tokens": len(sets),
        "uses": grouped_uses(counts),
        "activity": float(counts.sum()) / max(1, len(sets) * len(order)),
        "hot": float(hot.mean()),
        "reads_identity": expected_reads(held_out, np.arange(len(order)), hot),
        "reads": expected_reads(held_out, order, hot),
    }
