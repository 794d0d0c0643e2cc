"""Where a token's time goes: SmolLM2 streamed with all, half and a quarter of its neurons, under cProfile.

    python scripts/bench/ripple_profile.py --copy DIR [--tokens 20] [--dram-budget 96MiB]

DIR is what `ripple reorder` made of SmolLM2. Time is that of the main thread, each function's own, summed by
what it is for; "waiting for reads" is what reading takes beyond what it overlaps. cProfile adds some time
to every Python call, so that what is done in Python is less than it says.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
from pathlib import Path
from typing import Any

import torch
from common import Table

from ripple_loader import RippleConfig

KINDS = {
    "waiting for reads": ("'acquire' of '_thread.lock'",),
    "products": ("torch._C._nn.linear", "matmul", "torch._C.TensorBase.mm", "mm}", "silu"),
    "copies": ("index_select", "copy_", "_store", "numpy.ndarray.copy"),
    "planning, in numpy": ("access.py", "drive.py", "reader.py", "numpy"),
    "cache": ("cache.py",),
    "engine, in Python": ("engine.py", "fetching.py", "streaming.py", "bundles.py", "selection.py"),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "100%": {},
    "50% selected": {"keep": 0.5, "strategy": "sparse"},
    "25% selected": {"keep": 0.25, "strategy": "sparse"},
}


def kind_of(function: tuple[str, int, str]) -> str:
    name = f"{function[0]}:{function[2]}"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "the rest")


@torch.no_grad()
def main(copy: Path, tokens: int, dram_budget: str) -> None:
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    table = Table(
        "ripple_profile",
        "Ripple: milliseconds of the main thread a token",
        f"SmolLM2-135M-Instruct, float32, DRAM budget {dram_budget}, batch 1, {tokens} tokens after 32, "
        "1 thread, cProfile",
    )
    for name, options in SETTINGS.items():
        config = RippleConfig(dram_budget=dram_budget, **options)
        model = AutoModelForCausalLM.from_pretrained(copy, quantization_config=config)
        ids = torch.arange(100, 132)[None]
        options = {"do_sample": False, "min_new_tokens": tokens}
        model.generate(ids, max_new_tokens=tokens, **options)
        profile = cProfile.Profile()
        profile.runcall(model.generate, ids, max_new_tokens=tokens, **options)
        row = dict.fromkeys([*KINDS, "the rest"], 0.0)
        for function, (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
            row[kind_of(function)] += 1e3 * own / tokens
        table.add(name, **row)
    table.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--copy", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--dram-budget", default="96MiB")
    arguments = parser.parse_args()
    main(arguments.copy, arguments.tokens, arguments.dram_budget)
