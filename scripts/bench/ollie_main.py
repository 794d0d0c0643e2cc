"""Networks: eager, Inductor, OpenVINO, TVM and OLLIE (docs/results/ollie_main.csv and ollie_pays.csv).

    pip install -e ".[peers]"     # OpenVINO and TVM; without them their rows are left out
    python scripts/assets.py --upscalers     # waifu2x and Real-ESRGAN; without them their rows are left out
    python scripts/bench/ollie_main.py [--nets paper pays fsrcnn ...] [--batch 1 16] [--rounds 30]

"paper" are the paper's seven networks, "pays" those where derivation pays, in a table of their own. Weights
are random but those of waifu2x and Real-ESRGAN: the nets' shapes decide their speed. Times are medians of
interleaved rounds on one thread; outputs must equal eager's before anything is timed. OpenVINO and TVM are
their runtimes on the converted net, for inference alone, TVM untuned: their backends of torch.compile do not
work with every version of torch. A row is left out where they cannot convert a net.
"""

import os

import torch
from common import Table, option, parse
from compilers import CONTENDERS, INSTALLED, compare
from models.nets import NETS
from models.small_nets import SMALL_NETS

TABLES = {
    "paper": ("ollie_main", "OLLIE's main job: milliseconds a batch", NETS),
    "pays": ("ollie_pays", "Where derivation pays: milliseconds", SMALL_NETS),
}


def main() -> None:
    options = parse(
        __doc__,
        batch=[1],
        rounds=30,
        budget_s=option(60.0, "search and measurement of OLLIE with options; `ollie` has none at all"),
        nets=option(["paper"], choices=[*TABLES, *NETS, *SMALL_NETS]),
        contenders=option(INSTALLED, choices=CONTENDERS),
        calls=option(5, "calls timed together"),
        threads=1,
    )
    os.environ["TVM_NUM_THREADS"] = "1"
    config = f"fp32, no_grad, medians of interleaved rounds, weights random but the upscalers'; {options}"
    for group, (file, title, nets) in TABLES.items():
        table = Table(file, title, config)
        chosen = [name for name in nets if {group, name} & set(options.nets)]
        for name, batch in ((name, batch) for name in chosen for batch in options.batch):
            build, (first, *shape) = nets[name]
            torch.manual_seed(0)
            try:
                net, x = build().eval(), torch.randn(batch * first, *shape)
            except FileNotFoundError as missing:
                print(f"{name} is left out: {missing}")
                continue
            rows = compare(net, x, options.contenders, options.rounds, options.calls, options.budget_s)
            for contender, row in rows.items():
                table.add(f"{name} batch {batch}: {contender}", **row)
        table.finish()


if __name__ == "__main__":
    main()
