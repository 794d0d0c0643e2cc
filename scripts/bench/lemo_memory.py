"""LeMo's memory: activations of a step at 2,048 to 8,192 tokens, and the longest sample within a limit.

    python scripts/bench/lemo_memory.py [--seq-lens 2048 4096 8192] [--limit 4] [--seconds]

One forward and backward pass of SmolLM2-135M with LoRA for each row, every tensor counted; beside it what
`lemo plan` predicts from models of one and four layers. With --seconds a second pass is timed (and the
prediction of time shown), which needs a quiet machine.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import common
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from lemo_trainer import LemoConfig, apply_lemo
from lemo_trainer.measure import ActivationBytes, FlopCounter
from lemo_trainer.plan import Setup, predict

# isort: split
import assets  # common.py puts its folder on the path

LORA: dict[str, Any] = {"r": 8, "target_modules": "all-linear"}
SEGMENTED_LOSS = LemoConfig(mode="detach", keep_ratio=1.0, selective_checkpointing=False)
SELECTIVE = LemoConfig(mode="detach", keep_ratio=1.0)
DETACH = LemoConfig(mode="detach", keep_ratio=0.5)
CONTENDERS: dict[str, tuple[LemoConfig | None, bool]] = {
    "LoRA": (None, False),
    "LoRA + segmented loss": (SEGMENTED_LOSS, False),
    "LoRA + checkpointing + segmented loss": (SEGMENTED_LOSS, True),
    "LeMo, nothing left out": (SELECTIVE, False),
    "LeMo, exact by layers": (LemoConfig(mode="exact", scheme="layers"), False),
    "LeMo, exact by layers, on disk": (
        LemoConfig(mode="exact", scheme="layers", boundaries="disk"),
        False,
    ),
    "LeMo, exact by segments": (LemoConfig(mode="exact", scheme="segments"), False),
    "LeMo, segments of 512": (LemoConfig(mode="segments"), False),
    "LeMo, detach, 50%": (DETACH, False),
    "LeMo, detach, 50% + checkpointing": (DETACH, True),
}
LONGEST = ("LoRA", "LoRA + checkpointing + segmented loss", "LeMo, segments of 512", "LeMo, detach, 50%")


def step(name: str, seq_len: int, timed: bool) -> dict[str, float]:
    """Bytes, operations and perhaps seconds of one forward and backward pass."""
    lemo, checkpointing = CONTENDERS[name]
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(assets.model_dir(), dtype=torch.float32)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)).train()
    if checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    if lemo is not None:
        apply_lemo(model, lemo)
    tokens = torch.randint(model.config.vocab_size, (1, seq_len))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    with ActivationBytes() as activations, FlopCounter() as counter:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    state = sum(p.nbytes for p in model.parameters()) + 3 * sum(p.nbytes for p in trained)
    row = {
        "saved_MB": activations.saved_bytes / 1e6,
        "peak_MB": (activations.peak_bytes + state) / 1e6,
        "GFLOP": counter.flops / 1e9,
    }
    if timed:
        start = time.perf_counter()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        row["seconds"] = time.perf_counter() - start
    return row


def setup(seq_len: int) -> Setup:
    return Setup(model_config=AutoConfig.from_pretrained(assets.model_dir()), seq_len=seq_len, lora=LORA)


def longest(name: str, limit: float) -> int:
    """The most tokens, in steps of 256, whose predicted peak stays within `limit` bytes.

    The next length to try lies on the line through the last two, until that is a length already tried.
    """
    lemo, checkpointing = CONTENDERS[name]
    peaks: dict[int, float] = {}
    last, tokens = 1024, 2048
    while tokens not in peaks:
        for tried in {last, tokens} - peaks.keys():
            peaks[tried] = predict(setup(tried), lemo, checkpointing=checkpointing, repeats=0).peak_bytes
        slope = (peaks[tokens] - peaks[last]) / (tokens - last)
        last, tokens = tokens, max(256, int((tokens + (limit - peaks[tokens]) / slope) / 256) * 256)
    return max(tokens for tokens, peak in peaks.items() if peak <= limit)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seq-lens", nargs="*", type=int, default=[2048, 4096, 8192])
    parser.add_argument("--contenders", nargs="*", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument(
        "--limit", type=float, default=1.5, help="GiB for the longest sample; 0 leaves it out"
    )
    parser.add_argument("--seconds", action="store_true", help="time a second pass")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()

    for seq_len in options.seq_lens:
        table = common.Table(
            "lemo_memory",
            f"LeMo: one step of SmolLM2-135M with LoRA, {seq_len} tokens",
            f"float32, {seq_len} tokens, batch 1, {torch.get_num_threads()} threads; LoRA r 8 on all linear "
            "layers; peak is of tensors: weights, gradients, AdamW's states, activations",
        )
        for name in tqdm(options.contenders, desc=f"{seq_len} tokens", unit="contender"):
            lemo, checkpointing = CONTENDERS[name]
            row = step(name, seq_len, options.seconds)
            cost = predict(
                setup(seq_len), lemo, checkpointing=checkpointing, repeats=2 if options.seconds else 0
            )
            row["predicted_saved_MB"], row["predicted_peak_MB"] = (
                cost.saved_bytes / 1e6,
                cost.peak_bytes / 1e6,
            )
            if options.seconds:
                row["predicted_seconds"] = cost.seconds
            table.add(name, **row)
        table.finish()

    if options.limit:
        limit = options.limit * 2**30
        table = common.Table(
            "lemo_longest",
            f"LeMo: the longest sample whose step fits {options.limit:g} GiB, SmolLM2-135M with LoRA",
            f"float32, batch 1, in steps of 256 tokens; limit {options.limit:g} GiB on the tensors' peak as "
            "predicted, then measured at the length found",
        )
        for name in tqdm(LONGEST, desc="longest", unit="contender"):
            tokens = longest(name, limit)
            table.add(
                name,
                tokens=float(tokens),
                measured_peak_GiB=step(name, tokens, False)["peak_MB"] * 1e6 / 2**30,
            )
        table.finish()


if __name__ == "__main__":
    main()
