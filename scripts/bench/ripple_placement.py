"""Orders of neurons compared: expected reads, and what placing a layer costs.

    python scripts/bench/ripple_placement.py --model .cache/relu-lm [--tokens 4096] [--layers 4]
    python scripts/bench/ripple_placement.py --synthetic 16384 [--tokens 8192]

Reads are runs of active neurons on an eighth of the tokens that did not shape the order, without cache or
merging, hot neurons left out. "sampled" proposes partners from an eighth of the tokens or fewer, which makes
wide layers quick; its reads beside those of the whole product are what that costs. The synthetic layer has
neurons in two of 600 groups of uneven frequency, and about 7% of them active.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from common import Table, option, parse
from harness import Race
from ripple_parts import trace_of

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


def traced(directory: Path, tokens: int, layers: int, active_share: float) -> tuple[list[BitSets], int]:
    """Active sets of some layers of a model, spread over its depth, and its neurons a layer."""
    with tempfile.TemporaryDirectory() as folder:
        trace = trace_of(directory, ReorderConfig(tokens=tokens, active_share=active_share), Path(folder))
        chosen = np.unique(np.linspace(0, trace.description["mlps"] - 1, layers).astype(int))
        return [trace.sets(layer) for layer in chosen.tolist()], trace.description["neurons"]


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


def spectral(layer: LayerActivity) -> Order:
    return spectral_order(layer.graph, layer.linkable)


def linked(layer: LayerActivity, sample: int, *, improve: bool) -> Order:
    """Greedy linking of all neurons, with a sample of the tokens proposing partners in its first round."""
    graph = coactivation(layer.activity, PARTNERS, layer.linkable, sample=sample)
    order = greedy_linking(layer.activity, layer.linkable, PARTNERS, graph)
    return two_opt(order, layer.activity, graph) if improve else order


def orders_of(layer: LayerActivity, quick: int, whole: int) -> dict[str, Callable[[], Order]]:
    """What makes each contender's order of a layer, each from what nothing was computed for yet."""

    def placed(name: str) -> Callable[[], Order]:
        return lambda: PLACEMENTS[name](replace(layer)).order

    everyone = replace(layer, hot=0)
    return {
        "identity": placed("identity"),
        "random": placed("random"),
        "frequency": placed("frequency"),
        "spectral": lambda: spectral(replace(everyone)),
        "linked, sampled": lambda: linked(replace(everyone), quick, improve=False),
        "linked, whole product": lambda: linked(replace(everyone), whole, improve=False),
        "linked, sampled, 2-opt": lambda: linked(replace(everyone), quick, improve=True),
        "linked, whole product, 2-opt": lambda: linked(replace(everyone), whole, improve=True),
        "as reorder does it": placed("linked"),
    }


def main() -> None:
    options = parse(
        __doc__,
        model=option(Path, "model directory to trace"),
        synthetic=option(0, "neurons of a made-up layer instead"),
        tokens=4096,
        layers=option(4, "layers of the model to place"),
        active_share=option(0.25, "where there are no exact zeros"),
        threads=1,
    )
    if options.synthetic:
        layers, neurons = [synthetic(options.synthetic, options.tokens)], options.synthetic
    elif options.model:
        layers, neurons = traced(options.model, options.tokens, options.layers, options.active_share)
    else:
        raise SystemExit("ripple_placement: one of --model and --synthetic must be given.")
    whole = len(layers[0])
    held_back = np.arange(whole) % HELD_BACK == HELD_BACK - 1
    uses = [count_uses(sets[~held_back], neurons) for sets in layers]
    config = ReorderConfig(partners=PARTNERS)
    hot = hot_neurons(uses, config.hot_share)
    quick = min(sampled_tokens(whole, neurons), whole // 8)
    rows: dict[str, list[tuple[float, float]]] = {}
    for layer, sets in enumerate(layers):
        in_memory = most_active(uses[layer], hot[layer])
        activity = LayerActivity(sets[~held_back], neurons, layer, config, hot[layer])
        race = Race(orders_of(activity, quick, whole), equal=None, keep=True)
        # CPU seconds of work that starts from nothing: no untimed calls.
        for name, (made,) in race.run(1, untimed=0).items():
            reads = expected_reads(sets[held_back], made.result, in_memory)
            rows.setdefault(name, []).append((reads, made.process))
    share = statistics.mean(float(np.unpackbits(sets).mean()) for sets in layers)
    table = Table(
        "ripple_placement",
        "Ripple: orders of a layer's neurons",
        f"{'synthetic' if options.synthetic else options.model.name}, {len(layers)} layers of {neurons} "
        f"neurons, {whole} tokens, {PARTNERS} partners, {options.threads} threads; {share:.1%} active; "
        f"sample of {quick} tokens of {whole - whole // HELD_BACK}",
    )
    base = statistics.mean(reads for reads, _ in rows["identity"])
    for name, each in rows.items():
        reads, seconds = zip(*each, strict=True)
        share = statistics.mean(reads) / base
        cpu = statistics.median(seconds)
        table.add(name, reads=share * base, of_identity=share, CPU_seconds_a_layer=cpu)
    table.finish()


if __name__ == "__main__":
    main()
