"""Networks where derivation pays, and merged weights, with freezing (docs/results/ollie_pays.csv).

    python scripts/assets.py --upscalers     # waifu2x and Real-ESRGAN; without them their rows are left out
    python scripts/bench/ollie_pays.py [--nets espcn ...] [--rounds 20]

Weights are random but those of waifu2x and Real-ESRGAN, one thread; outputs must equal eager's before
anything is timed.
"""

from __future__ import annotations

import argparse

import torch
from common import Table
from ollie_main import compare
from ollie_small_nets import SMALL_NETS

NAMES = ("inductor", "inductor freezing", "ollie freeze")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=SMALL_NETS, default=list(SMALL_NETS))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--budget-s", type=float, default=20.0, help="OLLIE's search and measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = "fp32, 1 thread, no_grad, weights random but the upscalers', "
    config += f"medians of {arguments.rounds} interleaved rounds of 5, budget {arguments.budget_s:.0f} s"
    table = Table("ollie_pays", "Where derivation pays: milliseconds", config)
    for net, (build, shape) in ((net, SMALL_NETS[net]) for net in arguments.nets):
        torch.manual_seed(0)
        try:
            model, x = build().eval(), torch.randn(shape)
        except FileNotFoundError as missing:
            print(f"{net} is left out: {missing}")
            continue
        for name, row in compare(model, x, NAMES, arguments.rounds, 5, arguments.budget_s).items():
            table.add(f"{net}: {name}", **row)
    table.finish()


if __name__ == "__main__":
    main()
