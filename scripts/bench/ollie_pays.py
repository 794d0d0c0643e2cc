"""Networks where derivation pays, and merged weights, with freezing (docs/results/ollie_pays.csv).

    python scripts/bench/ollie_pays.py [--nets espcn ...] [--rounds 20]

Weights are random, one thread; outputs must equal eager's before anything is timed.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from common import Table
from ollie_main import CONTENDERS, freezing, interleaved
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
    config = f"fp32, 1 thread, no_grad, random weights, medians of {arguments.rounds} interleaved rounds of 5"
    config += f", budget {arguments.budget_s:.0f} s"
    table = Table("ollie_pays", "Where derivation pays: milliseconds", config)
    for net, (build, shape) in ((net, SMALL_NETS[net]) for net in arguments.nets):
        torch.manual_seed(0)
        model, x = build().eval(), torch.randn(shape)
        with torch.no_grad():
            want = model(x)
            calls: dict[str, Callable[[], object]] = {"eager": lambda model=model, x=x: model(x)}
            compile_s = {"eager": 0.0}
            for name in NAMES:
                how = copy.deepcopy(CONTENDERS[name])
                if how["backend"] == "ollie":
                    how["options"]["budget_s"] = arguments.budget_s
                torch.compiler.reset()
                start = time.perf_counter()
                compiled = torch.compile(model, fullgraph=True, dynamic=False, **how)
                with freezing(name):
                    torch.testing.assert_close(compiled(x), want, rtol=1e-3, atol=1e-4)
                compile_s[name] = time.perf_counter() - start
                calls[name] = lambda compiled=compiled, x=x: compiled(x)
            samples = interleaved(calls, arguments.rounds)
        median = {name: sorted(times)[len(times) // 2] for name, times in samples.items()}
        best = min(seconds for name, seconds in median.items() if not name.startswith("ollie"))
        for name, times in samples.items():
            table.add(
                f"{net}: {name}",
                median_ms=median[name] * 1e3,
                p10_ms=sorted(times)[len(times) // 10] * 1e3,
                p90_ms=sorted(times)[len(times) * 9 // 10] * 1e3,
                speedup_over_best_peer=best / median[name],
                compile_s=compile_s[name],
            )
    table.finish()


if __name__ == "__main__":
    main()
