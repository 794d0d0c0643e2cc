"""Cold and warm compile times of OLLIE's backend and of Inductor (docs/results/ollie_warm.csv).

    python scripts/bench/ollie_warm.py [--nets fsrcnn ...] [--rounds 3]

Every compilation is a process of its own, timed from torch.compile to the first result. A contender has a
folder for Inductor's caches and one for plans; cold is the first process, warm are those after it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import Table
from ollie_main import CONTENDERS, freezing
from ollie_nets import NETS

NAMES = ("inductor", "inductor freezing", "ollie", "ollie freeze")


def first_call(net: str, contender: str, budget_s: float) -> float:
    """Seconds from torch.compile to the first result, in this process."""
    import torch

    torch.set_num_threads(1)
    how = CONTENDERS[contender]
    if how["backend"] == "ollie":
        how["options"]["budget_s"] = budget_s
    build, shape = NETS[net]
    torch.manual_seed(0)
    model, x = build().eval(), torch.randn(1, *shape)
    with torch.no_grad():
        model(x)
        start = time.perf_counter()
        with freezing(contender):
            torch.compile(model, fullgraph=True, dynamic=False, **how)(x)
        return time.perf_counter() - start


def in_process(net: str, contender: str, folder: Path, budget_s: float) -> float:
    """`first_call` in a process of its own, with caches under `folder`."""
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "OLLIE_CACHE_DIR": str(folder / "ollie"),
    }
    command = [sys.executable, __file__, "--one", net, contender, "--budget-s", str(budget_s)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--nets", nargs="+", choices=NETS, default=["fsrcnn", "dcgan"])
    parser.add_argument("--rounds", type=int, default=3, help="warm compilations, contenders in turn")
    parser.add_argument("--budget-s", type=float, default=30.0, help="OLLIE's search and measurement")
    parser.add_argument("--one", nargs=2, metavar=("NET", "CONTENDER"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(first_call(*arguments.one, arguments.budget_s))
        return
    config = f"fp32, 1 thread, no_grad, batch 1, warm: medians of {arguments.rounds} processes"
    config += f", budget {arguments.budget_s:.0f} s"
    table = Table("ollie_warm", "Seconds to the first result", config)
    for net in arguments.nets:
        with tempfile.TemporaryDirectory() as base:
            folders = {name: Path(base) / name.replace(" ", "_") for name in NAMES}
            cold = {name: in_process(net, name, folders[name], arguments.budget_s) for name in NAMES}
            warm: dict[str, list[float]] = {name: [] for name in NAMES}
            for _ in range(arguments.rounds):
                for name in NAMES:
                    warm[name].append(in_process(net, name, folders[name], arguments.budget_s))
        median = {name: sorted(times)[len(times) // 2] for name, times in warm.items()}
        for name in NAMES:
            peer = name.replace("ollie freeze", "inductor freezing").replace("ollie", "inductor")
            table.add(
                f"{net}: {name}",
                cold_s=cold[name],
                warm_s=median[name],
                cold_over_inductor=cold[name] / cold[peer],
                warm_over_inductor=median[name] / median[peer],
            )
    table.finish()


if __name__ == "__main__":
    main()
