"""Which neurons to keep: what a selector holds in memory, what it saves in reads, what quality it leaves.

    python scripts/bench/ripple_select.py [--tables selectors adjacent] [--sequences 2]

SmolLM2's perplexity with neurons left out. Selected neurons are computed exactly.

- selectors: the oracle ranks neurons by |act(gate) up|, which is known only after reading them. The others
  rank by what a resident copy says: the gate alone (plain, or times the mean |up| of calibration text), or
  int8 and int4 sketches of gate and up with one scale a row. "energy": not so many of each token's neurons,
  but the fewest that make up a share of the sum of squares, a share that keeps as many on average.
- adjacent: half of the neurons kept by int8 sketches as Ripple selects them, a tenth pinned. "adjacent": a
  share of each score is the mean of two neighbours on the drive (`RippleConfig.adjacency`). "in memory":
  scores of pinned neurons are so much larger. "kept": fewer neurons, what either has to beat. Reads and
  milliseconds are of what is not pinned, by the models of published drives, without any other cache.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from common import Table, option, parse
from models import language
from ripple_parts import Mask, Masked, sketched
from ripple_simulate import CASES, traced
from torch import Tensor

from ripple_loader.offline.active_sets import active_mask
from ripple_loader.online.selection import select_largest, shared_by_neighbours
from ripple_loader.storage.collapse import cheapest, plan_reads
from ripple_loader.storage.devices import load_devices
from ripple_loader.studies.simulation import place_all

KEEPS = (0.5, 0.25)
LENGTH = 512  # tokens of a sequence
DEVICES = load_devices()
PRICED = range(100, LENGTH, 64)  # tokens of each sequence whose reads are planned
RULES = {
    "by themselves": {},
    "48% kept": {"keep": 0.48},
    "46% kept": {"keep": 0.46},
    "adjacent, 0.15": {"adjacency": 0.15},
    "adjacent, 0.3": {"adjacency": 0.3},
    "adjacent, 0.45": {"adjacency": 0.45},
    "in memory, 1.5 times": {"memory_bonus": 0.5},
    "in memory, twice": {"memory_bonus": 1.0},
}


class Study:
    """SmolLM2 with masks on its MLPs, and the text that it is judged on."""

    def __init__(self, sequences: int) -> None:
        self.model = language.load()
        self.mlps = [layer.mlp for layer in self.model.model.layers]
        self.masked = Masked(self.model, [(mlp, mlp.down_proj) for mlp in self.mlps])
        self.ids = language.tokens("held_out", sequences, LENGTH)
        self.conditions = f"float32, perplexity on {sequences} x {LENGTH} held-out tokens"

    def perplexity(self, masks: list[Mask]) -> float:
        return self.masked.perplexity(masks, self.ids)


def scores_of(mlp: Any, mean_up_N: Tensor) -> dict[str, Mask]:
    """What each method ranks the neurons of a gated MLP by."""

    def gate(x_TH: Tensor, _: Tensor) -> Tensor:
        return mlp.act_fn(mlp.gate_proj(x_TH)).abs()

    return {
        "oracle": lambda _, activation_TN: activation_TN.abs(),
        "gate": gate,
        "gate x mean |up|": lambda x_TH, _: gate(x_TH, _) * mean_up_N,
        "sketch int8": sketched(mlp, 8),
        "sketch int4": sketched(mlp, 4),
    }


class Selectors:
    """Masks of each selector and rule; `kept` is the share of each layer that the last ones kept."""

    def __init__(self, study: Study) -> None:
        self.study, self.kept = study, dict[int, float]()
        self.calibration = language.tokens("train", *study.ids.shape)
        means: list[Tensor] = []
        study.masked.masks = [partial(self.observe, mlp, means) for mlp in study.mlps]
        study.model(self.calibration)
        self.scores = [scores_of(mlp, mean_N) for mlp, mean_N in zip(study.mlps, means, strict=True)]

    @staticmethod
    def observe(mlp: Any, means: list[Tensor], x_TH: Tensor, _: Tensor) -> Tensor:
        means.append(mlp.up_proj(x_TH).abs().mean(0))
        return torch.ones(())

    def masks(self, method: str, rule: str, share: float) -> list[Mask]:
        def mask(layer: int, score: Mask, x_TH: Tensor, activation_TN: Tensor) -> Tensor:
            kept_TN = active_mask(score(x_TH, activation_TN), rule, share, exact_zeros=False)
            self.kept[layer] = kept_TN.float().mean().item()
            return kept_TN

        return [partial(mask, layer, scores[method]) for layer, scores in enumerate(self.scores)]

    def energy_for(self, keep: float) -> float:
        """The share of the energy that keeps so many neurons of the calibration text."""
        low, high = 0.5, 1.0
        while high - low > 1e-3:
            energy = (low + high) / 2
            self.study.masked.perplexity(self.masks("sketch int8", "energy", energy), self.calibration[:1])
            low, high = (energy, high) if statistics.mean(self.kept.values()) < keep else (low, energy)
        return (low + high) / 2


def selectors(study: Study) -> Table:
    dense = study.perplexity([lambda *_: torch.ones(())] * len(study.mlps))
    ranked, row = Selectors(study), study.mlps[0].gate_proj.in_features
    title = "Ripple: selectors of SmolLM2-135M-Instruct's neurons"
    table = Table("ripple_select", title, f"{study.conditions}, all kept: {dense:.2f}")
    resident = ("not possible", row * 4, row * 4 + 4, 2 * row + 8, row + 8)
    for method, held in zip(ranked.scores[0], resident, strict=True):
        for keep in KEEPS:
            perplexity = study.perplexity(ranked.masks(method, "top_k", keep))
            table.add(method, bytes_a_neuron=held, **{f"perplexity_{keep:.0%}_kept": perplexity})
    for keep in KEEPS:
        perplexity = study.perplexity(ranked.masks("sketch int8", "energy", ranked.energy_for(keep)))
        kept = {f"kept_at_{keep:.0%}": statistics.mean(ranked.kept.values())}
        row_of = {"bytes_a_neuron": 2 * row + 8, f"perplexity_{keep:.0%}_kept": perplexity, **kept}
        table.add("sketch int8, energy", **row_of)
    return table


class Placed:
    """Masks what a rule leaves out of an MLP whose neurons lie in an order, and prices its reads."""

    def __init__(self, mlp: Any, placed: Any, width: int) -> None:
        self.score, self.width, self.hot = sketched(mlp, 8), width, placed.hot
        self.order = torch.from_numpy(placed.order.copy())

    def begin(self, keep: float = 0.5, adjacency: float = 0.0, memory_bonus: float = 0.0) -> Mask:
        self.keep, self.adjacency, self.memory_bonus = keep, adjacency, memory_bonus
        self.read: list[int] = []
        self.seconds: list[list[float]] = []
        return self.mask

    def mask(self, x_TH: Tensor, activation_TN: Tensor) -> Tensor:
        score_TN = self.score(x_TH, activation_TN)[:, self.order]
        score_TN[:, : self.hot] *= 1 + self.memory_bonus
        score_TN = shared_by_neighbours(score_TN, self.adjacency, self.hot)
        placed_TN = select_largest(score_TN, self.keep).mask
        for token in PRICED:
            self.price(np.flatnonzero(placed_TN[token, self.hot :].numpy()))
        mask_TN = torch.zeros_like(placed_TN)
        mask_TN[:, self.order] = placed_TN
        return mask_TN

    def price(self, neurons: Any) -> None:
        self.read.append(len(neurons))
        seconds = []
        for device in DEVICES.values():
            collapse = cheapest(device.model)
            plan = plan_reads(neurons, base=0, width=self.width, block=device.block, collapse=collapse)
            seconds.append(float(device.model.seconds(len(plan.offsets), plan.size)))
        self.seconds.append(seconds)


def adjacent(study: Study) -> Table:
    case = CASES["smollm2"]
    work, _ = traced("smollm2", case)
    placed = place_all(work, "linked", case.config)
    layers = [Placed(mlp, order, work.bundle_bytes) for mlp, order in zip(study.mlps, placed, strict=True)]
    table = Table(
        "ripple_adjacent",
        "Ripple: selecting neurons that lie together or in memory",
        f"SmolLM2-135M-Instruct, {study.conditions}; a tenth of the neurons pinned; read: neurons a token "
        "and layer; ms: a token, by published numbers",
    )
    for name, rule in RULES.items():
        perplexity = study.perplexity([layer.begin(**rule) for layer in layers])
        read = float(np.mean([layer.read for layer in layers]))
        ms = 1e3 * sum(np.mean(layer.seconds, 0) for layer in layers)
        columns = {f"{device}_ms": float(each) for device, each in zip(DEVICES, ms, strict=True)}
        table.add(name, perplexity=perplexity, read=read, **columns)
    return table


TABLES: dict[str, Callable[[Study], Table]] = {"selectors": selectors, "adjacent": adjacent}


@torch.no_grad()
def main() -> None:
    options = parse(
        __doc__,
        tables=option(list(TABLES), choices=TABLES),
        sequences=option(2, "held-out ones of 512 tokens"),
    )
    for name in options.tables:
        TABLES[name](Study(options.sequences)).finish()


if __name__ == "__main__":
    main()
