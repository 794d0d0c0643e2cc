"""Orders for all MLPs of a model, and what they are expected to cost.

An eighth of the traced tokens is held back from the orders, to count their reads on.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from ripple_loader.checkpoint.source import SourceModel
from ripple_loader.config import ReorderConfig
from ripple_loader.files import Workspace, whole_file
from ripple_loader.format.predictor import rank_of
from ripple_loader.format.profile import cache_shares, grouped_uses
from ripple_loader.offline.active_sets import BitSets, count_uses, unpack
from ripple_loader.offline.coactivation import Indices
from ripple_loader.offline.placement import Order, Placed, place
from ripple_loader.offline.trace import Trace

_HELD_BACK = 8  # every eighth token
_PLACING = ("placement", "partners", "two_opt", "hot_share", "seed")
_TOKENS_AT_ONCE = 1024


@dataclass(frozen=True)
class ReorderPlan:
    """An order for every MLP and what it is expected to cost.

    Attributes:
        orders: one permutation an MLP.
        hot: how many of its first places hold neurons that stay in memory.
        exact_zeros: whether inactive neurons are exactly zero.
        bundles: how the sidecar stores weights, see `ReorderConfig`.
        rank: of the predictors, 0 for none.
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


def hot_neurons(uses: list[Indices], share: float) -> list[int]:
    """How many neurons of each MLP are hot: of those of all MLPs, the share that is active most often.

    Args:
        uses: for how many tokens each neuron is active, shape (N,), by MLP; one that never is cannot be hot.
        share: from 0 to 1.
    """
    active = sum(int(np.count_nonzero(one)) for one in uses)
    return cache_shares(uses, min(active, round(share * sum(len(one) for one in uses))))


def most_active(counts: Indices, hot: int) -> npt.NDArray[np.bool_]:
    """Which neurons are the so many most active ones; of equals the first."""
    found = np.zeros(len(counts), bool)
    found[np.argsort(-counts, kind="stable")[:hot]] = True
    return found


def expected_reads(sets: BitSets, order: Order, left_out: npt.NDArray[np.bool_] | None = None) -> float:
    """Reads per token that `order` needs: the mean number of runs of active neurons, without merging.

    Args:
        sets: active sets to count on.
        order: a permutation of the layer's neurons.
        left_out: neurons that are in memory, by their own index, bool of shape (N,).
    """
    total = 0
    for start in range(0, len(sets), _TOKENS_AT_ONCE):
        active_TN = unpack(sets[start : start + _TOKENS_AT_ONCE], len(order))
        if left_out is not None:
            active_TN[:, left_out] = 0
        starts: Any = np.diff(active_TN[:, order].astype(np.int8), axis=1, prepend=np.int8(0)) == 1
        total += int(starts.sum())
    return total / len(sets) if len(sets) else 0.0


def plan_orders(source: SourceModel, trace: Trace, config: ReorderConfig, work: Workspace) -> ReorderPlan:
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
    return ReorderPlan(
        orders=[one.order for one in placed],
        hot=[one.hot for one in placed],
        exact_zeros=trace.exact_zeros,
        bundles=config.bundles,
        rank=predictor_rank(source, config),
        profile={
            "placement": config.placement,
            "tokens": trace.description["tokens"],
            **profile,
            "uses": uses,
        },
    )


def predictor_rank(source: SourceModel, config: ReorderConfig) -> int:
    """Of the predictors, which only a model with exact zeros has."""
    return rank_of(source.hidden, config.predictor) if source.exact_zeros else 0


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
