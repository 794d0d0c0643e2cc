"""Networks where derivation pays, and merged weights, with freezing (docs/results/ollie_pays.csv).

    python scripts/assets.py --upscalers     # waifu2x and Real-ESRGAN; without them their rows are left out
    python scripts/bench/ollie_pays.py [--nets espcn ...] [--rounds 20]

Weights are random but those of waifu2x and Real-ESRGAN, one thread; outputs must equal eager's before
anything is timed.
"""

import torch
from common import Table, option, parse
from compilers import compare
from models.small_nets import SMALL_NETS

NAMES = ("inductor", "inductor freezing", "ollie freeze")


def main() -> None:
    options = parse(
        __doc__,
        nets=option(list(SMALL_NETS), choices=SMALL_NETS),
        rounds=20,
        budget_s=option(20.0, "OLLIE's search and measurement"),
        threads=1,
    )
    config = "fp32, no_grad, weights random but the upscalers', medians of interleaved rounds of 5"
    table = Table("ollie_pays", "Where derivation pays: milliseconds", f"{config}; {options}")
    for name, (build, shape) in ((name, SMALL_NETS[name]) for name in options.nets):
        torch.manual_seed(0)
        try:
            net, x = build().eval(), torch.randn(shape)
        except FileNotFoundError as missing:
            print(f"{name} is left out: {missing}")
            continue
        for contender, row in compare(net, x, NAMES, options.rounds, 5, options.budget_s).items():
            table.add(f"{name}: {contender}", **row)
    table.finish()


if __name__ == "__main__":
    main()
