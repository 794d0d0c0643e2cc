"""What storing bundles in fewer bits saves and costs, with all neurons kept: quality, reads, CPU time.

    python scripts/bench/ripple_bundles.py [--model DIR]
    python scripts/bench/ripple_bundles.py --table decode [--rounds 5] [--tokens 8]

- bundles: perplexity of the streamed model on held-out text; the weights beside the sidecar stay as they are.
- decode: what a token costs the processor when nothing is read, beside the stock model: random models in
  bfloat16 whose neurons are all cached. Attention, embeddings and head are bfloat16 in all rows. Each call
  generates `--tokens` tokens, one at a time, after a prompt of one.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import Table, assets, option, parse, scratch
from harness import Race
from models import language
from ripple_parts import streamed
from transformers import LlamaConfig, Qwen2Config

from ripple_loader import ReorderConfig, reorder
from ripple_loader.format.layout import SIDECAR
from ripple_loader.format.sidecar import Sidecar

HELD_OUT = (2, 512)  # sequences, tokens
BUDGET = "96MiB"
SHAPES = {  # class of the config, and `language.SIZES`
    "Qwen2.5-0.5B": (Qwen2Config, 896, 4864, 24, 14, 2),
    "Llama, 1536 wide, 8 layers": (LlamaConfig, 1536, 4096, 8, 12, 4),
}


def copied(directory: Path, copy: Path, bundles: str, **options: Any) -> Any:
    """The model streamed from a copy with such bundles, in the model's own order."""
    reorder(directory, copy, [list(range(8))], ReorderConfig(placement="identity", tokens=8, bundles=bundles))
    return streamed(copy, **options)


def quality(options: Any) -> Table:
    directory = options.model or assets.model_dir()
    ids = language.tokens("held_out", *HELD_OUT, folder=directory)
    table = Table(
        "ripple_bundles",
        f"Ripple: bundles of {directory.name}",
        f"{directory.name}, DRAM budget {BUDGET}, all neurons kept, perplexity on {HELD_OUT[0]} x "
        f"{HELD_OUT[1]} held-out tokens; KiB: read for each layer and forward call",
    )
    for bundles in ("same", "float16", "bfloat16", "int8", "int4"):
        with scratch() as folder:
            model = copied(directory, folder / "copy", bundles, dram_budget=BUDGET)
            perplexity, report = language.perplexity(model, ids), model.ripple_report
            table.add(
                bundles,
                sidecar_MiB=(folder / "copy" / SIDECAR).stat().st_size / 2**20,
                KiB=report.bytes_read / HELD_OUT[0] / report.layers / 2**10,
                rounding_error=Sidecar(folder / "copy").header.profile.get("rounding_error", 0.0),
                perplexity=perplexity,
            )
            del model
    return table


@torch.no_grad()
def generated(model: Any, tokens: int) -> int:
    """Generate greedily; returns how many tokens."""
    options = {"do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(torch.ones(1, 1, dtype=torch.long), max_new_tokens=tokens, **options).shape[1]


def decode(options: Any) -> Table:
    table = Table(
        "ripple_decode",
        "Ripple: the processor's time for a token when nothing is read",
        f"random bfloat16 models, all neurons cached, {options}; median of the rounds, contenders in turn; "
        "ratio: CPU time of the calling thread to the stock model's in this run",
    )
    for shape, sizes in SHAPES.items():
        with scratch() as folder:
            tied = {"tie_word_embeddings": shape.startswith("Qwen")}
            models = {"stock": language.random(*sizes, max_position_embeddings=512, **tied)}
            models["stock"].save_pretrained(folder / "model")
            for name, bundles in {"bfloat16": "same", "int8": "int8", "int4": "int4"}.items():
                copy = folder / bundles
                models[f"Ripple, {name}"] = copied(folder / "model", copy, bundles, dram_budget="4GiB")
            calls = {name: partial(generated, model, options.tokens) for name, model in models.items()}
            times = Race(calls, equal=None).run(options.rounds)
            rows = {name: times[name].columns("ms", parts=options.tokens) for name in calls}
            for name, row in rows.items():
                table.add(f"{shape}: {name}", **row, ratio=row["cpu_ms"] / rows["stock"]["cpu_ms"])
    return table


TABLES = {"bundles": quality, "decode": decode}


def main() -> None:
    options = parse(
        __doc__,
        table=option("bundles", choices=TABLES),
        model=option(Path, "of bundles; by default SmolLM2 from scripts/assets.py"),
        rounds=5,
        tokens=8,
        threads=1,
    )
    TABLES[options.table](options).finish()


if __name__ == "__main__":
    main()
