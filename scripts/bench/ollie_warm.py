"""Cold and warm compile times of OLLIE's backend and of Inductor (docs/results/ollie_warm.csv).

    python scripts/bench/ollie_warm.py [--nets fsrcnn ...] [--rounds 3]

Every compilation is a process of its own, timed from torch.compile to the first result. A contender has a
folder for Inductor's caches and one for plans; cold is the first process, warm are those after it.
"""

import statistics
import tempfile
from functools import partial
from pathlib import Path

import torch
from common import Table, option, parse
from compilers import caches, first_call
from harness import Race, in_own_process, timed
from models.nets import NETS

PEERS = {  # whose times a contender's are divided by
    "inductor": "inductor",
    "inductor freezing": "inductor freezing",
    "ollie": "inductor",
    "ollie freeze": "inductor freezing",
}
BUDGET_S = 30.0  # of OLLIE's search and measurement


@torch.no_grad()
def seconds_to_first_result(name: str, contender: str) -> float:
    """From torch.compile on, in this process."""
    torch.set_num_threads(1)
    build, shape = NETS[name]
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(shape)
    net(x)
    return timed(partial(first_call, contender, net, x, BUDGET_S)).wall


def main() -> None:
    options = parse(
        __doc__,
        nets=option(["fsrcnn", "dcgan"], choices=NETS),
        rounds=option(3, "warm compilations, contenders in turn"),
    )
    config = f"fp32, 1 thread, no_grad, batch 1, warm: medians of {options.rounds} processes"
    table = Table("ollie_warm", "Seconds to the first result", f"{config}, budget {BUDGET_S:.0f} s")
    for net in options.nets:
        with tempfile.TemporaryDirectory() as base:
            calls = {}
            for name in PEERS:
                environment = caches(Path(base) / name.replace(" ", "_"))
                arguments = seconds_to_first_result, net, name
                calls[name] = partial(in_own_process, *arguments, environment=environment)
            # A new process is as untouched by the contender before as an untimed call leaves it.
            times = Race(calls, equal=None, keep=True).run(1 + options.rounds, untimed=0)
        cold = {name: each.results[0] for name, each in times.items()}
        warm = {name: statistics.median(each.results[1:]) for name, each in times.items()}
        for name, peer in PEERS.items():
            table.add(
                f"{net}: {name}",
                cold_s=cold[name],
                warm_s=warm[name],
                cold_over_inductor=cold[name] / cold[peer],
                warm_over_inductor=warm[name] / warm[peer],
            )
    table.finish()


if __name__ == "__main__":
    main()
