"""How compile time grows with layers: Inductor and OLLIE (docs/results/ollie_growth.csv).

    python scripts/bench/ollie_growth.py [--layers 10 20 40 80]

A chain of 3x3 convolutions with batch norms, all alike, and one whose convolutions all differ by a channel.
Every compilation is cold. The exponent is that of seconds by layers between a row and the one before it.
"""

import itertools
import math
import warnings

import torch
from common import Table, option, parse
from compilers import BACKENDS, cold, equal, warm_up
from harness import require_equal, timed
from torch import Tensor, nn


def chain(layers: int, alike: bool) -> nn.Module:
    """[1, 8, 16, 16] -> the same height and width."""
    parts: list[nn.Module] = []
    widths = [8, *(8 if alike else 9 + number for number in range(layers))]
    for before, after in itertools.pairwise(widths):
        parts += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts).eval()


@torch.no_grad()
def compile_seconds(net: nn.Module, x: Tensor, backend: str, options: dict[str, float]) -> float:
    torch.compiler.reset()
    with cold():
        took = timed(lambda: torch.compile(net, backend=backend, dynamic=False, options=options)(x))
        require_equal([(backend, took.result)], equal, net(x))
    return took.wall


def main() -> None:
    options = parse(
        __doc__,
        layers=[10, 20, 40, 80],
        kinds=option(["alike", "different"], choices=("alike", "different")),
        budget_s=option(float, "default: by the size of the graph"),
        threads=1,
    )
    warnings.simplefilter("ignore")
    budget = "" if options.budget_s else ", default budget"
    config = f"fp32, no_grad, chain of 3x3 convolutions with batch norms, cold; {options}{budget}"
    table = Table("ollie_growth", "Compile time by number of layers", config)
    limits = {"ollie": {"budget_s": options.budget_s}, "inductor": {}}
    x = torch.randn(1, 8, 16, 16)
    warm_up()
    for kind in options.kinds:
        before: dict[str, tuple[int, float]] = {}
        for layers in options.layers:
            row: dict[str, float] = {}
            for backend in BACKENDS:
                seconds = compile_seconds(chain(layers, kind == "alike"), x, backend, limits[backend])
                row[f"{backend}_compile_s"] = seconds
                if backend in before:
                    fewer, less = before[backend]
                    row[f"{backend}_exponent"] = math.log(seconds / less) / math.log(layers / fewer)
                before[backend] = layers, seconds
            row["compile_ratio"] = row["ollie_compile_s"] / row["inductor_compile_s"]
            table.add(f"{layers} layers, {kind}", **row)
    table.finish()


if __name__ == "__main__":
    main()
