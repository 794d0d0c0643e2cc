"""What storing bundles in fewer bits saves on reading and costs in quality, with all neurons kept.

    python scripts/bench/ripple_bundles.py [--model DIR]

Perplexity is of the streamed model on held-out text; the weights beside the sidecar stay as they were.
"""

from pathlib import Path

from common import Table, assets, option, parse, scratch
from models import language
from ripple_parts import streamed

from ripple_loader import ReorderConfig, reorder
from ripple_loader.format.layout import SIDECAR
from ripple_loader.format.sidecar import Sidecar

BUNDLES = ("same", "float16", "bfloat16", "int8", "int4")
HELD_OUT = (2, 512)  # sequences, tokens
BUDGET = "96MiB"


def main() -> None:
    options = parse(__doc__, model=option(Path, "by default SmolLM2 from scripts/assets.py"), threads=1)
    directory = options.model or assets.model_dir()
    ids = language.tokens("held_out", *HELD_OUT, folder=directory)
    table = Table(
        "ripple_bundles",
        f"Ripple: bundles of {directory.name}",
        f"{directory.name}, DRAM budget {BUDGET}, all neurons kept, perplexity on {HELD_OUT[0]} x "
        f"{HELD_OUT[1]} held-out tokens; KiB: read for each layer and forward call",
    )
    for bundles in BUNDLES:
        with scratch() as folder:
            copy = folder / "copy"
            config = ReorderConfig(placement="identity", tokens=8, bundles=bundles)
            reorder(directory, copy, [ids[0, :8]], config)
            model = streamed(copy, dram_budget=BUDGET)
            perplexity, report = language.perplexity(model, ids), model.ripple_report
            table.add(
                bundles,
                sidecar_MiB=(copy / SIDECAR).stat().st_size / 2**20,
                KiB=report.bytes_read / HELD_OUT[0] / report.layers / 2**10,
                rounding_error=Sidecar(copy).header.profile.get("rounding_error", 0.0),
                perplexity=perplexity,
            )
            del model
    table.finish()


if __name__ == "__main__":
    main()
