"""FSRCNN and a DCGAN generator: eager, Inductor, Inductor with freezing, OLLIE (docs/results/ollie_main.csv).

    python scripts/bench/ollie_main.py [--batch 1 16] [--rounds 30]

Weights are random: the nets' shapes decide their speed. Times are medians of interleaved rounds on one
thread; outputs must equal eager's before anything is timed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from common import Table
from ollie_nets import dcgan, fsrcnn


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` samples each, all in turn."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(3):
            call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(5):
                call()
            samples[name].append((time.perf_counter() - start) / 5)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget-s", type=float, default=60.0, help="OLLIE's search and measurement")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = f"fp32, 1 thread, no_grad, random weights, medians of {arguments.rounds} interleaved rounds of 5"
    config += f", budget {arguments.budget_s:.0f} s"
    table = Table("ollie_main", "OLLIE's main job: milliseconds a batch", config)
    backends = {
        "inductor": {"backend": "inductor"},
        "inductor freezing": {"backend": "inductor", "options": {"freezing": True}},
        "ollie": {"backend": "ollie", "options": {"budget_s": arguments.budget_s}},
        "ollie freeze": {"backend": "ollie", "options": {"budget_s": arguments.budget_s, "freeze": True}},
    }
    for build, shape in ((fsrcnn, (1, 32, 32)), (dcgan, (100, 1, 1))):
        for batch in arguments.batch:
            torch.manual_seed(0)
            net = build()
            x = torch.randn(batch, *shape)
            calls: dict[str, Callable[[], object]] = {}
            compile_s = {"eager": 0.0}
            error = {"eager": 0.0}
            with torch.no_grad():
                net.eval()
                want = net(x)
                calls["eager"] = lambda net=net, x=x: net(x)
                for name, how in backends.items():
                    torch.compiler.reset()
                    start = time.perf_counter()
                    compiled = torch.compile(net, fullgraph=True, dynamic=False, **how)
                    got = compiled(x)
                    compile_s[name] = time.perf_counter() - start
                    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
                    error[name] = ((got - want).abs().max() / want.abs().max()).item()
                    calls[name] = lambda compiled=compiled, x=x: compiled(x)
                samples = interleaved(calls, arguments.rounds)
            median = {name: sorted(times)[len(times) // 2] for name, times in samples.items()}
            best = min(median[name] for name in ("eager", "inductor", "inductor freezing"))
            for name, times in samples.items():
                table.add(
                    f"{build.__name__} batch {batch}: {name}",
                    median_ms=median[name] * 1e3,
                    p10_ms=sorted(times)[len(times) // 10] * 1e3,
                    p90_ms=sorted(times)[len(times) * 9 // 10] * 1e3,
                    speedup_over_best_peer=best / median[name],
                    largest_relative_error=error[name],
                    compile_s=compile_s[name],
                )
    table.finish()


if __name__ == "__main__":
    main()
