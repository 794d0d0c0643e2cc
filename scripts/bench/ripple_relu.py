"""Five orders of a ReLU model's neurons under the same cache: reads, their length, bytes, cache hits.

    python scripts/train_relu_lm.py     # once, half an hour: the model "trained here"
    python scripts/bench/ripple_relu.py [--dram-budget 25%] [--tokens 256]

All orders come from one trace. Every contender is given the same held-out text token by token, reads what the
sketch cannot rule out, and has to give the stock model's logits. Nothing is timed: the counts depend on the
machine only in that reads are widened to the drive's sector. "merged" joins reads over gaps up to 16 KiB.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Table  # also makes `assets` importable
from torch import Tensor

from ripple_loader import ReorderConfig, RippleConfig, reorder
from ripple_loader.checkpoint.source import open_source
from ripple_loader.format.sidecar import Sidecar
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import trace_source
from ripple_loader.online.budget import allocate

MODEL = ROOT / ".cache" / "relu-lm"
PLACEMENTS = ("identity", "random", "frequency", "spectral", "linked")
TRACED, WARM_UP, BUFFER, GAP = 8192, 64, "256KiB", "16KiB"
SEQUENCE = 256  # tokens, as in training


def decoded(model: Any, ids: Tensor) -> Tensor:
    """Logits of each token given those before it in its row, one call a token: (tokens, vocabulary)."""
    found = []
    for row in ids:
        cache = None
        for token in row:
            output = model(token.view(1, 1), past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            found.append(output.logits[0, -1])
    return torch.stack(found)


def stock_logits(ids: Tensor) -> tuple[Tensor, float]:
    """The stock model's logits, and the share of its neurons that are not zero."""
    from transformers import AutoModelForCausalLM

    model, active = AutoModelForCausalLM.from_pretrained(MODEL), []
    for layer in model.model.decoder.layers:
        layer.fc2.register_forward_pre_hook(
            lambda _, args: active.append((args[0] != 0).float().mean().item())
        )
    return decoded(model, ids), statistics.mean(active)


def settings(directory: Path, dram_budget: str) -> dict[str, RippleConfig]:
    """What the orders are compared under; without cache the budget holds buffers and sketches only."""
    with_cache = RippleConfig(
        dram_budget=dram_budget, buffer=BUFFER, merge_gap=GAP, strategy="sparse", prefetch=False
    )
    whole = dataclasses.replace(with_cache, dram_budget="100%")
    held = allocate(Sidecar(directory).header, whole, torch.float32).resident
    without = dataclasses.replace(
        whole, dram_budget=sum(held[kind] for kind in ("buffers", "vectors", "sketch"))
    )
    return {
        "no cache, not merged": dataclasses.replace(without, merge_gap=0),
        "no cache, merged": without,
        "LRU, merged": dataclasses.replace(with_cache, cache_policy="lru"),
        "Ripple's cache, merged": with_cache,
    }


@torch.no_grad()
def main(dram_budget: str, tokens: int) -> None:
    import assets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    text = torch.cat([tokenizer(t, return_tensors="pt").input_ids[0] for t in assets.texts("held_out")])
    warm_up, ids = text[:WARM_UP][None], text[WARM_UP : WARM_UP + tokens].view(-1, min(tokens, SEQUENCE))
    expected, active = stock_logits(ids)

    source, config = open_source(MODEL), ReorderConfig(tokens=TRACED, sequence_length=SEQUENCE)
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as scratch:
        trace = Path(scratch) / "trace"
        trace_source(source, cut_sequences(source, assets.texts("train"), config), config, trace)
        rows: dict[str, dict[str, dict[str, float | str]]] = {}
        for placement in PLACEMENTS:
            copy = Path(scratch) / placement
            plan = reorder(MODEL, copy, config=dataclasses.replace(config, placement=placement), trace=trace)
            for setting, options in settings(copy, dram_budget).items():
                model = AutoModelForCausalLM.from_pretrained(copy, quantization_config=options)
                decoded(model, warm_up)
                report = model.ripple_report
                report.reset()
                error = ((decoded(model, ids) - expected).abs().max() / expected.abs().max()).item()
                assert error < 1e-5, f"{placement} differs from the stock model by {error:.1e}"
                calls = report.tokens * report.layers
                rows.setdefault(setting, {})[placement] = {
                    "runs": plan.profile["reads"],
                    "neurons": report.active / calls,
                    "hits": report.hits / report.active,
                    "reads": report.requests / calls,
                    "KiB_a_read": report.bytes_read / report.requests / 2**10,
                    "KiB": report.bytes_read / calls / 2**10,
                    "error": error,
                }
    bundle = 2 * source.hidden * 4
    conditions = (
        f"{MODEL.name}, float32, {source.layers} MLPs of {source.neurons} neurons, {active:.1%} active",
        f"bundles of {bundle} bytes, {source.neurons * bundle / 2**10:,.0f} KiB a layer if all are read",
        f"DRAM budget {dram_budget} where there is a cache",
        f"{tokens} held-out tokens, one by one, after {WARM_UP}",
        f"order from {TRACED} tokens",
        "runs: of active neurons on traced tokens that did not shape the order, hot ones left out",
        "all but runs and KiB a read: per token and layer; error: of the logits, relative",
    )
    table = Table("ripple_relu", "Ripple: orders of a ReLU model trained here", "; ".join(conditions))
    for setting, by_placement in rows.items():
        for placement, row in by_placement.items():
            table.add(f"{setting}: {placement}", **row)
    table.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dram-budget", default="25%")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.dram_budget, arguments.tokens)
