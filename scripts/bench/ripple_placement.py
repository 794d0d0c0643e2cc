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
from functools import partial
from pathlib import Path

import numpy as np
from common import Table, option, parse
from harness import Race
from ripple_parts import trace_of

from ripple_loader import ReorderConfig, placement
from ripple_loader.coactivation import Activity, coactivation, sampled_tokens
from ripple_loader.trace import BitSets, count_uses
from ripple_loader.two_opt import two_opt

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


def linked(sets: BitSets, neurons: int, sample: int | None, *, improve: bool) -> placement.Order:
    """Greedy linking of all neurons, with a sample of the tokens proposing partners in its first round."""
    activity, everyone = Activity(sets, neurons), np.arange(neurons)
    graph = coactivation(activity, PARTNERS, everyone, sample=sample)
    order = placement.greedy_linking(activity, everyone, PARTNERS, graph)
    return two_opt(order, activity, graph) if improve else order


def orders(
    sets: BitSets, neurons: int, layer: int, hot: int, quick: int, whole: int
) -> dict[str, Callable[[], placement.Order]]:
    """What makes each contender's order of a layer, from `quick` or all of its tokens."""

    def placed(name: str) -> Callable[[], placement.Order]:
        config = ReorderConfig(placement=name, partners=PARTNERS)  # type: ignore[arg-type]
        return lambda: placement.place(sets, neurons, layer, config, hot).order

    return {
        "identity": placed("identity"),
        "random": placed("random"),
        "frequency": placed("frequency"),
        "spectral": lambda: placement.spectral_order(
            coactivation(Activity(sets, neurons), PARTNERS), np.arange(neurons)
        ),
        "linked, sampled": partial(linked, sets, neurons, quick, improve=False),
        "linked, whole product": partial(linked, sets, neurons, whole, improve=False),
        "linked, sampled, 2-opt": partial(linked, sets, neurons, quick, improve=True),
        "linked, whole product, 2-opt": partial(linked, sets, neurons, whole, improve=True),
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
    hot = placement.hot_neurons(uses, ReorderConfig().hot_share)
    quick = min(sampled_tokens(whole, neurons), whole // 8)
    rows: dict[str, list[tuple[float, float]]] = {}
    for layer, sets in enumerate(layers):
        in_memory = placement.most_active(uses[layer], hot[layer])
        race = Race(orders(sets[~held_back], neurons, layer, hot[layer], quick, whole), equal=None, keep=True)
        # CPU seconds of work that starts from nothing: no untimed calls.
        for name, (made,) in race.run(1, untimed=0).items():
            reads = placement.expected_reads(sets[held_back], made.result, in_memory)
            rows.setdefault(name, []).append((reads, made.process))
    activity = statistics.mean(float(np.unpackbits(sets).mean()) for sets in layers)
    table = Table(
        "ripple_placement",
        "Ripple: orders of a layer's neurons",
        f"{'synthetic' if options.synthetic else options.model.name}, {len(layers)} layers of {neurons} "
        f"neurons, {whole} tokens, {PARTNERS} partners, {options.threads} threads; {activity:.1%} active; "
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
