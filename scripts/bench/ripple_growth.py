"""What growth costs: seconds to trace and to place, and milliseconds a token, at twice the neurons or layers.

    python scripts/bench/ripple_growth.py [--rounds 5]

OPT-architecture models with random weights, whose fc1 has a bias that leaves about a fourteenth of the
neurons active, in groups that belong together. Ripple streams them exactly, with a quarter of the MLPs in
memory, token by token, the sizes in turn.
"""

from functools import partial
from typing import Any

import torch
from common import Table, parse, scratch
from harness import Race, timed
from models import language
from ripple_parts import Decoder, counts, streamed, trace_of

from ripple_loader import ReorderConfig, reorder

SIZES = {"4 MLPs of 3,072": (4, 3072), "4 MLPs of 6,144": (4, 6144), "8 MLPs of 3,072": (8, 3072)}
HIDDEN, GROUP, BIAS = 384, 16, -1.5
TRACED, STEP_TOKENS = 2048, 16


@torch.no_grad()
def main() -> None:
    options = parse(__doc__, rounds=5, threads=1)
    text = torch.randint(1024, (TRACED,), generator=torch.Generator().manual_seed(1))
    table = Table(
        "ripple_growth",
        "Ripple: what twice the neurons or layers cost",
        f"OPT, random weights, hidden {HIDDEN}, float32; order from {TRACED} tokens; a quarter of the MLPs "
        f"in memory; {options.rounds} x {STEP_TOKENS} tokens; {options.threads} thread; reads, KiB: a token",
    )
    config = ReorderConfig(tokens=TRACED, sequence_length=256)
    with scratch() as base:
        decoders: dict[str, Any] = {}
        for name, (layers, neurons) in SIZES.items():
            folder = base / f"{layers}x{neurons}"
            language.opt(layers, neurons, HIDDEN, GROUP, BIAS).save_pretrained(folder / "model")
            model, copy, trace = (folder / part for part in ("model", "copy", "trace"))
            traced = timed(partial(trace_of, model, config, trace, [text]))
            placed = timed(partial(reorder, model, copy, config=config, trace=trace))
            active = float(placed.result.profile["activity"])
            table.add(name, trace_s=traced.wall, reorder_s=placed.wall, active=active)
            streaming = streamed(copy, dram_budget="25%", strategy="sparse", buffer="1MiB")
            decoders[name] = Decoder(streaming, text.tolist())
        race = Race(decoders, equal=None)  # models of different sizes
        for decoder in decoders.values():
            for _ in range(STEP_TOKENS):
                decoder()
            decoder.model.ripple_report.reset()
        for name, times in race.run(options.rounds * STEP_TOKENS).items():
            report = decoders[name].model.ripple_report
            reads = {key: counts(report)[key] * report.layers for key in ("reads", "KiB")}
            table.add(name, **times.columns("ms", median="ms_a_token"), **reads)
    table.finish()


if __name__ == "__main__":
    main()
