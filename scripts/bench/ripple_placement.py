"""Orders of an artificial layer's neurons compared: expected reads, and what placing a layer costs.

    python scripts/bench/ripple_placement.py [--neurons 16384] [--tokens 2048]

The neurons are in two of 600 groups of uneven frequency, and about 7% of them active. Reads are runs of
active neurons on an eighth of the tokens that did not shape the order, without cache or merging, hot neurons
left out. "sampled" proposes partners from an eighth of the tokens or fewer, which makes wide layers quick;
its reads beside those of the whole product are what that costs. `ripple reorder` prints a model's reads.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
from common import Table, parse
from harness import Race

from ripple_loader import ReorderConfig
from ripple_loader.offline.active_sets import BitSets, count_uses
from ripple_loader.offline.coactivation import coactivation, sampled_tokens
from ripple_loader.offline.linking import greedy_linking
from ripple_loader.offline.orders import expected_reads, hot_neurons, most_active
from ripple_loader.offline.placement import LayerActivity, Order
from ripple_loader.offline.spectral import spectral_order
from ripple_loader.offline.two_opt import two_opt
from ripple_loader.registry import PLACEMENTS

HELD_BACK, PARTNERS, GROUPS = 8, 32, 600


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


def placed(name: str, layer: LayerActivity) -> Order:
    return PLACEMENTS[name](replace(layer)).order


def linked(layer: LayerActivity, sample: int, *, improve: bool) -> Order:
    """Greedy linking of all neurons, with a sample of the tokens proposing partners in its first round."""
    layer = replace(layer, hot=0)
    graph = coactivation(layer.activity, PARTNERS, layer.linkable, sample=sample)
    order = greedy_linking(layer.activity, layer.linkable, PARTNERS, graph)
    return two_opt(order, layer.activity, graph) if improve else order


def spectral(layer: LayerActivity) -> Order:
    layer = replace(layer, hot=0)
    return spectral_order(layer.graph, layer.linkable)


def orders_of(layer: LayerActivity, quick: int, whole: int) -> dict[str, Callable[[], Order]]:
    """What makes each contender's order of a layer, each from what nothing was computed for yet."""
    orders: dict[str, Callable[[LayerActivity], Order]] = {
        **{name: partial(placed, name) for name in ("identity", "random", "frequency")},
        "spectral": spectral,
        "linked, sampled": partial(linked, sample=quick, improve=False),
        "linked, whole product": partial(linked, sample=whole, improve=False),
        "linked, sampled, 2-opt": partial(linked, sample=quick, improve=True),
        "linked, whole product, 2-opt": partial(linked, sample=whole, improve=True),
        "as reorder does it": partial(placed, "linked"),
    }
    return {name: partial(order, layer) for name, order in orders.items()}


def main() -> None:
    options = parse(__doc__, neurons=16384, tokens=2048, threads=1)
    sets, config = synthetic(options.neurons, options.tokens), ReorderConfig(partners=PARTNERS)
    held_back = np.arange(len(sets)) % HELD_BACK == HELD_BACK - 1
    uses = count_uses(sets[~held_back], options.neurons)
    (hot,) = hot_neurons([uses], config.hot_share)
    quick = min(sampled_tokens(len(sets), options.neurons), len(sets) // 8)
    layer = LayerActivity(sets[~held_back], options.neurons, 0, config, hot)
    # CPU seconds of work that starts from nothing: no untimed calls.
    times = Race(orders_of(layer, quick, len(sets)), equal=None, keep=True).run(1, untimed=0)
    table = Table(
        "ripple_placement",
        "Ripple: orders of a layer's neurons",
        f"synthetic, {options}, {PARTNERS} partners; {np.unpackbits(sets).mean():.1%} active; sample of "
        f"{quick} tokens of {(~held_back).sum()}",
    )
    in_memory = most_active(uses, hot)
    reads = {name: expected_reads(sets[held_back], each[0].result, in_memory) for name, each in times.items()}
    for name, (made,) in times.items():
        share = reads[name] / reads["identity"]
        table.add(name, reads=reads[name], of_identity=share, CPU_seconds_a_layer=made.process)
    table.finish()


if __name__ == "__main__":
    main()
