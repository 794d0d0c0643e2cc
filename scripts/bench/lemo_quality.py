"""What token sparsity costs in quality: dense held-out loss after training on the same tokens.

    python scripts/bench/lemo_quality.py [--seeds 3] [--steps 16] [--seq-len 1024] [--contenders NAME ...]

SmolLM2-135M, LoRA on all linear layers, AdamW. In each seed all contenders start from the same adapter and
see the same samples in the same order; every loss is that of the dense model on held-out text.
"""

from __future__ import annotations

import argparse
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
from lemo_trainer.recipe import pack

# isort: split
import assets  # common.py puts its folder on the path

DETACH = {"mode": "detach"}
SHARED = {"mode": "detach", "shared_blocks": True}
CONTENDERS: dict[str, dict[str, Any] | None] = {
    "untouched": None,
    "dense LoRA": {"keep_ratio": 1.0},
    "eliminate, informativeness": {"mode": "eliminate"},
    "eliminate, random": {"mode": "eliminate", "selector": "random"},
    "detach, informativeness": DETACH,
    "detach, informativeness, shared": SHARED,
    "detach, random": {**DETACH, "selector": "random"},
    "detach, random, shared": {**SHARED, "selector": "random"},
    "detach, norm, shared": {**SHARED, "selector": "norm"},
    "detach, recency, shared": {**SHARED, "selector": "recency"},
    "detach, random tokens, shared (TokenTune)": {**SHARED, "selector": "random", "block_size": 1},
}


def batch(sample: dict[str, list[int]]) -> dict[str, Any]:
    return {**{name: torch.tensor([values]) for name, values in sample.items()}, "use_cache": False}


@torch.no_grad()
def held_out_loss(model: Any, samples: list[dict[str, list[int]]]) -> float:
    model.eval()
    return statistics.mean(model(**batch(sample)).loss.item() for sample in samples)


def train(config: LemoConfig, samples: list[dict[str, list[int]]], lr: float, seed: int) -> tuple[Any, float]:
    """The trained model and the most MB that a step saved for its backward pass."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(assets.model_dir(), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    apply_lemo(model, config)
    model.train()
    most = 0
    for sample in samples:
        with ActivationBytes() as saved:
            loss = model(**batch(sample)).loss
            most = max(most, saved.bytes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, most / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--held-out", type=int, default=4, help="held-out samples of the loss")
    parser.add_argument("--keep-ratio", type=float, default=0.4)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(assets.model_dir())
    text = pack(assets.texts("train"), tokenizer, options.seq_len)
    held_out = pack(assets.texts("held_out"), tokenizer, options.seq_len)[: options.held_out]
    losses: dict[str, list[float]] = {name: [] for name in options.contenders}
    saved: dict[str, float] = {}
    runs = [(seed, name) for seed in range(options.seeds) for name in options.contenders]
    for seed, name in tqdm(runs, desc="lemo_quality", unit="run"):
        order = torch.randperm(len(text), generator=torch.Generator().manual_seed(seed))[: options.steps]
        lemo = CONTENDERS[name]
        samples = [] if lemo is None else [text[i] for i in order.tolist()]
        config = LemoConfig(**{"keep_ratio": options.keep_ratio, **(lemo or {})})
        model, saved[name] = train(config, samples, options.lr, seed)
        losses[name].append(held_out_loss(model, held_out))
        tqdm.write(f"seed {seed}: {name}: {losses[name][-1]:.4f}")

    table = common.Table(
        "lemo_quality",
        "Dense held-out loss after training with token sparsity, SmolLM2-135M",
        f"float32, {options.steps} steps of {options.seq_len} tokens, lr {options.lr:g}, LoRA r 8 on all "
        f"linear layers, {options.seeds} seeds, {options.keep_ratio:.0%} kept; held-out loss over "
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
