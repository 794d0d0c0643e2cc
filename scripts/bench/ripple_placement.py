"""Orders of neurons compared: expected reads, and what placing a layer costs.

    python scripts/bench/ripple_placement.py --model .cache/relu-lm [--tokens 4096] [--layers 4]
    python scripts/bench/ripple_placement.py --synthetic 16384 [--tokens 8192]

Reads are runs of active neurons on an eighth of the tokens that did not shape the order, without cache or
merging, hot neurons left out. "sampled" proposes partners from an eighth of the tokens or fewer, which makes
wide layers quick; its reads beside those of the whole product are what that costs. The synthetic layer has
neurons in two of 600 groups of uneven frequency, and about 7% of them active.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Table  # also makes `assets` importable

from ripple_loader import ReorderConfig
from ripple_loader.checkpoint.source import open_source
from ripple_loader.offline.active_sets import BitSets, count_uses
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.coactivation import Activity, coactivation, sampled_tokens
from ripple_loader.offline.linking import greedy_linking
from ripple_loader.offline.orders import expected_reads, hot_neurons, most_active
from ripple_loader.offline.placement import Order, place
from ripple_loader.offline.spectral import spectral_order
from ripple_loader.offline.trace import trace_source
from ripple_loader.offline.two_opt import two_opt

HELD_BACK, PARTNERS, GROUPS = 8, 32, 600


def traced(directory: Path, tokens: int, layers: int, active_share: float) -> tuple[list[BitSets], int]:
    """Active sets of some layers of a model, spread over its depth, and its neurons a layer."""
    import assets

    source = open_source(directory)
    config = ReorderConfig(tokens=tokens, active_share=active_share)
    with tempfile.TemporaryDirectory() as scratch:
        sequences = cut_sequences(source, assets.texts("train"), config)
        found = trace_source(source, sequences, config, Path(scratch))
        chosen = np.unique(np.linspace(0, source.layers - 1, layers).astype(int))
        return [found.sets(layer) for layer in chosen.tolist()], source.neurons


def synthetic(neurons: int, tokens: int) -> BitSets:
    """A layer whose neurons belong to groups that come and go together."""
    random = np.random.default_rng(0)
    frequency = np.clip(0.02 + 0.03 * random.pareto(2.5, GROUPS), 0, 0.6)
    groups = random.random((tokens, GROUPS)) < frequency
    member = random.integers(0, GROUPS, (2, neurons))
    alone = np.clip(0.02 * random.pareto(3, neurons), 0, 1)
    rows = []
    for row in groups:
        active = (row[member[0]] | row[member[1]]) & (random.random(neurons) < 0.7)
        rows.append(np.packbits(active | (random.random(neurons) < alone)))
    return np.stack(rows)


def linked(sets: BitSets, neurons: int, sample: int | None, *, improve: bool) -> Order:
    """Greedy linking of all neurons, with a sample of the tokens proposing partners in its first round."""
    activity, everyone = Activity(sets, neurons), np.arange(neurons)
    graph = coactivation(activity, PARTNERS, everyone, sample=sample)
    order = greedy_linking(activity, everyone, PARTNERS, graph)
    return two_opt(order, activity, graph) if improve else order


def main(layers: list[BitSets], neurons: int, conditions: str) -> None:
    whole = len(layers[0])
    quick = min(sampled_tokens(whole, neurons), whole // 8)

    held_back = np.arange(whole) % HELD_BACK == HELD_BACK - 1
    uses = [count_uses(sets[~held_back], neurons) for sets in layers]
    hot = hot_neurons(uses, ReorderConfig().hot_share)

    def placed(placement: str, **options: bool) -> Callable[[BitSets, int], Order]:
        config = ReorderConfig(placement=placement, partners=PARTNERS, **options)  # type: ignore[arg-type]
        return lambda sets, layer: place(sets, neurons, layer, config, hot[layer]).order

    def spectral(sets: BitSets, _: int) -> Order:
        return spectral_order(coactivation(Activity(sets, neurons), PARTNERS), np.arange(neurons))

    contenders: dict[str, Callable[[BitSets, int], Order]] = {
        "identity": placed("identity"),
        "random": placed("random"),
        "frequency": placed("frequency"),
        "spectral": spectral,
        "linked, sampled": lambda sets, _: linked(sets, neurons, quick, improve=False),
        "linked, whole product": lambda sets, _: linked(sets, neurons, whole, improve=False),
        "linked, sampled, 2-opt": lambda sets, _: linked(sets, neurons, quick, improve=True),
        "linked, whole product, 2-opt": lambda sets, _: linked(sets, neurons, whole, improve=True),
        "as reorder does it": placed("linked"),
    }
    table = Table("ripple_placement", "Ripple: orders of a layer's neurons", conditions)
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    reads: dict[str, list[float]] = {name: [] for name in contenders}
    for layer, sets in enumerate(layers):
        in_memory = most_active(uses[layer], hot[layer])
        for name, order_of in contenders.items():
            start = time.process_time()
            order = order_of(sets[~held_back], layer)
            seconds[name].append(time.process_time() - start)
            reads[name].append(expected_reads(sets[held_back], order, in_memory))
    base = statistics.mean(reads["identity"])
    for name in contenders:
        mean = statistics.mean(reads[name])
        table.add(
            name, reads=mean, of_identity=mean / base, CPU_seconds_a_layer=statistics.median(seconds[name])
        )
    activity = statistics.mean(float(np.unpackbits(sets).mean()) for sets in layers)
    table.config += f"; {activity:.1%} active; sample of {quick} tokens of {whole - whole // HELD_BACK}"
    table.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="model directory to trace")
    parser.add_argument("--synthetic", type=int, help="neurons of a made-up layer instead")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=4, help="layers of the model to place")
    parser.add_argument("--active-share", type=float, default=0.25, help="where there are no exact zeros")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.synthetic:
        found, width, what = (
            [synthetic(arguments.synthetic, arguments.tokens)],
            arguments.synthetic,
            "synthetic",
        )
    elif arguments.model:
        found, width = traced(arguments.model, arguments.tokens, arguments.layers, arguments.active_share)
        what = arguments.model.name
    else:
        parser.error("one of --model and --synthetic should be given")
    described = f"{what}, {len(found)} layers of {width} neurons, {len(found[0])} tokens"
    main(found, width, f"{described}, {PARTNERS} partners, {arguments.threads} threads")
