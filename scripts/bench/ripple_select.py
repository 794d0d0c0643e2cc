"""Which neurons to keep: what a selector knows, what it holds in memory, and what quality it leaves.

    python scripts/bench/ripple_select.py

The oracle ranks neurons by |act(gate) up|, which is known only after reading them. The others rank by what a
resident copy says: the gate alone (plain, or times the mean |up| of calibration text), or int8 and int4
sketches of gate and up with one scale a row. "energy": not so many of each token's neurons, but the fewest
that make up a share of the sum of squares, a share that keeps as many on average. Selected neurons are
computed exactly.
"""

import statistics
from functools import partial
from typing import Any

import torch
from common import Table, parse
from models import language
from ripple_parts import Mask, Masked, sketched
from torch import Tensor

from ripple_loader.offline.active_sets import active_mask

KEEPS = (0.5, 0.25)
CALIBRATION, HELD_OUT = (2, 512), (2, 512)  # sequences, tokens


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


class Study:
    """SmolLM2's perplexity under rules of selection; `kept` is the share of each layer that they kept."""

    def __init__(self) -> None:
        model = language.load()
        self.mlps = [layer.mlp for layer in model.model.layers]
        self.masked = Masked(model, [(mlp, mlp.down_proj) for mlp in self.mlps])
        self.ids, self.calibration = (
            language.tokens(split, *shape)
            for split, shape in (("held_out", HELD_OUT), ("train", CALIBRATION))
        )
        means: list[Tensor] = []
        self.dense = self.masked.perplexity([lambda *_: torch.ones(())] * len(self.mlps), self.ids)
        self.masked.masks = [partial(self.observe, mlp, means) for mlp in self.mlps]
        model(self.calibration)
        self.scores = [scores_of(mlp, mean_N) for mlp, mean_N in zip(self.mlps, means, strict=True)]
        self.kept: dict[int, float] = {}

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

    def perplexity(self, method: str, rule: str, share: float) -> float:
        return self.masked.perplexity(self.masks(method, rule, share), self.ids)

    def energy_for(self, keep: float) -> float:
        """The share of the energy that keeps so many neurons of the calibration text."""
        low, high = 0.5, 1.0
        while high - low > 1e-3:
            energy = (low + high) / 2
            self.masked.perplexity(self.masks("sketch int8", "energy", energy), self.calibration[:1])
            low, high = (energy, high) if statistics.mean(self.kept.values()) < keep else (low, energy)
        return (low + high) / 2


@torch.no_grad()
def main() -> None:
    parse(__doc__)
    study = Study()
    table = Table(
        "ripple_select",
        "Ripple: selectors of SmolLM2-135M-Instruct's neurons",
        f"float32, perplexity on {HELD_OUT[0]} x {HELD_OUT[1]} held-out tokens, all kept: {study.dense:.2f}",
    )
    row = study.mlps[0].gate_proj.in_features
    resident = ("not possible", row * 4, row * 4 + 4, 2 * row + 8, row + 8)
    for method, held in zip(study.scores[0], resident, strict=True):
        for keep in KEEPS:
            perplexity = study.perplexity(method, "top_k", keep)
            table.add(method, bytes_a_neuron=held, **{f"perplexity_{keep:.0%}_kept": perplexity})
    for keep in KEEPS:
        perplexity = study.perplexity("sketch int8", "energy", study.energy_for(keep))
        kept = {f"kept_at_{keep:.0%}": statistics.mean(study.kept.values())}
        row_of = {"bytes_a_neuron": 2 * row + 8, f"perplexity_{keep:.0%}_kept": perplexity, **kept}
        table.add("sketch int8, energy", **row_of)
    table.finish()


if __name__ == "__main__":
    main()
