"""Which neurons to keep: what a selector knows, what it holds in memory, and what quality it leaves.

    python scripts/bench/ripple_select.py

The oracle ranks neurons by |act(gate) up|, which is known only after reading them. The others rank by what a
resident copy says: the gate alone (plain, or times the mean |up| of calibration text), or int8 and int4
sketches of gate and up with one scale a row. "energy": not so many of each token's neurons, but the fewest
that make up a share of the sum of squares, a share that keeps as many on average. Selected neurons are
computed exactly.
"""

import statistics
from typing import Any

import torch
from common import Table, parse
from models import language
from ripple_parts import mask_activations, rounded
from torch import Tensor
from torch.nn import functional as F

from ripple_loader.trace import active_mask

KEEPS = (0.5, 0.25)
CALIBRATION, HELD_OUT = (2, 512), (2, 512)  # sequences, tokens


class Selector:
    """Ranks a gated MLP's neurons by a score and zeroes the activations of all but the best."""

    def __init__(self, mlp: Any) -> None:
        self.mlp, self.mean_up_N = mlp, torch.ones(())
        self.sketches = {
            bits: [rounded(p.weight, bits) for p in (mlp.gate_proj, mlp.up_proj)] for bits in (8, 4)
        }
        self.rule("oracle", 1.0)
        mask_activations(mlp, mlp.down_proj, self.mask)

    def rule(self, method: str, keep: float, energy: float = 0.0) -> None:
        self.method, self.keep, self.energy = method, keep, energy

    def score(self, x_TH: Tensor, activation_TN: Tensor) -> Tensor:
        act = self.mlp.act_fn
        match self.method:
            case "oracle":
                return activation_TN.abs()
            case "gate":
                return act(self.mlp.gate_proj(x_TH)).abs()
            case "gate x mean |up|":
                return act(self.mlp.gate_proj(x_TH)).abs() * self.mean_up_N
            case sketch:
                gate_NH, up_NH = self.sketches[int(sketch.removeprefix("sketch int"))]
                return (act(F.linear(x_TH, gate_NH)) * F.linear(x_TH, up_NH)).abs()

    def mask(self, x_TH: Tensor, activation_TN: Tensor) -> Tensor:
        if self.method == "calibration":
            self.mean_up_N = self.mlp.up_proj(x_TH).abs().mean(0)
        if self.keep == 1.0:
            return torch.ones(())
        rule, share = ("energy", self.energy) if self.energy else ("top_k", self.keep)
        kept = active_mask(self.score(x_TH, activation_TN), rule, share, exact_zeros=False)
        self.kept = kept.float().mean().item()
        return kept


class Study:
    """SmolLM2 with a selector in each layer."""

    def __init__(self) -> None:
        self.model = language.load()
        self.ids, self.calibration = (
            language.tokens("held_out", *HELD_OUT),
            language.tokens("train", *CALIBRATION),
        )
        self.selectors = [Selector(layer.mlp) for layer in self.model.model.layers]
        self.rule("calibration", 1.0)
        self.model(self.calibration)

    def rule(self, *rule: Any) -> None:
        for selector in self.selectors:
            selector.rule(*rule)

    def perplexity(self, *rule: Any) -> float:
        self.rule(*rule)
        return language.perplexity(self.model, self.ids)

    def kept(self) -> float:
        return statistics.mean(selector.kept for selector in self.selectors)

    def energy_for(self, keep: float) -> float:
        """The share of the energy that keeps so many neurons of the calibration text."""
        low, high = 0.5, 1.0
        while high - low > 1e-3:
            energy = (low + high) / 2
            self.rule("sketch int8", keep, energy)
            self.model(self.calibration[:1])
            low, high = (energy, high) if self.kept() < keep else (low, energy)
        return (low + high) / 2


@torch.no_grad()
def main() -> None:
    parse(__doc__)
    study = Study()
    table = Table(
        "ripple_select",
        "Ripple: selectors of SmolLM2-135M-Instruct's neurons",
        f"float32, perplexity on {HELD_OUT[0]} x {HELD_OUT[1]} held-out tokens, all kept: "
        f"{study.perplexity('oracle', 1.0):.2f}",
    )
    row = study.model.config.hidden_size
    for method, resident in {
        "oracle": "not possible",
        "gate": row * 4,
        "gate x mean |up|": row * 4 + 4,
        "sketch int8": 2 * row + 8,
        "sketch int4": row + 8,
    }.items():
        scores = {f"perplexity_{keep:.0%}_kept": study.perplexity(method, keep) for keep in KEEPS}
        table.add(method, bytes_a_neuron=resident, **scores)
    for keep in KEEPS:
        score = study.perplexity("sketch int8", keep, study.energy_for(keep))
        kept = {f"perplexity_{keep:.0%}_kept": score, f"kept_at_{keep:.0%}": study.kept()}
        table.add("sketch int8, energy", bytes_a_neuron=2 * row + 8, **kept)
    table.finish()


if __name__ == "__main__":
    main()
