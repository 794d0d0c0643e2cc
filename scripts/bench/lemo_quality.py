"""What token sparsity costs in quality: dense held-out loss after training on the same tokens.

    python scripts/bench/lemo_quality.py [--seeds 3] [--steps 16] [--seq-len 512] [--contenders NAME ...]
        [--predictors DIR]

SmolLM2-135M, LoRA on all linear layers, AdamW, bfloat16 weights (or --dtype float32), float32 adapter. In
each seed all contenders start from the same adapter and see the same samples in the same order; every loss is
that of the dense model on held-out text.
"all queries" makes the scores from all queries of each block, the others
from the default's 32; "predicted" rows need the predictors of all layers, as lemo_predictors.py --save makes
them.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from typing import Any

import common
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from lemo_trainer import LemoConfig, apply_lemo
from lemo_trainer.measure import ActivationBytes
from lemo_trainer.offline.thresholds import search_thresholds
from lemo_trainer.texts import pack

# isort: split
import assets  # common.py puts its folder on the path

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
    "detach, informativeness, shared, 50%, all queries": {**SHARED, "attention_score_tokens": 64},
    "detach, informativeness, 50%, all queries": {**DETACH, "attention_score_tokens": 64},
    "eliminate, informativeness, 50%, all queries": {**ELIMINATE, "attention_score_tokens": 64},
}
PREDICTED: dict[str, dict[str, Any] | None] = {
    "detach, predicted, shared, 50%": {**SHARED, "selector": "predictor"},
    "detach, predicted, 50%": {**DETACH, "selector": "predictor"},
    "eliminate, predicted, 50%": {**ELIMINATE, "selector": "predictor"},
}
DEFAULT = list(CONTENDERS)
CONTENDERS |= PREDICTED


def batch(sample: dict[str, list[int]]) -> dict[str, Any]:
    return {**{name: torch.tensor([values]) for name, values in sample.items()}, "use_cache": False}


@torch.no_grad()
def held_out_loss(model: Any, samples: list[dict[str, list[int]]]) -> float:
    model.eval()
    return statistics.mean(model(**batch(sample)).loss.item() for sample in samples)


def train(
    config: LemoConfig, samples: list[dict[str, list[int]]], lr: float, seed: int, dtype: torch.dtype
) -> tuple[Any, float]:
    """The trained model and the most MB that its first step saved for a backward pass."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir(), dtype=dtype)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    report = apply_lemo(model, config)
    model.train()
    activations = ActivationBytes()
    for step, sample in enumerate(samples):
        report.at_step(step)
        with activations if step == 0 else contextlib.nullcontext():
            model(**batch(sample)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, activations.saved_bytes / 1e6


def searched_thresholds(samples: list[dict[str, list[int]]]) -> str:
    """The thresholds of elimination in all layers that cost 0.05 nats together, before any training."""
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir(), dtype=torch.bfloat16)
    config = LemoConfig(mode="eliminate", layers="all")
    found = search_thresholds(model, [batch(sample) for sample in samples], config, max_increase=0.05)
    tqdm.write(f"thresholds {found.thresholds}: held-out loss {found.dense_loss:.4f} -> {found.loss:.4f}")
    for row in found.layers:
        tqdm.write(str(row))
    return LemoConfig(mode="eliminate", thresholds=found.thresholds).thresholds  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--held-out", type=int, default=8, help="held-out samples of the loss")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=DEFAULT)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument(
        "--predictors", help="folder for the predicted rows, which then join the default ones"
    )
    options = parser.parse_args()
    if options.predictors and options.contenders == DEFAULT:
        options.contenders = list(CONTENDERS)
    for lemo in PREDICTED.values():
        assert lemo is not None
        lemo["predictors"] = options.predictors or ""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir())
    text = pack(assets.texts("train"), tokenizer, options.seq_len)
    held_out = pack(assets.texts("held_out"), tokenizer, options.seq_len)
    held_out, for_search = held_out[: options.held_out], held_out[options.held_out :][:2]
    losses: dict[str, list[float]] = {name: [] for name in options.contenders}
    saved: dict[str, float] = {}
    runs = [(seed, name) for seed in range(options.seeds) for name in options.contenders]
    for seed, name in tqdm(runs, desc="lemo_quality", unit="run"):
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))[: options.steps]
        lemo = CONTENDERS[name]
        if lemo and lemo.get("thresholds") == SEARCHED:
            lemo["thresholds"] = searched_thresholds(for_search)
        samples = [] if lemo is None else [text[i] for i in order.tolist()]
        config = LemoConfig(**(lemo or {}))
        dtype = getattr(torch, options.dtype)
        model, saved[name] = train(config, samples, options.lr, seed, dtype)
        losses[name].append(held_out_loss(model, held_out))
        tqdm.write(f"seed {seed}: {name}: {losses[name][-1]:.4f}")

    table = common.Table(
        "lemo_quality",
        "Dense held-out loss after training with token sparsity, SmolLM2-135M",
        f"{options.dtype} weights, float32 adapter, {options.steps} steps of {options.seq_len} tokens, "
        f"lr {options.lr:g}, LoRA r 8 on all linear layers, {options.seeds} seeds; held-out loss over "
        f"{len(held_out) * options.seq_len} tokens; default layers of each mode",
    )
    for name, values in losses.items():
        table.add(
            name,
            held_out_loss=statistics.mean(values),
            lowest=min(values),
            highest=max(values),
            saved_MB=saved[name],
        )
        if "untouched" in losses and "dense LoRA" in losses and name != "untouched":
            gains = [
                (base - value) / (base - dense)
                for base, dense, value in zip(losses["untouched"], losses["dense LoRA"], values, strict=True)
            ]
            table.add(name, share_of_dense_gain=statistics.mean(gains))
    table.finish()


if __name__ == "__main__":
    main()
