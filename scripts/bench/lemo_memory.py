"""LeMo's memory: activations of a step at 2,048 to 8,192 tokens, and the longest sample within a limit.

    python scripts/bench/lemo_memory.py [--seq-lens 2048 4096 8192] [--limit 4] [--seconds]

One forward and backward pass of SmolLM2-135M with LoRA for each row, every tensor counted; beside it what
`lemo plan` predicts from models of one and four layers. With --seconds a second pass is timed (and the
prediction of time shown), which needs a quiet machine.
"""

import common
import torch
from common import assets, option
from harness import timed
from models import language, lora
from tqdm import tqdm
from transformers import AutoConfig

from lemo_trainer import LemoConfig
from lemo_trainer.measure import ActivationBytes, FlopCounter
from lemo_trainer.plan import Setup, predict

CONTENDERS: dict[str, lora.Method] = {
    "LoRA": (None, False),
    "LoRA + segmented loss": (lora.SEGMENTED_LOSS, False),
    "LoRA + checkpointing + segmented loss": (lora.SEGMENTED_LOSS, True),
    "LeMo, nothing left out": (LemoConfig(mode="detach", keep_ratio=1.0), False),
    "LeMo, segments of 512": (LemoConfig(mode="segments"), False),
    "LeMo, detach, 50%": (lora.DETACH, False),
    "LeMo, detach, 50% + checkpointing": (lora.DETACH, True),
}
LONGEST = ("LoRA", "LoRA + checkpointing + segmented loss", "LeMo, segments of 512", "LeMo, detach, 50%")


def step(name: str, seq_len: int, timed: bool) -> dict[str, float]:
    """Bytes, operations and perhaps seconds of one forward and backward pass."""
    model = lora.smollm2()
    tokens = torch.randint(model.config.vocab_size, (1, seq_len))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    with lora.prepared(model, *CONTENDERS[name]):
        with ActivationBytes() as activations, FlopCounter() as counter:
            lora.loss_of(model, tokens).backward()
        state = sum(p.nbytes for p in model.parameters()) + 3 * sum(p.nbytes for p in trained)
        row = {
            "saved_MB": activations.saved_bytes / 1e6,
            "peak_MB": (activations.peak_bytes + state) / 1e6,
            "GFLOP": counter.flops / 1e9,
        }
        if timed:
            row["seconds"] = timed(lambda: (lora.loss_of(model, tokens).backward(), optimizer.step())).wall
    return row


def setup(seq_len: int) -> Setup:
    return Setup(model_config=AutoConfig.from_pretrained(assets.model_dir()), seq_len=seq_len, lora=lora.LORA)


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


def table_of(seq_len: int, contenders: list[str], timed: bool) -> common.Table:
    table = common.Table(
        "lemo_memory",
        f"LeMo: one step of SmolLM2-135M with LoRA, {seq_len} tokens",
        f"float32, {seq_len} tokens, batch 1, {torch.get_num_threads()} threads; LoRA r 8 on all linear "
        "layers; peak is of tensors: weights, gradients, AdamW's states, activations",
    )
    for name in tqdm(contenders, desc=f"{seq_len} tokens", unit="contender"):
        lemo, checkpointing = CONTENDERS[name]
        row = step(name, seq_len, timed)
        cost = predict(setup(seq_len), lemo, checkpointing=checkpointing, repeats=2 if timed else 0)
        row |= {"predicted_saved_MB": cost.saved_bytes / 1e6, "predicted_peak_MB": cost.peak_bytes / 1e6}
        if timed:
            row["predicted_seconds"] = cost.seconds
        table.add(name, **row)
    return table


def table_of_longest(limit: float) -> common.Table:
    table = common.Table(
        "lemo_longest",
        f"LeMo: the longest sample whose step fits {limit:g} GiB, SmolLM2-135M with LoRA",
        f"float32, batch 1, in steps of 256 tokens; limit {limit:g} GiB on the tensors' peak as "
        "predicted, then measured at the length found",
    )
    for name in tqdm(LONGEST, desc="longest", unit="contender"):
        tokens = longest(name, limit * 2**30)
        measured = step(name, tokens, False)["peak_MB"] * 1e6 / 2**30
        table.add(name, tokens=float(tokens), measured_peak_GiB=measured)
    return table


def main() -> None:
    options = common.parse(
        __doc__,
        seq_lens=[2048, 4096, 8192],
        contenders=option(list(CONTENDERS), choices=CONTENDERS),
        limit=option(1.5, "GiB for the longest sample; 0 leaves it out"),
        seconds=option(False, "time a second pass"),
    )
    language.quiet()
    for seq_len in options.seq_lens:
        table_of(seq_len, options.contenders, options.seconds).finish()
    if options.limit:
        table_of_longest(options.limit).finish()


if __name__ == "__main__":
    main()
