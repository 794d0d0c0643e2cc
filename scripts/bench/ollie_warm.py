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

NAMES = ("inductor", "inductor freezing", "ollie", "ollie freeze")


@torch.no_grad()
def seconds_to_first_result(name: str, contender: str, budget_s: float) -> float:
    """From torch.compile on, in this process."""
    torch.set_num_threads(1)
    build, shape = NETS[name]
    torch.manual_seed(0)
    net, x = build().eval(), torch.randn(shape)
    net(x)
    return timed(lambda: first_call(contender, net, x, budget_s)).wall


def main() -> None:
    options = parse(
        __doc__,
        nets=option(["fsrcnn", "dcgan"], choices=NETS),
        rounds=option(3, "warm compilations, contenders in turn"),
        budget_s=option(30.0, "OLLIE's search and measurement"),
    )
    config = f"fp32, 1 thread, no_grad, batch 1, warm: medians of {options.rounds} processes"
    table = Table("ollie_warm", "Seconds to the first result", f"{config}, budget {options.budget_s:.0f} s")
    for net in options.nets:
        with tempfile.TemporaryDirectory() as base:
            calls = {
                name: partial(
                    in_own_process,
                    seconds_to_first_result,
                    net,
                    name,
                    options.budget_s,
                    environment=caches(Path(base) / name.replace(" ", "_")),
                )
                for name in NAMES
            }
            cold = {name: call() for name, call in calls.items()}
            # A new process is as untouched by the contender before as an untimed call leaves it.
            race = Race(calls, equal=None, keep=True)
            race.run(options.rounds, untimed=0)
        warm = {name: statistics.median(times.results) for name, times in race.times.items()}
        for name in NAMES:
            peer = name.replace("ollie freeze", "inductor freezing").replace("ollie", "inductor")
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
