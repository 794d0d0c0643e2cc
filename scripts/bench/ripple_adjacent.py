"""Selecting neurons that lie together or in memory: what it saves in reads, and what it costs in perplexity.

    python scripts/bench/ripple_adjacent.py

SmolLM2, half of the neurons kept by int8 sketches as Ripple selects them, a tenth pinned. "adjacent": a share
of each score is the mean of two neighbours on the drive (`RippleConfig.adjacency`). "in memory": scores of
pinned neurons are so much larger. "kept": fewer neurons, what either has to beat. Reads and milliseconds are
of what is not pinned, by the models of published drives, without any other cache.
"""

from typing import Any

import numpy as np
import torch
from common import Table, parse
from models import language
from ripple_parts import Masked, sketched
from ripple_simulate import CASES, traced
from torch import Tensor

from ripple_loader.online.selection import select_largest, shared_by_neighbours
from ripple_loader.storage.collapse import cheapest, plan_reads
from ripple_loader.storage.devices import load_devices
from ripple_loader.studies.simulation import place_all

HELD_OUT = (2, 512)  # sequences, tokens
DEVICES = load_devices()
PRICED = range(100, 512, 64)  # tokens of each sequence whose reads are planned
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


class Layer:
    """Masks what a rule leaves out of an MLP, and prices its reads."""

    def __init__(self, mlp: Any, placed: Any, width: int) -> None:
        self.score, self.width, self.hot = sketched(mlp, 8), width, placed.hot
        self.order = torch.from_numpy(placed.order.copy())

    def begin(self, keep: float = 0.5, adjacency: float = 0.0, memory_bonus: float = 0.0) -> None:
        self.keep, self.adjacency, self.memory_bonus = keep, adjacency, memory_bonus
        self.read: list[int] = []
        self.seconds: list[list[float]] = []

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


@torch.no_grad()
def main() -> None:
    parse(__doc__)
    case = CASES["smollm2"]
    work, _ = traced("smollm2", case)
    model, ids = language.load(), language.tokens("held_out", *HELD_OUT)
    placed = place_all(work, "linked", case.config)
    mlps = [layer.mlp for layer in model.model.layers]
    masked = Masked(model, [(mlp, mlp.down_proj) for mlp in mlps])
    layers = [Layer(mlp, order, work.bundle_bytes) for mlp, order in zip(mlps, placed, strict=True)]
    table = Table(
        "ripple_adjacent",
        "Ripple: selecting neurons that lie together or in memory",
        f"SmolLM2-135M-Instruct, float32, perplexity on {HELD_OUT[0]} x {HELD_OUT[1]} held-out tokens; a "
        "tenth of the neurons pinned; read: neurons a token and layer; ms: a token, by published numbers",
    )
    for name, rule in RULES.items():
        for layer in layers:
            layer.begin(**rule)
        perplexity = masked.perplexity([layer.mask for layer in layers], ids)
        read = float(np.mean([layer.read for layer in layers]))
        ms = 1e3 * sum(np.mean(layer.seconds, 0) for layer in layers)
        columns = {f"{device}_ms": float(each) for device, each in zip(DEVICES, ms, strict=True)}
        table.add(name, perplexity=perplexity, read=read, **columns)
    table.finish()


if __name__ == "__main__":
    main()
