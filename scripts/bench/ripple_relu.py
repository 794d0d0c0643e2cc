"""Five orders of a ReLU model's neurons under the same cache: reads, their length, bytes, cache hits.

    python scripts/train_relu_lm.py     # once, half an hour: the model "trained here"
    python scripts/bench/ripple_relu.py [--dram-budget 25%] [--tokens 256]

All orders come from one trace. Every contender is given the same held-out text token by token, reads what the
sketch cannot rule out, and has to give the stock model's logits. Nothing is timed: the counts depend on the
machine only in that reads are widened to the drive's sector. "merged" joins reads over gaps up to 16 KiB.
"""

import dataclasses
import statistics
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Table, parse, scratch
from models import language
from ripple_parts import Decoder, counts, reordered
from torch import Tensor

from ripple_loader import ReorderConfig, RippleConfig
from ripple_loader.checkpoint.source import open_source
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.online.budget import allocate

MODEL = ROOT / ".cache" / "relu-lm"
PLACEMENTS = ("identity", "random", "frequency", "spectral", "linked")
TRACED, WARM_UP, BUFFER, GAP = 8192, 64, "256KiB", "16KiB"
SEQUENCE = 256  # tokens, as in training


def decoded(model: Any, ids: Tensor) -> Tensor:
    """Logits of each token given those before it in its row, one call a token: (tokens, vocabulary)."""
    rows = ((Decoder(model), row) for row in ids)
    return torch.stack([decoder.read(token.view(1, 1)) for decoder, row in rows for token in row])


def stock_logits(ids: Tensor) -> tuple[Tensor, float]:
    """The stock model's logits, and the share of its neurons that are not zero."""
    model, active = language.load(MODEL), []
    for layer in model.model.decoder.layers:
        layer.fc2.register_forward_pre_hook(
            lambda _, args: active.append((args[0] != 0).float().mean().item())
        )
    return decoded(model, ids), statistics.mean(active)


def settings(directory: Path, dram_budget: str) -> dict[str, RippleConfig]:
    """What the orders are compared under; without cache the budget holds buffers and sketches only."""
    shared = {"buffer": BUFFER, "merge_gap": GAP, "strategy": "sparse", "prefetch": False}
    whole = RippleConfig(dram_budget="100%", **shared)
    held = allocate(Sidecar(directory).header, whole, torch.float32).resident
    least = sum(held[kind] for kind in ("buffers", "vectors", "sketch"))
    return {
        "no cache, not merged": RippleConfig(dram_budget=least, **shared | {"merge_gap": 0}),
        "no cache, merged": RippleConfig(dram_budget=least, **shared),
        "LRU, merged": RippleConfig(dram_budget=dram_budget, cache_policy="lru", **shared),
        "Ripple's cache, merged": RippleConfig(dram_budget=dram_budget, **shared),
    }


def row(copy: Path, config: RippleConfig, warm_up: Tensor, ids: Tensor, expected: Tensor) -> dict[str, float]:
    """The counts of one order under one setting, whose logits must be the stock model's."""
    model = language.load(copy, quantization_config=config)
    decoded(model, warm_up)
    report = model.ripple_report
    report.reset()
    error = ((decoded(model, ids) - expected).abs().max() / expected.abs().max()).item()
    assert error < 1e-5, f"{copy.name} differs from the stock model by {error:.1e}"
    return {
        "neurons": report.active / (report.tokens * report.layers),
        **counts(report),
        "KiB_a_read": report.bytes_read / report.requests / 2**10,
        "error": error,
    }


@torch.no_grad()
def main() -> None:
    options = parse(__doc__, dram_budget="25%", tokens=256, threads=1)
    text, source = language.tokens("held_out", folder=MODEL), open_source(MODEL)
    warm_up, ids = text[:WARM_UP][None], text[WARM_UP : WARM_UP + options.tokens]
    ids = ids.view(-1, min(options.tokens, SEQUENCE))
    expected, active = stock_logits(ids)
    bundle = 2 * source.hidden * 4
    table = Table(
        "ripple_relu",
        "Ripple: orders of a ReLU model trained here",
        f"{MODEL.name}, float32, {source.layers} MLPs of {source.neurons} neurons, {active:.1%} active; "
        f"bundles of {bundle} bytes, {source.neurons * bundle / 2**10:,.0f} KiB a layer if all are read; "
        f"DRAM budget {options.dram_budget} where there is a cache; {options.tokens} held-out tokens, one by "
        f"one, after {WARM_UP}; order from {TRACED} tokens; runs: of active neurons on traced tokens that "
        "did not shape the order, hot ones left out; all but runs and KiB a read: per token and layer",
    )
    with scratch() as folder:
        config = ReorderConfig(tokens=TRACED, sequence_length=SEQUENCE)
        orders = {each: dataclasses.replace(config, placement=each) for each in PLACEMENTS}
        plans = reordered(MODEL, folder, orders)
        for setting, ripple in settings(folder / "linked", options.dram_budget).items():
            for placement, plan in plans.items():
                found = row(folder / placement, ripple, warm_up, ids, expected)
                table.add(f"{setting}: {placement}", runs=plan.profile["reads"], **found)
    table.finish()


if __name__ == "__main__":
    main()
