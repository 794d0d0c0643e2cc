"""LeMo's memory: activations of a step at 2,048 to 8,192 tokens, and the longest sample within a limit.

    python scripts/bench/lemo_memory.py [--seq-lens 2048 4096 8192] [--limit 4] [--layers 4] [--seconds]

One forward and backward pass of SmolLM2-135M with LoRA for each row, every tensor counted; beside it what
`lemo plan` predicts from models of one and four layers. With --seconds a second pass is timed (and the
prediction of time shown), which needs a quiet machine.
"""

import math
from typing import Any

import common
import torch
from common import assets, option
from harness import timed
from models import language, lora
from tqdm import tqdm
from transformers import AutoConfig

from lemo_trainer import LemoConfig
from lemo_trainer.exact.ways import Way
from lemo_trainer.measure import ActivationBytes, FlopCounter
from lemo_trainer.offline.step_cost import Setup, StepCost, predict
from lemo_trainer.offline.way_costs import plan_ways

CONTENDERS: dict[str, lora.Method] = {
    "LoRA": (None, False),
    "LoRA + segmented loss": (lora.SEGMENTED_LOSS, False),
    "LoRA + checkpointing + segmented loss": (lora.SEGMENTED_LOSS, True),
    "LeMo, nothing left out": (LemoConfig(mode="detach", keep_ratio=1.0), False),
    "LeMo, exact by layers": (LemoConfig(mode="exact", scheme="layers"), False),
    "LeMo, exact by layers, on disk": (
        LemoConfig(mode="exact", scheme="layers", boundaries="disk"),
        False,
    ),
    "LeMo, exact by segments": (LemoConfig(mode="exact", scheme="segments"), False),
    "LeMo, segments of 512": (LemoConfig(mode="segments"), False),
    "LeMo, detach, 50%": (lora.DETACH, False),
    "LeMo, detach, 50% + checkpointing": (lora.DETACH, True),
}
LONGEST = ("LoRA", "LoRA + checkpointing + segmented loss", "LeMo, segments of 512", "LeMo, detach, 50%")


def step(method: lora.Method, seq_len: int, layers: int, seconds: bool = False) -> dict[str, float]:
    """Bytes, operations and perhaps seconds of one forward and backward pass."""
    model = lora.smollm2(layers=layers)
    tokens = torch.randint(model.config.vocab_size, (1, seq_len))
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.AdamW(trained)
    with lora.prepared(model, *method):
        with ActivationBytes() as activations, FlopCounter() as counter:
            lora.loss_of(model, tokens).backward()
        state = sum(p.nbytes for p in model.parameters()) + 3 * sum(p.nbytes for p in trained)
        peak = (activations.peak_bytes + state) / 1e6
        row = {"saved_MB": activations.saved_bytes / 1e6, "peak_MB": peak, "GFLOP": counter.flops / 1e9}
        if seconds:
            again = timed(lambda: (lora.loss_of(model, tokens).backward(), optimizer.step()))
            row["seconds"] = again.wall
    return row


def predicted(method: lora.Method, seq_len: int, layers: int, repeats: int = 0) -> Any:
    """What `lemo plan` says that a step costs."""
    config = AutoConfig.from_pretrained(assets.model_dir())
    config.num_hidden_layers = layers or config.num_hidden_layers
    setup = Setup(model_config=config, seq_len=seq_len, lora=lora.LORA)
    lemo = method[0]
    if lemo is not None and lemo.mode == "exact" and not repeats:
        plans = plan_ways(setup, LemoConfig(segment_tokens=lemo.segment_tokens), math.inf)
        options = {"segment_tokens": lemo.segment_tokens, "boundaries": lemo.boundaries}
        way = Way(scheme=lemo.scheme, selective=lemo.scheme == "segments", **options)
        plan = next(plan for plan in plans if plan.cost.way == way)
        return StepCost(plan.cost.saved, plan.peak, plan.cost.flops, 0.0)
    return predict(setup, method[0], checkpointing=method[1], repeats=repeats)


def longest(method: lora.Method, limit: float, layers: int) -> int:
    """The most tokens, in steps of 256, whose predicted peak stays within `limit` bytes.

    The next length to try lies on the line through the last two, until that is a length already tried.
    """
    peaks: dict[int, float] = {}
    last, tokens = 1024, 2048
    while tokens not in peaks:
        peaks |= {
            tried: predicted(method, tried, layers).peak_bytes for tried in {last, tokens} - peaks.keys()
        }
        slope = (peaks[tokens] - peaks[last]) / (tokens - last)
        last, tokens = tokens, max(256, int((tokens + (limit - peaks[tokens]) / slope) / 256) * 256)
    return max(tokens for tokens, peak in peaks.items() if peak <= limit)


def main() -> None:
    options = common.parse(
        __doc__,
        seq_lens=[2048, 4096, 8192],
        contenders=option(list(CONTENDERS), choices=CONTENDERS),
        limit=option(1.5, "GiB for the longest sample; 0 leaves it out"),
        seconds=option(False, "time a second pass"),
        layers=option(0, "layers of the model, for long samples; 0 keeps all"),
    )
    language.quiet()
    for seq_len in options.seq_lens:
        table = common.Table(
            "lemo_memory",
            f"LeMo: one step of SmolLM2-135M with LoRA, {seq_len} tokens",
            f"{options.layers or 'all'} layers, float32, {seq_len} tokens, batch 1, "
            f"{torch.get_num_threads()} threads; LoRA r 8 on all linear "
            "layers; peak is of tensors: weights, gradients, AdamW's states, activations",
        )
        for name in tqdm(options.contenders, desc=f"{seq_len} tokens", unit="contender"):
            table.add(name, **step(CONTENDERS[name], seq_len, options.layers, options.seconds))
            cost = predicted(CONTENDERS[name], seq_len, options.layers, repeats=2 if options.seconds else 0)
            table.add(
                name, predicted_saved_MB=cost.saved_bytes / 1e6, predicted_peak_MB=cost.peak_bytes / 1e6
            )
            if options.seconds:
                table.add(name, predicted_seconds=cost.seconds)
        table.finish()
    if options.limit:
        table = common.Table(
            "lemo_longest",
            f"LeMo: the longest sample whose step fits {options.limit:g} GiB, SmolLM2-135M with LoRA",
            f"float32, batch 1, in steps of 256 tokens; limit {options.limit:g} GiB on the tensors' peak as "
            "predicted, then measured at the length found",
        )
        for name in tqdm(LONGEST, desc="longest", unit="contender"):
            tokens = longest(CONTENDERS[name], options.limit * 2**30, options.layers)
            peak = step(CONTENDERS[name], tokens, options.layers)["peak_MB"] * 1e6 / 2**30
            table.add(name, tokens=float(tokens), measured_peak_GiB=peak)
        table.finish()


if __name__ == "__main__":
    main()
