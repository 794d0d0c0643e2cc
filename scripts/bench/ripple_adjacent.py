"""Selecting neurons that lie together or in memory: what it saves in reads, and what it costs in perplexity.

    python scripts/bench/ripple_adjacent.py

SmolLM2, half of the neurons kept by int8 sketches as Ripple selects them, a tenth pinned. "adjacent": a share
of each score is the mean of two neighbours on the drive (`RippleConfig.adjacency`). "in memory": scores of
pinned neurons are so much larger. "kept": fewer neurons, what either has to beat. Reads and milliseconds are
of what is not pinned, by the models of published drives, without any other cache.
"""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import Table  # also makes `assets` importable
from ripple_select import HELD_OUT, rounded
from ripple_simulate import bundle_bytes, cases, traced
from torch import Tensor
from torch.nn import functional as F

from ripple_loader.offline.placement import Placed
from ripple_loader.online.selection import select_largest, shared_by_neighbours
from ripple_loader.storage.collapse import cheapest, plan_reads
from ripple_loader.storage.devices import load_devices
from ripple_loader.studies.simulation import Workload, place_all, workload_of

PRICED = range(100, 512, 64)  # tokens of each sequence whose reads are planned


@dataclass
class Rule:
    """How neurons are selected."""

    keep: float = 0.5
    adjacency: float = 0.0
    memory_bonus: float = 0.0


RULES = {
    "by themselves": Rule(),
    "48% kept": Rule(keep=0.48),
    "46% kept": Rule(keep=0.46),
    "adjacent, 0.15": Rule(adjacency=0.15),
    "adjacent, 0.3": Rule(adjacency=0.3),
    "adjacent, 0.45": Rule(adjacency=0.45),
    "in memory, 1.5 times": Rule(memory_bonus=0.5),
    "in memory, twice": Rule(memory_bonus=1.0),
}


class Layer:
    """Zeroes what a rule leaves out of an MLP, and prices its reads."""

    rule = Rule()

    def __init__(self, mlp: Any, placed: Placed, work: Workload) -> None:
        self.mlp, self.work, self.hot = mlp, work, placed.hot
        self.order = torch.from_numpy(placed.order.copy())
        self.gate, self.up = (rounded(p.weight, 8) for p in (mlp.gate_proj, mlp.up_proj))
        self.devices = [(each.model, each.block) for each in load_devices().values()]
        self.reset()
        mlp.register_forward_pre_hook(self.remember)
        mlp.down_proj.register_forward_pre_hook(lambda _, args: (self.masked(args[0]),))

    def reset(self) -> None:
        self.read: list[int] = []
        self.seconds: list[list[float]] = []

    def remember(self, _: Any, args: tuple[Tensor]) -> None:
        self.x = args[0]

    def masked(self, activation: Tensor) -> Tensor:
        x_TH, rule = self.x[0], self.rule
        score_TN = (self.mlp.act_fn(F.linear(x_TH, self.gate)) * F.linear(x_TH, self.up)).abs()[:, self.order]
        score_TN[:, : self.hot] *= 1 + rule.memory_bonus
        score_TN = shared_by_neighbours(score_TN, rule.adjacency, self.hot)
        placed_TN = select_largest(score_TN, rule.keep).mask
        assert placed_TN is not None
        for token in PRICED:
            self.price(np.flatnonzero(placed_TN[token, self.hot :].numpy()))
        mask_TN = torch.zeros_like(placed_TN)
        mask_TN[:, self.order] = placed_TN
        return activation * mask_TN

    def price(self, places: Any) -> None:
        self.read.append(len(places))
        width, seconds = self.work.bundle_bytes, []
        for model, block in self.devices:
            plan = plan_reads(places, base=0, width=width, block=block, collapse=cheapest(model))
            seconds.append(float(model.seconds(len(plan.offsets), plan.size)))
        self.seconds.append(seconds)


@torch.no_grad()
def main() -> None:
    import assets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    case = cases()["smollm2"]
    trace, source = traced("smollm2", case)
    work = workload_of(trace, bundle_bytes(source, "same"), case.replayed)
    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir())
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir())
    placed = place_all(work, "linked", case.config)
    layers = [Layer(layer.mlp, order, work) for layer, order in zip(model.model.layers, placed, strict=True)]
    count, length = HELD_OUT
    text = torch.cat([tokenizer(t, return_tensors="pt").input_ids[0] for t in assets.texts("held_out")])
    ids = text[: count * length].view(count, length)
    table = Table(
        "ripple_adjacent",
        "Ripple: selecting neurons that lie together or in memory",
        f"SmolLM2-135M-Instruct, float32, perplexity on {count} x {length} held-out tokens; a tenth of the "
        f"neurons pinned; read: neurons a token and layer; ms: a token, by published numbers",
    )
    for name, rule in RULES.items():
        Layer.rule = rule
        for layer in layers:
            layer.reset()
        loss = statistics.mean(model(row[None], labels=row[None]).loss.item() for row in ids)
        seconds = sum(np.mean(layer.seconds, 0) for layer in layers)
        table.add(
            name,
            perplexity=math.exp(loss),
            read=float(np.mean([layer.read for layer in layers])),
            **{f"{each}_ms": float(ms) for each, ms in zip(load_devices(), seconds * 1e3, strict=True)},
        )
    table.finish()


if __name__ == "__main__":
    main()
