"""What growth costs: seconds to trace and to place, and milliseconds a token, at twice the neurons or layers.

    python scripts/bench/ripple_growth.py [--rounds 5]

OPT-architecture models with random weights, whose fc1 has a bias that leaves about a fourteenth of the
neurons active, in groups that belong together. Ripple streams them exactly, with a quarter of the MLPs in
memory, token by token, the sizes in turn.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from common import ROOT, Table  # also makes `assets` importable

from ripple_loader import ReorderConfig, RippleConfig, reorder
from ripple_loader.checkpoint.source import open_source
from ripple_loader.offline.calibration import cut_sequences
from ripple_loader.offline.trace import trace_source

SIZES = {"4 MLPs of 3,072": (4, 3072), "4 MLPs of 6,144": (4, 6144), "8 MLPs of 3,072": (8, 3072)}
HIDDEN, GROUP, BIAS = 384, 16, -1.5
TRACED, STEP_TOKENS = 2048, 16


def made_up(layers: int, neurons: int) -> Any:
    """A model of which neurons of a group have similar weights, at random places."""
    from transformers import OPTConfig, OPTForCausalLM

    torch.manual_seed(0)
    model = OPTForCausalLM(
        OPTConfig(
            vocab_size=1024,
            hidden_size=HIDDEN,
            word_embed_proj_dim=HIDDEN,
            ffn_dim=neurons,
            num_hidden_layers=layers,
            num_attention_heads=6,
            max_position_embeddings=512,
        )
    )
    for layer in model.model.decoder.layers:
        common = torch.randn(neurons // GROUP, HIDDEN).repeat_interleave(GROUP, 0)
        weight = (0.9 * common + 0.44 * torch.randn(neurons, HIDDEN)) * HIDDEN**-0.5
        layer.fc1.weight.data = weight[torch.randperm(neurons)]
        layer.fc1.bias.data.fill_(BIAS)
    return model.eval()


@torch.no_grad()
def main(rounds: int) -> None:
    from transformers import AutoModelForCausalLM

    text = torch.randint(1024, (TRACED,), generator=torch.Generator().manual_seed(1))
    table = Table(
        "ripple_growth",
        "Ripple: what twice the neurons or layers cost",
        f"OPT, random weights, hidden {HIDDEN}, float32; order from {TRACED} tokens; a quarter of the MLPs "
        f"in memory; {rounds} x {STEP_TOKENS} tokens; {torch.get_num_threads()} thread; reads, KiB: a token",
    )
    (ROOT / "out").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "out") as scratch:
        running: dict[str, Any] = {}
        for name, (layers, neurons) in SIZES.items():
            folder = Path(scratch) / f"{layers}x{neurons}"
            made_up(layers, neurons).save_pretrained(folder / "model")
            source, config = open_source(folder / "model"), ReorderConfig(tokens=TRACED, sequence_length=256)
            start = time.perf_counter()
            trace_source(source, cut_sequences(source, [text], config), config, folder / "trace")
            traced = time.perf_counter()
            plan = reorder(folder / "model", folder / "copy", config=config, trace=folder / "trace")
            table.add(
                name,
                trace_s=traced - start,
                reorder_s=time.perf_counter() - traced,
                active=float(plan.profile["activity"]),
            )
            options = RippleConfig(dram_budget="25%", strategy="sparse", buffer="1MiB")
            running[name] = AutoModelForCausalLM.from_pretrained(folder / "copy", quantization_config=options)
        caches: dict[str, Any] = dict.fromkeys(running)
        seconds: dict[str, list[float]] = {name: [] for name in running}
        for position in range((rounds + 1) * STEP_TOKENS):
            for name, model in running.items():
                if position == STEP_TOKENS:
                    model.ripple_report.reset()
                start = time.perf_counter()
                token = text[position].view(1, 1)
                caches[name] = model(token, past_key_values=caches[name], use_cache=True).past_key_values
                if position >= STEP_TOKENS:
                    seconds[name].append(time.perf_counter() - start)
        for name, model in running.items():
            report = model.ripple_report
            table.add(
                name,
                ms_a_token=1e3 * statistics.median(seconds[name]),
                reads=report.requests / report.tokens,
                KiB=report.bytes_read / report.tokens / 2**10,
            )
    table.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    main(arguments.rounds)
