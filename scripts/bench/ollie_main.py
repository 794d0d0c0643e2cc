"""The paper's seven networks: eager, Inductor, OpenVINO, TVM and OLLIE (docs/results/ollie_main.csv).

    pip install -e ".[peers]"     # OpenVINO and TVM; without them their rows are left out
    python scripts/bench/ollie_main.py [--nets fsrcnn ...] [--batch 1 16] [--rounds 30]

Weights are random: the nets' shapes decide their speed. Times are medians of interleaved rounds on one
thread; outputs must equal eager's before anything is timed. OpenVINO and TVM are their runtimes on the
converted net, for inference alone, TVM untuned: their backends of torch.compile do not work with every
version of torch. A row is left out where they cannot convert a net.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from common import Table
from ollie_nets import NETS

CONTENDERS: dict[str, dict[str, Any]] = {
    "inductor": {"backend": "inductor"},
    "inductor freezing": {"backend": "inductor", "options": {"freezing": True}},
    "inductor max-autotune freezing": {
        "backend": "inductor",
        "options": {"max_autotune": True, "freezing": True},
    },
    "openvino": {"backend": "openvino"},
    "tvm": {"backend": "tvm"},
    "ollie": {"backend": "ollie", "options": {}},
    "ollie freeze": {"backend": "ollie", "options": {"freeze": True}},
    "ollie max-autotune freeze": {"backend": "ollie", "options": {"freeze": True, "max_autotune": True}},
}


def freezing(name: str) -> Any:
    """Inductor's freezing for a contender of that name. As an option of torch.compile it comes too late, for
    Dynamo has made the parameters inputs by then; without the option, Dynamo takes a net that is compiled by
    Inductor's default for the same."""
    from torch._inductor import config

    return config.patch(freezing=name.startswith("inductor") and name.endswith("freezing"))


def openvino(net: torch.nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """OpenVINO's runtime on the converted net: one thread, float32, tensors shared."""
    import openvino as library

    hints = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    model = library.convert_model(net, example_input=x, input=[tuple(x.shape)])
    request = library.Core().compile_model(model, "CPU", hints).create_infer_request()

    def run(x: torch.Tensor) -> torch.Tensor:
        found = request.infer([x.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0])

    return run


def tvm(net: torch.nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """TVM's runtime on the exported net: one thread, untuned; naming the CPU as target makes it slower."""
    import tvm as library
    from tvm import relax
    from tvm.relax.frontend.torch import from_exported_program

    module = from_exported_program(torch.export.export(net, (x,)))
    machine = relax.VirtualMachine(library.compile(module, target="llvm"), library.cpu())

    def run(x: torch.Tensor) -> torch.Tensor:
        return torch.from_dlpack(machine["main"](library.runtime.from_dlpack(x))[0])

    return run


RUNTIMES = {"openvino": openvino, "tvm": tvm}  # by what has to be installed


def interleaved(
    calls: dict[str, Callable[[], object]], rounds: int, count: int = 5
) -> dict[str, list[float]]:
    """Seconds of each call, `rounds` samples each, all in each round in an order of its own.

    Before each sample the call is made once, for it finds the caches, and perhaps threads that are still
    busy, as the contender before it left them.
    """
    turns = random.Random(0)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        for _ in range(min(3, count)):
            call()
    for _ in range(rounds):
        for name, call in turns.sample(list(calls.items()), len(calls)):
            call()
            start = time.perf_counter()
            for _ in range(count):
                call()
            samples[name].append((time.perf_counter() - start) / count)
    return samples


def compare(
    net: torch.nn.Module, x: torch.Tensor, contenders: Sequence[str], rounds: int, calls: int, budget_s: float
) -> dict[str, dict[str, float]]:
    """The columns of eager and of each contender for one net, which must equal eager; one thread, no_grad."""
    running: dict[str, Callable[[], object]] = {"eager": lambda: net(x)}
    compile_s, error = {"eager": 0.0}, {"eager": 0.0}
    with torch.no_grad():
        want = net(x)
        for name in contenders:
            how = copy.deepcopy(CONTENDERS[name])
            if how["backend"] == "ollie":
                how["options"]["budget_s"] = budget_s
            torch.compiler.reset()
            start = time.perf_counter()
            if name in RUNTIMES:
                try:
                    compiled = RUNTIMES[name](net, x)
                except Exception as why:  # whatever it raises for operators that it does not know
                    print(f"{name} does not take this net: {str(why).splitlines()[-1]}", file=sys.stderr)
                    continue
            else:
                compiled = torch.compile(net, fullgraph=True, dynamic=False, **how)
            with freezing(name):
                got = compiled(x)
            compile_s[name] = time.perf_counter() - start
            torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
            pairs = zip(*(each if isinstance(each, tuple) else (each,) for each in (got, want)), strict=True)
            error[name] = max(((g - w).abs().max() / w.abs().max()).item() for g, w in pairs)
            running[name] = lambda compiled=compiled: compiled(x)
        for name, call in running.items():  # the resets made all but the last compile anew at the next call
            with freezing(name):
                call()
        samples = interleaved(running, rounds, calls)
    median = {name: sorted(times)[len(times) // 2] for name, times in samples.items()}
    best = min(seconds for name, seconds in median.items() if not name.startswith("ollie"))
    return {
        name: {
            "median_ms": median[name] * 1e3,
            "p10_ms": sorted(times)[len(times) // 10] * 1e3,
            "p90_ms": sorted(times)[len(times) * 9 // 10] * 1e3,
            "speedup_over_best_peer": best / median[name],
            "speedup_over_inductor": median.get("inductor", float("nan")) / median[name],
            "largest_relative_error": error[name],
            "compile_s": compile_s[name],
        }
        for name, times in samples.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--budget-s", type=float, default=60.0, help="OLLIE's search and measurement")
    parser.add_argument("--nets", nargs="+", choices=NETS, default=list(NETS))
    installed = [name for name in CONTENDERS if name not in RUNTIMES or importlib.util.find_spec(name)]
    parser.add_argument("--contenders", nargs="+", default=installed, choices=CONTENDERS)
    parser.add_argument("--calls", type=int, default=5, help="calls timed together")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["TVM_NUM_THREADS"] = "1"
    config = f"fp32, 1 thread, no_grad, random weights, medians of {arguments.rounds} interleaved rounds"
    config += f" of {arguments.calls}"
    config += f", budget {arguments.budget_s:.0f} s"
    table = Table("ollie_main", "OLLIE's main job: milliseconds a batch", config)
    for net_name in arguments.nets:
        build, shape = NETS[net_name]
        for batch in arguments.batch:
            torch.manual_seed(0)
            net = build()
            x = torch.randn(batch, *shape)
            rows = compare(
                net.eval(), x, arguments.contenders, arguments.rounds, arguments.calls, arguments.budget_s
            )
            for name, row in rows.items():
                table.add(f"{net_name} batch {batch}: {name}", **row)
    table.finish()


if __name__ == "__main__":
    main()
