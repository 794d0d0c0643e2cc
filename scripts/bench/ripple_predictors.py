"""Low-rank predictors of a ReLU's active neurons: what they find, what they add, and what is lost.

    python scripts/train_relu_lm.py                                                # once
    python scripts/train_relu_lm.py --model relu-lm-wide --steps 400 --batch 4     # once
    python scripts/bench/ripple_predictors.py

The ReLU models trained here. Predictors are fitted to inputs that a trace of help topics kept, and judged on
other help topics and on modules of the standard library, whose inputs they have not seen. "sketch" is the
int8 copy that rules out nothing active. "found": of the active neurons; "computed": of all; "error": of the
MLPs' outputs, relative; "KiB": held for a layer.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Table  # also makes `assets` importable
from torch import Tensor
from torch.nn import functional as F
from train_relu_lm import documents

from ripple_loader import ReorderConfig
from ripple_loader.checkpoint.source import open_source
from ripple_loader.format.predictor import Predictor, rank_of
from ripple_loader.format.sketch import IntegerInputs, sketch_rows
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import trace_source
from ripple_loader.online.selection import margins

LENGTH, SEQUENCES = 256, 8
RULES: list[tuple[float, float]] = [
    *((0.125, recall) for recall in (0.999, 0.995, 0.99, 0.95, 0.9, 0.8)),
    *((share, 0.99) for share in (0.03, 0.0625, 0.25, 0.5)),
]


@dataclass
class Seen:
    """Counts of one rule over layers and tokens."""

    active: int = 0
    found: int = 0
    computed: int = 0
    neurons: int = 0
    lost: float = 0.0
    whole: float = 0.0


class Layer:
    """Zeroes what is not selected in one MLP, and counts."""

    def __init__(self, first: torch.nn.Linear, second: torch.nn.Linear, inputs: Tensor) -> None:
        self.first, self.second, self.inputs = first, second, inputs
        self.bias = first.bias.data if first.bias is not None else torch.zeros(first.out_features)
        rows, scale, error = map(torch.from_numpy, sketch_rows(first.weight.data))
        self.sketch, self.scale, self.error = rows, scale, error
        self.predictors: dict[float, Predictor] = {}
        self.rule: tuple[float, float] | None = None
        self.x, self.seen = torch.empty(0), Seen()
        first.register_forward_pre_hook(lambda _, args: setattr(self, "x", args[0].flatten(0, -2)))
        second.register_forward_pre_hook(lambda _, args: (self.masked(args[0]),))

    def predictor(self, share: float) -> Predictor:
        if share not in self.predictors:
            rank = rank_of(self.first.in_features, share)
            self.predictors[share] = Predictor.fit(self.inputs, self.first.weight.data, self.bias, rank)
        return self.predictors[share]

    def selected(self) -> Tensor:
        if self.rule is None:
            inputs = IntegerInputs.of(self.x)
            estimate = torch.empty(len(self.x), len(self.sketch))
            inputs.products(self.sketch, estimate)
            return margins(estimate * self.scale + self.bias, self.error, self.scale, inputs) > 0
        share, recall = self.rule
        predictor = self.predictor(share)
        return predictor.estimate(self.x) + self.bias + predictor.deviations(recall) * predictor.deviation > 0

    def masked(self, activation: Tensor) -> Tensor:
        a_TN, mask_TN = activation.flatten(0, -2), self.selected()
        active_TN = a_TN != 0
        seen = self.seen
        seen.active += int(active_TN.sum())
        seen.found += int((active_TN & mask_TN).sum())
        seen.computed += int(mask_TN.sum())
        seen.neurons += mask_TN.numel()
        weight = self.second.weight.data
        seen.lost += F.linear(a_TN * ~mask_TN, weight).square().sum().item()
        seen.whole += F.linear(a_TN, weight).square().sum().item()
        return (a_TN * mask_TN).view_as(activation)


def layers(model: Any, directory: Path, scratch: Path) -> list[Layer]:
    """A layer's linears and inputs, from a trace of help topics."""
    import assets

    config = ReorderConfig(sequence_length=LENGTH)
    source = open_source(directory)
    trace = trace_source(source, cut_sequences(source, assets.texts("train"), config), config, scratch)
    ends = [(".fc1", ".fc2"), (".up_proj", ".down_proj")]
    modules = dict(model.named_modules())
    pairs = [
        (module, modules[name.removesuffix(first) + second])
        for name, module in modules.items()
        for first, second in ends
        if name.endswith(first)
    ]
    return [Layer(first, second, trace.inputs(number)) for number, (first, second) in enumerate(pairs)]


@torch.no_grad()
def main(models: list[str]) -> None:
    import assets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    code = documents()[1][-12:]
    for name in models:
        directory = ROOT / ".cache" / name
        tokenizer, model = (each.from_pretrained(directory) for each in (AutoTokenizer, AutoModelForCausalLM))
        texts = {"help topics": "".join(assets.texts("held_out")), "Python code": "".join(code)}
        count = SEQUENCES * LENGTH
        rows = {
            text: torch.tensor(tokenizer(found[: 20 * count]).input_ids[:count]).view(-1, 1, LENGTH)
            for text, found in texts.items()
        }
        with tempfile.TemporaryDirectory() as scratch:
            mlps = layers(model, directory, Path(scratch))
        table = Table(
            "ripple_predictors",
            f"Ripple: predictors of {name}",
            f"{name}, trained here, float32; fitted to {len(mlps[0].inputs)} tokens of help topics; "
            f"judged on {count} others and {count} of code",
        )
        first = mlps[0].first
        for rule in (None, *RULES):
            for mlp in mlps:
                mlp.rule = rule
            label, held = "sketch", first.weight.numel() + 8 * first.out_features
            if rule is not None:
                label = f"rank {rank_of(first.in_features, rule[0])}, recall {rule[1]:.1%}"
                held = Predictor.size(
                    rank_of(first.in_features, rule[0]), first.out_features, first.in_features
                )
            for text, found in rows.items():
                seen = Seen()
                for mlp in mlps:
                    mlp.seen = seen
                losses = [model(row, labels=row).loss.item() for row in found]
                table.add(
                    f"{label}, {text}",
                    KiB=held / 2**10,
                    active=seen.active / seen.neurons,
                    found=seen.found / seen.active,
                    computed=seen.computed / seen.neurons,
                    error=(seen.lost / seen.whole) ** 0.5,
                    perplexity=math.exp(statistics.mean(losses)),
                )
        table.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["relu-lm", "relu-lm-wide"])
    main(parser.parse_args().models)
