"""Which blocks a layer would choose, foretold: recall against time, predictors and cheaper designs.

    python scripts/bench/lemo_predictors.py [--steps 200] [--seq-len 1024] [--layers all] [--save DIR]

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

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_trainer import LemoConfig, apply_lemo
from lemo_trainer.informativeness.predictor_files import base_fingerprint, save_predictors
from lemo_trainer.informativeness.predictors import PatternPredictors, recall_at_kept
from lemo_trainer.informativeness.scores import attention_map, map_scores
from lemo_trainer.informativeness.selection import BlockPlan
from lemo_trainer.model.capture import attention_inputs
from lemo_trainer.offline.observation import LayerInput, Observer
from lemo_trainer.texts import pack

# isort: split
import assets  # common.py puts its folder on the path

DESIGNS = {"paper": (16, 16, 16), "max": (32, 32, 32)}
QUERIES = (64, 32, 24, 16, 8)
RANKS = (64, 192)


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


def low_rank(weight: Tensor, rank: int) -> nn.Linear:
    """A projection with the `rank` largest singular directions of `weight`, as two factors in one module."""
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    first = nn.Linear(weight.shape[1], rank, bias=False)
    second = nn.Linear(rank, weight.shape[0], bias=False)
    first.weight.data, second.weight.data = v[:rank], u[:, :rank] * s[:rank]
    return nn.Sequential(first, second)


def scorers(model: Any, config: LemoConfig, trained: dict[str, PatternPredictors], probes: Any) -> Any:
    """By contender: the scores [B, N] from a layer's input, or None for what is read off other layers."""
    rotary, layers = model.model.rotary_emb, model.model.layers

    def from_queries(count: int) -> Callable[[LayerInput], Tensor]:
        def scores(seen: LayerInput) -> Tensor:
            layer = layers[seen.index]
            x_BSD = layer.input_layernorm(seen.hidden)
            positions = rotary(x_BSD, torch.arange(x_BSD.shape[1])[None])
            inputs = attention_inputs(
                layer.self_attn, x_BSD, position_embeddings=positions, attention_mask=None
            )
            return map_scores(attention_map(inputs, None, config.block_size, count))

        return scores

    def copies(rank: int) -> Callable[[LayerInput], Tensor]:
        factors = [
            [low_rank(p.weight.data, rank) for p in (layer.self_attn.q_proj, layer.self_attn.k_proj)]
            for layer in layers
        ]

        def scores(seen: LayerInput) -> Tensor:
            attention = layers[seen.index].self_attn
            own = attention.q_proj, attention.k_proj
            attention.q_proj, attention.k_proj = factors[seen.index]
            try:
                return from_queries(config.block_size)(seen)
            finally:
                attention.q_proj, attention.k_proj = own

        return scores

    def learned(predictors: PatternPredictors) -> Callable[[LayerInput], Tensor]:
        return lambda seen: map_scores(predictors.pooled_map(seen.index, seen.hidden, None))

    return {
        "exact": from_queries(config.block_size),
        "position": lambda seen: -torch.arange(seen.hidden.shape[1] // config.block_size).float()[None],
        **{f"{count} queries of 64": from_queries(count) for count in QUERIES[1:]},
        **{f"low rank {rank}": copies(rank) for rank in RANKS},
        "linear probe": lambda seen: probes[str(seen.index)](seen.hidden),
        **{name: learned(predictors) for name, predictors in trained.items()},
    }


def layer_seconds(model: Any, tokens: Tensor) -> float:
    """Median time of a training step that leaves out half without looking, over the number of layers."""
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear")).train()
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable()
    apply_lemo(model, LemoConfig(selector="recency"))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) / model.config.num_hidden_layers


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=6, help="held-out samples")
    parser.add_argument("--layers", default="all")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--save", help="folder for the trained predictors, one a design")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)

    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir())
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir(), dtype=torch.float32).eval()
    config = LemoConfig(layers=options.layers)
    observer = Observer(model, config)
    text = [torch.tensor([s["input_ids"]]) for s in pack(assets.texts("train"), tokenizer, options.seq_len)]
    held_out = pack(assets.texts("held_out"), tokenizer, options.seq_len)[: options.held_out]
    width = model.config.hidden_size
    trained = {
        name: PatternPredictors(observer.layers, design=name, width=width, ranks=ranks)  # type: ignore[arg-type]
        for name, ranks in DESIGNS.items()
    }
    probes = nn.ModuleDict({str(layer): LinearProbe(width) for layer in observer.layers})
    parameters = [*probes.parameters(), *(p for each in trained.values() for p in each.parameters())]
    optimizer = torch.optim.AdamW(parameters, lr=options.lr)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=options.steps)
    order = torch.randperm(len(text)).repeat(-(-options.steps // len(text)))
    for step in tqdm(range(options.steps), desc="training", unit="step"):
        for seen in observer({"input_ids": text[order[step]]}):
            for predictors in trained.values():
                predictors.of(seen.index).loss(seen.hidden, None, seen.exact_map)[0].backward()
            wanted_BN = map_scores(seen.exact_map).log()
            nn.functional.mse_loss(probes[str(seen.index)](seen.hidden), wanted_BN).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    kept = BlockPlan.of(options.seq_len, config).kept_blocks
    contenders = scorers(model, config, trained, probes)
    recall: dict[str, dict[int, list[float]]] = {}
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for sample in tqdm(held_out, desc="held out"):
        exact: dict[int, Tensor] = {}
        for seen in observer({"input_ids": torch.tensor([sample["input_ids"]])}):
            exact[seen.index] = map_scores(seen.exact_map)
            with torch.no_grad():
                for name, scores in contenders.items():
                    start = time.perf_counter()
                    got_BN = scores(seen)
                    seconds[name].append(time.perf_counter() - start)
                    found = recall_at_kept(got_BN, exact[seen.index], kept)
                    recall.setdefault(name, {}).setdefault(seen.index, []).append(found)
        for name, source in (
            ("first layer", lambda i: min(i, 1)),
            ("previous layer", lambda i: max(i - 1, 0)),
        ):
            for layer in observer.layers:
                found = recall_at_kept(exact[source(layer)], exact[layer], kept)
                recall.setdefault(name, {}).setdefault(layer, []).append(found)

    sizes = {name: sum(p.numel() for p in each.parameters()) for name, each in trained.items()}
    sizes["linear probe"] = sum(p.numel() for p in probes.parameters())
    for name, predictors in trained.items():
        predictors.recall = {layer: statistics.mean(values) for layer, values in recall[name].items()}
        if options.save:
            save_predictors(predictors, Path(options.save) / name, base_fingerprint(model))
    table = common.Table(
        "lemo_predictors",
        "Which blocks a layer would choose, foretold",
        f"SmolLM2-135M, float32, {options.seq_len} tokens, blocks of 64, half kept, layers {options.layers}; "
        f"{options.steps} steps of one sample, {len(text)} samples; held out {len(held_out)} samples; "
        f"{torch.get_num_threads()} threads",
    )
    total = model.num_parameters()
    step = layer_seconds(model, torch.tensor([held_out[0]["input_ids"]]))
    for name, by_layer in recall.items():
        means = [statistics.mean(values) for values in by_layer.values()]
        row: dict[str, float] = {"recall": statistics.mean(means), "lowest_layer": min(means)}
        if name in seconds:
            row["us_a_layer"] = 1e6 * statistics.median(seconds[name])
            row["of_its_step_%"] = 100 * statistics.median(seconds[name]) / step
        row["parameters_%"] = 100 * sizes.get(name, 0) / total
        table.add(name, **row)
    table.finish()


if __name__ == "__main__":
    main()
