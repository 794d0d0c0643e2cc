"""How compile time grows with layers: Inductor and OLLIE (docs/results/ollie_growth.csv).

    python scripts/bench/ollie_growth.py [--layers 10 20 40 80]

A chain of 3x3 convolutions with batch norms, all alike, and one whose convolutions all differ by a channel.
Every compilation is cold. The exponent is that of seconds by layers between a row and the one before it.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import torch
from common import Table
from ollie_zoo import BACKENDS, cold
from torch import nn


def chain(layers: int, alike: bool) -> nn.Module:
    """[1, 8, 16, 16] -> the same height and width."""
    parts: list[nn.Module] = []
    width = 8
    for place in range(layers):
        wide = 8 if alike else 9 + place
        parts += [nn.Conv2d(width, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide), nn.ReLU()]
        width = wide
    return nn.Sequential(*parts).eval()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, nargs="+", default=[10, 20, 40, 80])
    parser.add_argument("--kinds", nargs="+", choices=("alike", "different"), default=["alike", "different"])
    parser.add_argument("--budget-s", type=float, default=None, help="default: by the size of the graph")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    budget = "default budget" if arguments.budget_s is None else f"budget {arguments.budget_s:.0f} s"
    config = f"fp32, 1 thread, no_grad, chain of 3x3 convolutions with batch norms, {budget}, cold"
    table = Table("ollie_growth", "Compile time by number of layers", config)
    options = {} if arguments.budget_s is None else {"budget_s": arguments.budget_s}
    x = torch.randn(1, 8, 16, 16)
    with torch.no_grad(), cold():
        for backend in BACKENDS:  # what only the first compilation of a process pays
            torch.compile(nn.Conv2d(8, 1, 1), backend=backend)(x)
    for kind in arguments.kinds:
        before: dict[str, float] = {}
        for place, layers in enumerate(arguments.layers):
            row: dict[str, float | str] = {}
            for backend in BACKENDS:
                torch.compiler.reset()
                net = chain(layers, kind == "alike")
                with torch.no_grad(), cold():
                    how = options if backend == "ollie" else {}
                    start = time.perf_counter()
                    got = torch.compile(net, backend=backend, dynamic=False, options=how)(x)
                    seconds = time.perf_counter() - start
                    torch.testing.assert_close(got, net(x), rtol=1e-3, atol=1e-4)
                row[f"{backend}_compile_s"] = seconds
                if place:
                    more = layers / arguments.layers[place - 1]
                    row[f"{backend}_exponent"] = math.log(seconds / before[backend]) / math.log(more)
                before[backend] = seconds
            row["compile_ratio"] = float(row["ollie_compile_s"]) / float(row["inductor_compile_s"])
            table.add(f"{layers} layers, {kind}", **row)
    table.finish()


if __name__ == "__main__":
    main()
