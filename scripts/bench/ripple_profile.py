"""Where a token's time goes: SmolLM2 streamed with all, half and a quarter of its neurons, under cProfile.

    python scripts/bench/ripple_profile.py --copy DIR [--tokens 20] [--dram-budget 96MiB]

DIR is what `ripple reorder` made of SmolLM2. Time is that of the main thread, each function's own, summed by
what it is for; "waiting for reads" is what reading takes beyond what it overlaps. cProfile adds some time
to every Python call, so that what is done in Python is less than it says.
"""

import cProfile
import pstats
from pathlib import Path

import torch
from common import Table, parse
from ripple_parts import streamed

KINDS = {  # by parts of a function's file and name, the first that fits
    "waiting for reads": ("'acquire' of '_thread.lock'",),
    "products": ("torch._C._nn.linear", "matmul", "torch._C.TensorBase.mm", "mm}", "silu"),
    "copies": ("index_select", "copy_", "_store", "numpy.ndarray.copy"),
    "planning, in numpy": ("ripple_loader/storage/", "numpy"),
    "cache": ("ripple_loader/online/cache/",),
    "engine, in Python": ("ripple_loader/online/", "ripple_loader/model/", "ripple_loader/format/"),
}
SETTINGS = {"100%": {}, "50% selected": {"keep": 0.5}, "25% selected": {"keep": 0.25}}


def kind_of(function: tuple[str, int, str]) -> str:
    name = f"{function[0]}:{function[2]}"
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "the rest")


@torch.no_grad()
def main() -> None:
    options = parse(__doc__, copy=Path, tokens=20, dram_budget="96MiB", threads=1)
    if options.copy is None:
        raise SystemExit("ripple_profile: --copy must name a folder that `ripple reorder` made.")
    table = Table(
        "ripple_profile",
        "Ripple: milliseconds of the main thread a token",
        f"SmolLM2-135M-Instruct, float32, DRAM budget {options.dram_budget}, batch 1, {options.tokens} "
        "tokens after 32, 1 thread, cProfile",
    )
    ids, length = torch.arange(100, 132)[None], options.tokens
    counted = {"do_sample": False, "min_new_tokens": length, "max_new_tokens": length}
    for name, setting in SETTINGS.items():
        strategy = {"strategy": "sparse"} if setting else {}
        model = streamed(options.copy, dram_budget=options.dram_budget, **setting, **strategy)
        model.generate(ids, **counted)
        profile = cProfile.Profile()
        profile.runcall(model.generate, ids, **counted)
        row = dict.fromkeys([*KINDS, "the rest"], 0.0)
        for function, (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
            row[kind_of(function)] += 1e3 * own / length
        table.add(name, **row)
    table.finish()


if __name__ == "__main__":
    main()
