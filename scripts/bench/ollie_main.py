"""The paper's seven networks: eager, Inductor, OpenVINO, TVM and OLLIE (docs/results/ollie_main.csv).

    pip install -e ".[peers]"     # OpenVINO and TVM; without them their rows are left out
    python scripts/bench/ollie_main.py [--nets fsrcnn ...] [--batch 1 16] [--rounds 30]

Weights are random: the nets' shapes decide their speed. Times are medians of interleaved rounds on one
thread; outputs must equal eager's before anything is timed. OpenVINO and TVM are their runtimes on the
converted net, for inference alone, TVM untuned: their backends of torch.compile do not work with every
version of torch. A row is left out where they cannot convert a net.
"""

import os

import torch
from common import Table, option, parse
from compilers import CONTENDERS, INSTALLED, compare
from models.nets import NETS


def main() -> None:
    options = parse(
        __doc__,
        batch=[1],
        rounds=30,
        budget_s=option(60.0, "OLLIE's search and measurement"),
        nets=option(list(NETS), choices=NETS),
        contenders=option(INSTALLED, choices=CONTENDERS),
        calls=option(5, "calls timed together"),
        threads=1,
    )
    os.environ["TVM_NUM_THREADS"] = "1"
    config = f"fp32, no_grad, random weights, medians of interleaved rounds; {options}"
    table = Table("ollie_main", "OLLIE's main job: milliseconds a batch", config)
    for name, batch in ((name, batch) for name in options.nets for batch in options.batch):
        build, shape = NETS[name]
        torch.manual_seed(0)
        net, x = build().eval(), torch.randn(batch, *shape)
        rows = compare(net, x, options.contenders, options.rounds, options.calls, options.budget_s)
        for contender, row in rows.items():
            table.add(f"{name} batch {batch}: {contender}", **row)
    table.finish()


if __name__ == "__main__":
    main()
