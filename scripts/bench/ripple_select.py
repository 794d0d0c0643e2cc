"""Which neurons to keep: what a selector knows, what it holds in memory, and what quality it leaves.

    python scripts/bench/ripple_select.py

The oracle ranks neurons by |act(gate) up|, which is known only after reading them. The others rank by what a
resident copy says: the gate alone (plain, or times the mean |up| of calibration text), or int8 and int4
sketches of gate and up with one scale a row. "energy": not so many of each token's neurons, but the fewest
that make up a share of the sum of squares, a share that keeps as many on average. Selected neurons are
computed exactly.
"""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from common import Table  # also makes `assets` importable
from torch import Tensor
from torch.nn import functional as F

from ripple_loader.offline.active_sets import active_mask

KEEPS = (0.5, 0.25)
CALIBRATION, HELD_OUT = (2, 512), (2, 512)  # sequences, tokens


def rounded(weight_NH: Tensor, bits: int) -> Tensor:
    scale_N1 = weight_NH.abs().amax(1, keepdim=True) / (2 ** (bits - 1) - 1)
    return (weight_NH / scale_N1).round() * scale_N1


class Selector:
    """Ranks a layer's neurons by a score and zeroes the activations of all but the best.

    Args:
        mlp: a gated MLP.
        mean_up_N: mean |up| on calibration text.
    """

    def __init__(self, mlp: Any, mean_up_N: Tensor) -> None:
        self.mlp, self.mean_up_N = mlp, mean_up_N
        self.sketches = {
            bits: [rounded(p.weight, bits) for p in (mlp.gate_proj, mlp.up_proj)] for bits in (8, 4)
        }
        self.method, self.keep, self.energy, self.kept = "oracle", 1.0, 0.0, 0.0
        mlp.down_proj.register_forward_pre_hook(lambda _, args: (self.mask(args[0]),))
        mlp.register_forward_pre_hook(self.remember)

    def remember(self, _: Any, args: tuple[Tensor]) -> None:
        self.x = args[0]

    def score(self, activation: Tensor) -> Tensor:
        act = self.mlp.act_fn
        match self.method:
            case "oracle":
                return activation.abs()
            case "gate":
                return act(self.mlp.gate_proj(self.x)).abs()
            case "gate x mean |up|":
                return act(self.mlp.gate_proj(self.x)).abs() * self.mean_up_N
            case sketch:
                gate_NH, up_NH = self.sketches[int(sketch.removeprefix("sketch int"))]
                return (act(F.linear(self.x, gate_NH)) * F.linear(self.x, up_NH)).abs()

    def mask(self, activation: Tensor) -> Tensor:
        if self.keep == 1.0:
            return activation
        rule, share = ("energy", self.energy) if self.energy else ("top_k", self.keep)
        kept = active_mask(self.score(activation), rule, share, exact_zeros=False)
        self.kept = kept.float().mean().item()
        return activation * kept


def mean_up(model: Any, ids: Tensor) -> list[Tensor]:
    """Mean |up| of each neuron of each layer."""
    found: list[Tensor] = []
    handles = [
        layer.mlp.up_proj.register_forward_hook(lambda *args: found.append(args[2].abs().mean((0, 1))))
        for layer in model.model.layers
    ]
    model(ids)
    for handle in handles:
        handle.remove()
    return found


@torch.no_grad()
def main() -> None:
    import assets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir())
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir())

    def sequences(split: str, count: int, length: int) -> Tensor:
        ids = torch.cat([tokenizer(text, return_tensors="pt").input_ids[0] for text in assets.texts(split)])
        return ids[: count * length].view(count, length)

    ids, calibration = sequences("held_out", *HELD_OUT), sequences("train", *CALIBRATION)
    ups = mean_up(model, calibration)
    selectors = [Selector(layer.mlp, up) for layer, up in zip(model.model.layers, ups, strict=True)]

    def perplexity(method: str, keep: float, energy: float = 0.0) -> float:
        for selector in selectors:
            selector.method, selector.keep, selector.energy = method, keep, energy
        return math.exp(statistics.mean(model(row[None], labels=row[None]).loss.item() for row in ids))

    table = Table(
        name="ripple_select",
        title="Ripple: selectors of SmolLM2-135M-Instruct's neurons",
        config=f"float32, perplexity on {HELD_OUT[0]} x {HELD_OUT[1]} held-out tokens, all kept: "
        f"{perplexity('oracle', 1.0):.2f}",
    )
    row = model.config.hidden_size
    for method, resident in {
        "oracle": "not possible",
        "gate": row * 4,
        "gate x mean |up|": row * 4 + 4,
        "sketch int8": 2 * row + 8,
        "sketch int4": row + 8,
    }.items():
        scores = {f"perplexity_{keep:.0%}_kept": perplexity(method, keep) for keep in KEEPS}
        table.add(method, bytes_a_neuron=resident, **scores)

    def share_for(keep: float) -> float:
        """The share of the energy that keeps so many neurons of the calibration text."""
        low, high = 0.5, 1.0
        while high - low > 1e-3:
            energy = (low + high) / 2
            for selector in selectors:
                selector.method, selector.energy = "sketch int8", energy
            model(calibration[:1])
            few = statistics.mean(selector.kept for selector in selectors) < keep
            low, high = (energy, high) if few else (low, energy)
        return (low + high) / 2

    scores, kept = {}, {}
    for keep in KEEPS:
        scores[f"perplexity_{keep:.0%}_kept"] = perplexity("sketch int8", keep, share_for(keep))
        kept[f"kept_at_{keep:.0%}"] = statistics.mean(selector.kept for selector in selectors)
    table.add("sketch int8, energy", bytes_a_neuron=2 * row + 8, **scores, **kept)
    table.finish()


if __name__ == "__main__":
    main()
