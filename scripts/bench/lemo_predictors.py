"""Which blocks a layer would choose, foretold: recall against time, predictors and cheaper designs.

    python scripts/bench/lemo_predictors.py [--steps 200] [--save DIR]

SmolLM2-135M, float32. All trained designs learn from the same forward passes over the same samples, one step
of AdamW each; recall is that of held-out text, of the half of the blocks that score highest by all queries.
Time is that of a layer's scores alone from its input, in all layers; beside it what that is of a layer's part
of a training step (LoRA r 8, detach 50%, gradient checkpointing) when every layer chooses for itself.

- position: the earlier block first, which more queries can look at.
- first layer, previous layer: their exact choice.
- queries: exact queries and keys, the map from so many queries of each block.
- linear probe: one linear map from a block's mean hidden state and its place to its score.
- low rank: copies of the layer's own q_proj and k_proj of so many singular directions over all heads, the map
  from all queries; not trained.
- paper, max: `lemo_trainer.informativeness.predictors`.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import common
import torch
from common import option
from harness import Race
from models import language, lora
from torch import Tensor, nn
from tqdm import tqdm

from lemo_trainer import LemoConfig
from lemo_trainer.informativeness.predictor_files import base_fingerprint, save_predictors
from lemo_trainer.informativeness.predictors import PatternPredictors, recall_at_kept
from lemo_trainer.informativeness.scores import attention_map, map_scores
from lemo_trainer.informativeness.selection import BlockPlan
from lemo_trainer.model.capture import attention_inputs
from lemo_trainer.offline.observation import LayerInput, Observer

DESIGNS = {"paper": (16, 16, 16), "max": (32, 32, 32)}
QUERIES, RANKS = (32, 24, 16, 8), (64, 192)
SEQ_LEN, HELD_OUT, RATE = 1024, 6, 3e-3  # tokens, samples, learning rate


class LinearProbe(nn.Module):
    """Score of a block: a linear map of its mean, rescaled hidden state and the logarithm of its place."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width + 2, 1)

    def forward(self, x_BSD: Tensor) -> Tensor:
        x_BSD = x_BSD * x_BSD.square().mean(-1, keepdim=True).add(1e-6).rsqrt()
        mean_BND = x_BSD[:, : x_BSD.shape[1] // 64 * 64].unflatten(1, (-1, 64)).mean(2)
        place_N = torch.arange(mean_BND.shape[1]) + 1.0
        place_N2 = torch.stack([place_N.log(), place_N.flip(0).log()], 1)
        return self.linear(torch.cat([mean_BND, place_N2.expand(len(mean_BND), -1, -1)], 2))[..., 0]


def low_rank(projection: nn.Linear, rank: int) -> nn.Module:
    """A projection with the `rank` largest singular directions of its weight, in two factors."""
    u, s, v = torch.linalg.svd(projection.weight.data, full_matrices=False)
    first, second = nn.Linear(len(v[0]), rank, bias=False), nn.Linear(rank, len(u), bias=False)
    first.weight.data, second.weight.data = v[:rank], u[:, :rank] * s[:rank]
    return nn.Sequential(first, second)


Scorer = Callable[[LayerInput], Tensor]
"""Scores of a layer's blocks [B, N], from what the layer is given."""


def scorers(
    model: Any, config: LemoConfig, trained: dict[str, PatternPredictors], probes: Any
) -> dict[str, Scorer]:
    """Of each contender that looks at a layer's input."""
    layers = model.model.layers

    def from_queries(seen: LayerInput, count: int = config.block_size) -> Tensor:
        layer = layers[seen.index]
        x_BSD = layer.input_layernorm(seen.hidden)
        positions = model.model.rotary_emb(x_BSD, torch.arange(x_BSD.shape[1])[None])
        inputs = attention_inputs(layer.self_attn, x_BSD, position_embeddings=positions, attention_mask=None)
        return map_scores(attention_map(inputs, None, config.block_size, count))

    def copies(rank: int) -> Scorer:
        names = "q_proj", "k_proj"
        attentions = [layer.self_attn for layer in layers]
        factors = [{name: low_rank(getattr(each, name), rank) for name in names} for each in attentions]

        def scores(seen: LayerInput) -> Tensor:
            with mock.patch.dict(attentions[seen.index]._modules, factors[seen.index]):
                return from_queries(seen)

        return scores

    def learned(predictors: PatternPredictors) -> Scorer:
        return lambda seen: map_scores(predictors.pooled_map(seen.index, seen.hidden, None))

    return {
        "exact": from_queries,
        "position": lambda seen: -torch.arange(seen.hidden.shape[1] // config.block_size).float()[None],
        **{f"{count} queries of 64": partial(from_queries, count=count) for count in QUERIES},
        **{f"low rank {rank}": copies(rank) for rank in RANKS},
        "linear probe": lambda seen: probes[str(seen.index)](seen.hidden),
        **{name: learned(predictors) for name, predictors in trained.items()},
    }


def layer_seconds(model: Any, tokens: Tensor) -> float:
    """Median time of a training step that leaves out half without looking, over the number of layers."""
    model = lora.with_lora(model)
    with lora.prepared(model, LemoConfig(selector="recency"), True):
        race = Race({"step": lambda: lora.loss_of(model, tokens).backward()}, equal=None)
        return race.run(3)["step"].median / model.config.num_hidden_layers


def train(observer: Observer, trained: dict[str, PatternPredictors], probes: Any, steps: int) -> int:
    """Fit all designs to the same passes over training text; returns the number of its samples."""
    text = [torch.tensor([each["input_ids"]]) for each in lora.samples("train", SEQ_LEN)]
    parameters = [*probes.parameters(), *(p for each in trained.values() for p in each.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    order = torch.randperm(len(text)).repeat(-(-steps // len(text)))
    for step in tqdm(range(steps), desc="training", unit="step"):
        for seen in observer({"input_ids": text[order[step]]}):
            for predictors in trained.values():
                predictors.of(seen.index).loss(seen.hidden, None, seen.exact_map)[0].backward()
            wanted_BN = map_scores(seen.exact_map).log()
            nn.functional.mse_loss(probes[str(seen.index)](seen.hidden), wanted_BN).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return len(text)


class Judged:
    """Recall of each contender in each layer, and the race of those that look at the layer's input."""

    def __init__(self, contenders: dict[str, Scorer], kept: int) -> None:
        self.kept = kept
        self.recall: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        calls = {name: partial(lambda each: each(self.seen), each) for name, each in contenders.items()}
        self.race = Race(calls, equal=None, keep=True)

    @torch.no_grad()
    def sample(self, observer: Observer, ids: Tensor) -> None:
        exact: dict[int, Tensor] = {}
        for self.seen in observer({"input_ids": ids}):
            exact[self.seen.index] = map_scores(self.seen.exact_map)
            self.race.round()
            for name, times in self.race.times.items():
                self.add(name, self.seen.index, times[-1].result, exact[self.seen.index])
        for layer, wanted in exact.items():
            self.add("first layer", layer, exact[min(layer, 1)], wanted)
            self.add("previous layer", layer, exact[max(layer - 1, 0)], wanted)

    def add(self, name: str, layer: int, got_BN: Tensor, wanted_BN: Tensor) -> None:
        self.recall[name][layer].append(recall_at_kept(got_BN, wanted_BN, self.kept))

    def by_layer(self, name: str) -> dict[int, float]:
        return {layer: statistics.mean(recalls) for layer, recalls in self.recall[name].items()}


def main() -> None:
    options = common.parse(
        __doc__,
        steps=200,
        save=option(Path, "folder for the trained predictors, one a design"),
    )
    language.quiet()
    torch.manual_seed(0)
    model = language.load(dtype=torch.float32).eval()
    config = LemoConfig(mode="detach", layers="all")
    observer, width = Observer(model, config), model.config.hidden_size
    trained = {
        name: PatternPredictors(observer.layers, design=name, width=width, ranks=ranks)  # type: ignore[arg-type]
        for name, ranks in DESIGNS.items()
    }
    probes = nn.ModuleDict({str(layer): LinearProbe(width) for layer in observer.layers})
    samples = train(observer, trained, probes, options.steps)
    kept = BlockPlan.of(SEQ_LEN, config).kept_blocks
    judged = Judged(scorers(model, config, trained, probes), kept)
    held_out = lora.samples("held_out", SEQ_LEN)[:HELD_OUT]
    ids = [torch.tensor([sample["input_ids"]]) for sample in held_out]
    for each in tqdm(ids, desc="held out"):
        judged.sample(observer, each)
    for name, predictors in trained.items():
        predictors.recall = judged.by_layer(name)
        if options.save:
            save_predictors(predictors, options.save / name, base_fingerprint(model))
    table = common.Table(
        "lemo_predictors",
        "Which blocks a layer would choose, foretold",
        f"SmolLM2-135M, float32, blocks of 64, half kept, all layers; {options}; steps are of "
        f"one of {samples} samples; {torch.get_num_threads()} threads",
    )
    modules = {**trained, "linear probe": probes}
    sizes = {name: sum(p.numel() for p in each.parameters()) for name, each in modules.items()}
    total, step = model.num_parameters(), layer_seconds(model, ids[0])
    for name in judged.recall:
        means = judged.by_layer(name).values()
        row: dict[str, float] = {"recall": statistics.mean(means), "lowest_layer": min(means)}
        if times := judged.race.times.get(name):
            row |= times.columns("us", median="us_a_layer")
            row["of_its_step_%"] = 100 * times.median / step
        table.add(name, **row, **{"parameters_%": 100 * sizes.get(name, 0) / total})
    table.finish()


if __name__ == "__main__":
    main()
