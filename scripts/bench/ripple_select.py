"""Which neurons to keep: what a selector holds in memory, what it saves in reads, what quality it leaves.

    python scripts/bench/ripple_select.py [--tables selectors adjacent] [--sequences 2]
    python scripts/train_relu_lm.py                                                # once
    python scripts/train_relu_lm.py --model relu-lm-wide --steps 400 --batch 4     # once
    python scripts/bench/ripple_select.py --tables predictors

Perplexity of models with neurons left out. Selected neurons are computed exactly.

- selectors: of SmolLM2. The oracle ranks neurons by |act(gate) up|, which is known only after reading them.
  The others rank by what a resident copy says: the gate alone (plain, or times the mean |up| of calibration
  text), or int8 and int4 sketches of gate and up with one scale a row. "energy": not so many of each token's
  neurons, but the fewest that make up a share of the sum of squares, one that keeps as many on average.
- adjacent: half of SmolLM2's neurons kept by int8 sketches as Ripple selects them, a tenth pinned.
  "adjacent": a share of each score is the mean of two neighbours on the drive (`RippleConfig.adjacency`).
  "in memory": scores of pinned neurons are so much larger. "kept": fewer neurons, what either has to beat.
  Reads and milliseconds are of what is not pinned, by the models of published drives, without another cache.
- predictors: low-rank predictors of a ReLU's active neurons, in the models trained here. They are fitted to
  inputs that a trace of help topics kept, and judged on other help topics and on modules of the standard
  library, whose inputs they have not seen. "sketch" is the int8 copy that rules out nothing active. "found":
  of the active neurons; "computed": of all; "error": of the MLPs' outputs, relative; "KiB": held for a layer.
"""

import itertools
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import ROOT, Table, assets, option, parse
from models import language
from ripple_parts import Mask, Masked, sketched, trace_of
from ripple_simulate import CASES, traced
from torch import Tensor
from torch.nn import functional as F
from train_relu_lm import documents

from ripple_loader import ReorderConfig
from ripple_loader.format.predictor import Predictor, rank_of
from ripple_loader.format.sketch import IntegerInputs, sketch_rows
from ripple_loader.offline.active_sets import active_mask
from ripple_loader.online.selection import margins, select_largest, shared_by_neighbours
from ripple_loader.storage.collapse import cheapest, plan_reads
from ripple_loader.storage.devices import load_devices
from ripple_loader.studies.simulation import place_all

KEEPS = (0.5, 0.25)
LENGTH = 512  # tokens of a sequence
RELU_LENGTH, RELU_SEQUENCES = 256, 8
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


Rule = tuple[float, float] | None
"""A predictor's share of the weight's bytes and its recall; None is the sketch."""
PREDICTORS: list[Rule] = [
    None,
    *((0.125, recall) for recall in (0.999, 0.995, 0.99, 0.95, 0.9, 0.8)),
    *((share, 0.99) for share in (0.03, 0.0625, 0.25, 0.5)),
]


class Study(Masked):
    """SmolLM2 with masks on its MLPs, and the text that it is judged on."""

    def __init__(self, sequences: int) -> None:
        model = language.load()
        self.mlps = [layer.mlp for layer in model.model.layers]
        super().__init__(model, [(mlp, mlp.down_proj) for mlp in self.mlps])
        self.ids = language.tokens("held_out", sequences, LENGTH)
        self.conditions = f"float32, perplexity on {sequences} x {LENGTH} held-out tokens"


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

        def observed(mlp: Any, x_TH: Tensor, _: Tensor) -> Tensor:
            means.append(mlp.up_proj(x_TH).abs().mean(0))
            return torch.ones(())

        study.masks = [partial(observed, mlp) for mlp in study.mlps]
        study.model(self.calibration)
        self.scores = [scores_of(mlp, mean_N) for mlp, mean_N in zip(study.mlps, means, strict=True)]

    def perplexity(self, method: str, rule: str, share: float, ids: Tensor | None = None) -> float:
        def mask(layer: int, score: Mask, x_TH: Tensor, activation_TN: Tensor) -> Tensor:
            kept_TN = active_mask(score(x_TH, activation_TN), rule, share, exact_zeros=False)
            self.kept[layer] = kept_TN.float().mean().item()
            return kept_TN

        masks = [partial(mask, layer, scores[method]) for layer, scores in enumerate(self.scores)]
        return self.study.perplexity(masks, self.study.ids if ids is None else ids)

    @property
    def mean_kept(self) -> float:
        return statistics.mean(self.kept.values())

    def energy_for(self, keep: float) -> float:
        """The share of the energy that keeps so many neurons of the calibration text."""
        low, high = 0.5, 1.0
        while high - low > 1e-3:
            energy = (low + high) / 2
            self.perplexity("sketch int8", "energy", energy, self.calibration[:1])
            low, high = (energy, high) if self.mean_kept < keep else (low, energy)
        return (low + high) / 2


def selectors(sequences: int) -> Iterator[Table]:
    study = Study(sequences)
    dense = study.perplexity([lambda *_: torch.ones(())] * len(study.mlps), study.ids)
    ranked, row = Selectors(study), study.mlps[0].gate_proj.in_features
    title = "Ripple: selectors of SmolLM2-135M-Instruct's neurons"
    table = Table("ripple_select", title, f"{study.conditions}, all kept: {dense:.2f}")
    resident = ("not possible", row * 4, row * 4 + 4, 2 * row + 8, row + 8)
    for keep in KEEPS:
        for method, held in zip(ranked.scores[0], resident, strict=True):
            perplexity = ranked.perplexity(method, "top_k", keep)
            table.add(method, bytes_a_neuron=held, **{f"perplexity_{keep:.0%}_kept": perplexity})
        perplexity = ranked.perplexity("sketch int8", "energy", ranked.energy_for(keep))
        columns = {f"perplexity_{keep:.0%}_kept": perplexity, f"kept_at_{keep:.0%}": ranked.mean_kept}
        table.add("sketch int8, energy", bytes_a_neuron=2 * row + 8, **columns)
    yield table


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


def adjacent(sequences: int) -> Iterator[Table]:
    study = Study(sequences)
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
        perplexity = study.perplexity([layer.begin(**rule) for layer in layers], study.ids)
        read = float(np.mean([layer.read for layer in layers]))
        ms = 1e3 * sum(np.mean(layer.seconds, 0) for layer in layers)
        columns = {f"{device}_ms": float(each) for device, each in zip(DEVICES, ms, strict=True)}
        table.add(name, perplexity=perplexity, read=read, **columns)
    yield table


class Predicted:
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


def predicted_layers(model: Any, directory: Path) -> list[Predicted]:
    """A layer's linears and inputs, from a trace of help topics."""
    with tempfile.TemporaryDirectory() as folder:
        trace = trace_of(directory, ReorderConfig(sequence_length=RELU_LENGTH), Path(folder))
        names = ("fc1", "fc2"), ("up_proj", "down_proj")
        mlps = [(m, each) for m in model.modules() for each in names if hasattr(m, each[0])]
        pairs = [(getattr(m, first), getattr(m, second)) for m, (first, second) in mlps]
        return [Predicted(*pair, trace.inputs(number)) for number, pair in enumerate(pairs)]


def described(rule: Rule, first: torch.nn.Linear) -> tuple[str, float]:
    """A rule's name, and the bytes that it holds for a layer."""
    if rule is None:
        return "sketch", first.weight.numel() + 8 * first.out_features
    rank = rank_of(first.in_features, rule[0])
    return f"rank {rank}, recall {rule[1]:.1%}", Predictor.size(rank, first.out_features, first.in_features)


def predictors(_: int) -> Iterator[Table]:
    texts = {"help topics": "".join(assets.texts("held_out")), "Python code": "".join(documents()[1][-12:])}
    count = RELU_SEQUENCES * RELU_LENGTH
    for name in ("relu-lm", "relu-lm-wide"):
        directory = ROOT / ".cache" / name
        tokenizer, model = language.tokenizer(directory), language.load(directory)
        ids = {
            text: torch.tensor(tokenizer(words[: 20 * count]).input_ids[:count]).view(-1, RELU_LENGTH)
            for text, words in texts.items()
        }
        mlps = predicted_layers(model, directory)
        masked = Masked(model, [(mlp.first, mlp.second) for mlp in mlps])
        table = Table(
            "ripple_predictors",
            f"Ripple: predictors of {name}",
            f"{name}, trained here, float32; fitted to {len(mlps[0].inputs)} tokens of help topics; "
            f"judged on {count} others and {count} of code",
        )
        for rule, (text, rows) in itertools.product(PREDICTORS, ids.items()):
            label, held = described(rule, mlps[0].first)
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
        yield table


TABLES: dict[str, Callable[[int], Iterator[Table]]] = {
    "selectors": selectors,
    "adjacent": adjacent,
    "predictors": predictors,
}


@torch.no_grad()
def main() -> None:
    options = parse(
        __doc__,
        tables=option(["selectors", "adjacent"], choices=TABLES),
        sequences=option(2, "held-out ones of 512 tokens of SmolLM2's text"),
    )
    for name in options.tables:
        for table in TABLES[name](options.sequences):
            table.finish()


if __name__ == "__main__":
    main()
