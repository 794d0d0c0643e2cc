"""Low-rank predictors of a ReLU's active neurons: what they find, what they add, and what is lost.

    python scripts/train_relu_lm.py                                                # once
    python scripts/train_relu_lm.py --model relu-lm-wide --steps 400 --batch 4     # once
    python scripts/bench/ripple_predictors.py

The ReLU models trained here. Predictors are fitted to inputs that a trace of help topics kept, and judged on
other help topics and on modules of the standard library, whose inputs they have not seen. "sketch" is the
int8 copy that rules out nothing active. "found": of the active neurons; "computed": of all; "error": of the
MLPs' outputs, relative; "KiB": held for a layer.
"""

import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Table, assets, parse
from models import language
from ripple_parts import Masked, trace_of
from torch import Tensor
from torch.nn import functional as F
from train_relu_lm import documents

from ripple_loader import ReorderConfig
from ripple_loader.format.predictor import Predictor, rank_of
from ripple_loader.format.sketch import IntegerInputs, sketch_rows
from ripple_loader.online.selection import margins

LENGTH, SEQUENCES = 256, 8
Rule = tuple[float, float] | None
"""A predictor's share of the weight's bytes and its recall; None is the sketch."""
RULES: list[Rule] = [
    None,
    *((0.125, recall) for recall in (0.999, 0.995, 0.99, 0.95, 0.9, 0.8)),
    *((share, 0.99) for share in (0.03, 0.0625, 0.25, 0.5)),
]


class Layer:
    """Zeroes what is not selected in one MLP, and counts."""

    def __init__(self, first: torch.nn.Linear, second: torch.nn.Linear, inputs: Tensor) -> None:
        self.first, self.second, self.inputs = first, second, inputs
        self.bias = first.bias.data if first.bias is not None else torch.zeros(first.out_features)
        self.sketch, self.scale, self.error = map(torch.from_numpy, sketch_rows(first.weight.data))
        self.predictors: dict[float, Predictor] = {}

    def predictor(self, share: float) -> Predictor:
        if share not in self.predictors:
            rank = rank_of(self.first.in_features, share)
            self.predictors[share] = Predictor.fit(self.inputs, self.first.weight.data, self.bias, rank)
        return self.predictors[share]

    def selected(self, rule: Rule, x_TH: Tensor) -> Tensor:
        if rule is None:
            inputs = IntegerInputs.of(x_TH)
            estimate = torch.empty(len(x_TH), len(self.sketch))
            inputs.products(self.sketch, estimate)
            return margins(estimate * self.scale + self.bias, self.error, self.scale, inputs) > 0
        share, recall = rule
        predictor = self.predictor(share)
        return predictor.estimate(x_TH) + self.bias + predictor.deviations(recall) * predictor.deviation > 0

    def mask(self, rule: Rule, seen: Counter[str], x_TH: Tensor, a_TN: Tensor) -> Tensor:
        mask_TN, active_TN, weight = self.selected(rule, x_TH), a_TN != 0, self.second.weight.data
        seen.update(
            active=int(active_TN.sum()),
            found=int((active_TN & mask_TN).sum()),
            computed=int(mask_TN.sum()),
            neurons=mask_TN.numel(),
            lost=F.linear(a_TN * ~mask_TN, weight).square().sum().item(),
            whole=F.linear(a_TN, weight).square().sum().item(),
        )
        return mask_TN


def layers(model: Any, directory: Path) -> list[Layer]:
    """A layer's linears and inputs, from a trace of help topics."""
    with tempfile.TemporaryDirectory() as folder:
        trace = trace_of(directory, ReorderConfig(sequence_length=LENGTH), Path(folder))
        names = ("fc1", "fc2"), ("up_proj", "down_proj")
        mlps = [(m, each) for m in model.modules() for each in names if hasattr(m, each[0])]
        pairs = [(getattr(m, first), getattr(m, second)) for m, (first, second) in mlps]
        return [Layer(*pair, trace.inputs(number)) for number, pair in enumerate(pairs)]


def described(rule: Rule, first: torch.nn.Linear) -> tuple[str, float]:
    """A rule's name, and the bytes that it holds for a layer."""
    if rule is None:
        return "sketch", first.weight.numel() + 8 * first.out_features
    rank = rank_of(first.in_features, rule[0])
    return f"rank {rank}, recall {rule[1]:.1%}", Predictor.size(rank, first.out_features, first.in_features)


@torch.no_grad()
def main() -> None:
    options = parse(__doc__, models=["relu-lm", "relu-lm-wide"])
    texts = {"help topics": "".join(assets.texts("held_out")), "Python code": "".join(documents()[1][-12:])}
    count = SEQUENCES * LENGTH
    for name in options.models:
        directory = ROOT / ".cache" / name
        tokenizer, model = language.tokenizer(directory), language.load(directory)
        ids = {
            text: torch.tensor(tokenizer(words[: 20 * count]).input_ids[:count]).view(-1, LENGTH)
            for text, words in texts.items()
        }
        mlps = layers(model, directory)
        masked = Masked(model, [(mlp.first, mlp.second) for mlp in mlps])
        table = Table(
            "ripple_predictors",
            f"Ripple: predictors of {name}",
            f"{name}, trained here, float32; fitted to {len(mlps[0].inputs)} tokens of help topics; "
            f"judged on {count} others and {count} of code",
        )
        for rule in RULES:
            label, held = described(rule, mlps[0].first)
            for text, rows in ids.items():
                seen: Counter[str] = Counter()
                perplexity = masked.perplexity([partial(mlp.mask, rule, seen) for mlp in mlps], rows)
                table.add(
                    f"{label}, {text}",
                    KiB=held / 2**10,
                    active=seen["active"] / seen["neurons"],
                    found=seen["found"] / seen["active"],
                    computed=seen["computed"] / seen["neurons"],
                    error=(seen["lost"] / seen["whole"]) ** 0.5,
                    perplexity=perplexity,
                )
        table.finish()


if __name__ == "__main__":
    main()
