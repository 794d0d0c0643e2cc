"""What token sparsity costs in quality: dense held-out loss after training on the same tokens.

    python scripts/bench/lemo_quality.py [--seeds 3] [--steps 16] [--contenders NAME ...] [--predictors DIR]

SmolLM2-135M, LoRA on all linear layers, AdamW, bfloat16 weights, float32 adapter. In
each seed all contenders start from the same adapter and see the same samples in the same order; every loss is
that of the dense model on held-out text.
"all queries" makes the scores from all queries of each block, the others
from the default's 32; "predicted" rows need the predictors of all layers, as lemo_predictors.py --save makes
them.
"""

import contextlib
import statistics
from typing import Any

import common
import torch
from common import option
from models import language, lora
from tqdm import tqdm

from lemo_trainer import LemoConfig, apply_lemo
from lemo_trainer.measure import ActivationBytes
from lemo_trainer.offline.thresholds import search_thresholds

SEQ_LEN, HELD_OUT, RATE = 512, 8, 1e-3  # tokens of a sample, samples of the loss, learning rate
SEARCHED = "searched"  # stands for what `search_thresholds` finds on other held-out text
SEGMENTS = {"mode": "segments", "segment_tokens": 128, "selector": "random"}
SHARED = {"mode": "detach", "keep_ratio": 0.5}
DETACH = {**SHARED, "shared_blocks": False}
ELIMINATE = {"mode": "eliminate", "keep_ratio": 0.5}
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "untouched": None,
    "dense LoRA": {"keep_ratio": 1.0, "selective_checkpointing": False},
    "nothing left out": {"keep_ratio": 1.0},
    "segments of 256": {**SEGMENTS, "segment_tokens": 256, "keep_ratio": 1.0},
    "segments of 128": {**SEGMENTS, "keep_ratio": 1.0},
    "segments of 128, 75%": {**SEGMENTS, "keep_ratio": 0.75},
    "segments of 128, 50%": {**SEGMENTS, "keep_ratio": 0.5},
    "detach, random, shared, 75%": {**SHARED, "keep_ratio": 0.75, "selector": "random"},
    "detach, random, shared, 50%": {**SHARED, "selector": "random"},
    "detach, random, 50%": {**DETACH, "selector": "random"},
    "detach, informativeness, shared, 50%": SHARED,
    "detach, informativeness, 50%": DETACH,
    "detach, informativeness, shared, 50%, causal scores": {**SHARED, "causal_scores": True},
    "detach, informativeness, shared, 50%, falling over 8 steps": {**SHARED, "ramp_steps": 8},
    "detach, random tokens, shared (as TokenTune), 50%": {**SHARED, "selector": "random", "block_size": 1},
    "eliminate, informativeness, 50%": ELIMINATE,
    "eliminate, random, 50%": {**ELIMINATE, "selector": "random"},
    "eliminate, informativeness, 50%, labels by kept share": {**ELIMINATE, "label_weights": "share"},
    "eliminate, thresholds searched for +0.05": {"mode": "eliminate", "thresholds": SEARCHED},
}
_HALVES = {"detach, {}, shared, 50%": SHARED, "detach, {}, 50%": DETACH, "eliminate, {}, 50%": ELIMINATE}
for _name, _half in _HALVES.items():
    CONTENDERS[f"{_name.format('informativeness')}, all queries"] = {**_half, "attention_score_tokens": 64}
DEFAULT = list(CONTENDERS)
PREDICTED = {name.format("predicted"): {**half, "selector": "predictor"} for name, half in _HALVES.items()}
CONTENDERS |= PREDICTED


def batch(sample: dict[str, list[int]]) -> dict[str, Any]:
    return {**{name: torch.tensor([values]) for name, values in sample.items()}, "use_cache": False}


@torch.no_grad()
def held_out_loss(model: Any, samples: list[dict[str, list[int]]]) -> float:
    model.eval()
    return statistics.mean(model(**batch(sample)).loss.item() for sample in samples)


def train(model: Any, config: LemoConfig, samples: list[dict[str, list[int]]], lr: float) -> float:
    """Train on the samples; returns the most MB that the first step saved for a backward pass."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    report = apply_lemo(model, config)
    activations = ActivationBytes()
    for step, sample in enumerate(samples):
        report.at_step(step)
        with contextlib.nullcontext() if step else activations:
            model(**batch(sample)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return activations.saved_bytes / 1e6


def searched_thresholds(samples: list[dict[str, list[int]]]) -> str:
    """The thresholds of elimination in all layers that cost 0.05 nats together, before any training."""
    model = language.load(dtype=torch.bfloat16)
    config = LemoConfig(mode="eliminate", layers="all")
    found = search_thresholds(model, [batch(sample) for sample in samples], config, max_increase=0.05)
    tqdm.write(f"thresholds {found.thresholds}: held-out loss {found.dense_loss:.4f} -> {found.loss:.4f}")
    for row in found.layers:
        tqdm.write(str(row))
    return LemoConfig(mode="eliminate", thresholds=found.thresholds).thresholds  # type: ignore[arg-type]


def main() -> None:
    options = common.parse(
        __doc__,
        seeds=3,
        steps=16,
        contenders=option(DEFAULT, choices=CONTENDERS),
        predictors=option("", "folder for the predicted rows, which then join the default ones"),
    )
    if options.predictors and options.contenders == DEFAULT:
        options.contenders = list(CONTENDERS)
    for lemo in PREDICTED.values():
        lemo["predictors"] = options.predictors
    language.quiet()

    text, held_out = (lora.samples(split, SEQ_LEN) for split in ("train", "held_out"))
    held_out, for_search = held_out[:HELD_OUT], held_out[HELD_OUT:][:2]
    losses: dict[str, list[float]] = {name: [] for name in options.contenders}
    saved: dict[str, float] = {}
    runs = [(seed, name) for seed in range(options.seeds) for name in options.contenders]
    for seed, name in tqdm(runs, desc="lemo_quality", unit="run"):
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))[: options.steps]
        lemo = CONTENDERS[name]
        if lemo and lemo.get("thresholds") == SEARCHED:
            lemo["thresholds"] = searched_thresholds(for_search)
        samples = [] if lemo is None else [text[i] for i in order.tolist()]
        model = lora.smollm2(seed, torch.bfloat16)
        saved[name] = train(model, LemoConfig(**(lemo or {})), samples, RATE)
        losses[name].append(held_out_loss(model, held_out))
        tqdm.write(f"seed {seed}: {name}: {losses[name][-1]:.4f}")

    table = common.Table(
        "lemo_quality",
        "Dense held-out loss after training with token sparsity, SmolLM2-135M",
        f"bfloat16 weights, float32 adapter, {options.steps} steps of {SEQ_LEN} tokens, "
        f"lr {RATE:g}, LoRA r 8 on all linear layers, {options.seeds} seeds; held-out loss over "
        f"{len(held_out) * SEQ_LEN} tokens; default layers of each mode",
    )
    for name, values in losses.items():
        spread = {"lowest": min(values), "highest": max(values)}
        table.add(name, held_out_loss=statistics.mean(values), **spread, saved_MB=saved[name])
        if "untouched" in losses and "dense LoRA" in losses and name != "untouched":
            three = zip(losses["untouched"], losses["dense LoRA"], values, strict=True)
            gains = [(base - value) / (base - dense) for base, dense, value in three]
            table.add(name, share_of_dense_gain=statistics.mean(gains))
    table.finish()


if __name__ == "__main__":
    main()
