"""What storing bundles in fewer bits saves on reading and costs in quality, with all neurons kept.

    python scripts/bench/ripple_bundles.py [--model DIR]

Perplexity is of the streamed model on held-out text; the weights beside the sidecar stay as they were.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from pathlib import Path

import torch
from common import ROOT, Table  # also makes `assets` importable

from ripple_loader import ReorderConfig, RippleConfig, reorder
from ripple_loader.format.layout import SIDECAR
from ripple_loader.format.sidecar import Sidecar

BUNDLES = ("same", "float16", "bfloat16", "int8", "int4")
HELD_OUT = (2, 512)  # sequences, tokens
BUDGET = "96MiB"


@torch.no_grad()
def main(directory: Path) -> None:
    import assets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    count, length = HELD_OUT
    held_out = torch.cat([tokenizer(t, return_tensors="pt").input_ids[0] for t in assets.texts("held_out")])
    ids = held_out[: count * length].view(count, length)

    table = Table(
        name="ripple_bundles",
        title=f"Ripple: bundles of {directory.name}",
        config=f"{directory.name}, DRAM budget {BUDGET}, all neurons kept, perplexity on {count} x {length} "
        "held-out tokens; KiB: read for each layer and forward call",
    )
    (ROOT / "out").mkdir(exist_ok=True)
    for bundles in BUNDLES:
        with tempfile.TemporaryDirectory(dir=ROOT / "out") as scratch:
            copy, config = (
                Path(scratch) / "copy",
                ReorderConfig(placement="identity", tokens=8, bundles=bundles),
            )
            reorder(directory, copy, [held_out[:8]], config)
            model = AutoModelForCausalLM.from_pretrained(
                copy, quantization_config=RippleConfig(dram_budget=BUDGET)
            )
            losses = [model(row[None], labels=row[None]).loss.item() for row in ids]
            report = model.ripple_report
            table.add(
                bundles,
                sidecar_MiB=(copy / SIDECAR).stat().st_size / 2**20,
                KiB=report.bytes_read / count / report.layers / 2**10,
                rounding_error=Sidecar(copy).header.profile.get("rounding_error", 0.0),
                perplexity=math.exp(statistics.mean(losses)),
            )
            del model
    table.finish()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="by default SmolLM2 from scripts/assets.py")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.model is None:
        import assets

        arguments.model = assets.model_dir()
    main(arguments.model)
