"""A zoo nobody tuned for: Inductor and OLLIE with its default budget (docs/results/ollie_zoo.csv).

    python scripts/bench/ollie_zoo.py [--models resnet gpt2 ...] [--rounds 30] [--training]

Random weights, small widths. Results, and with --training gradients, must equal eager's before anything is
timed; every compilation is cold, in a cache folder of its own. Times are medians of interleaved rounds on
one thread; a model that fails is a row that says so.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from common import Table
from ollie_zoo_models import LANGUAGE, VISION_AND_AUDIO, ZOO, build, loss
from torch import Tensor, nn

BACKENDS = ("inductor", "ollie")


@contextlib.contextmanager
def cold() -> Iterator[None]:
    """No cache answers: Inductor's and OLLIE's lie in a folder of their own, and what Inductor holds in
    memory goes, such as the kernels that another backend has had built."""
    from torch._inductor.utils import clear_caches

    clear_caches()
    with tempfile.TemporaryDirectory() as folder:
        names = ("TORCHINDUCTOR_CACHE_DIR", "OLLIE_CACHE_DIR")
        before = {name: os.environ.get(name) for name in names}
        os.environ.update({name: f"{folder}/{name.lower()}" for name in names})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def run(call: Callable[..., Tensor], inputs: Mapping[str, Tensor], training: bool) -> list[Tensor]:
    """The result, and the gradients of the parameters where it is trained."""
    torch.manual_seed(0)
    result = call(**inputs)
    if not training:
        return [result]
    module = call if isinstance(call, nn.Module) else None
    assert module is not None, "models are modules"
    wanted = [p for p in module.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss(result), wanted, allow_unused=True)
    return [result, *(gradient for gradient in found if gradient is not None)]


def error(got: list[Tensor], want: list[Tensor]) -> float:
    """The largest difference, of each tensor relative to its largest value.

    Raises:
        AssertionError: other shapes, or another number of tensors.
    """
    assert [g.shape for g in got] == [w.shape for w in want], "results have other shapes"
    pairs = zip(got, want, strict=True)
    return max(((g - w).abs().max() / w.abs().max().clamp_min(1e-6)).item() for g, w in pairs)


def compare(name: str, arguments: argparse.Namespace) -> dict[str, float | str]:
    torch.compiler.reset()
    net, inputs = build(name)
    row: dict[str, float | str] = {}
    calls: dict[str, Callable[..., Any]] = {}
    with torch.set_grad_enabled(arguments.training):
        want = run(net, inputs, arguments.training)
        # What only the first compilation of a process, or of a model, pays: imports and Python's caches.
        with contextlib.suppress(RuntimeError):  # aot_eager's own, such as group norm's of strided inputs
            run(torch.compile(net, backend="aot_eager", dynamic=False), inputs, arguments.training)
        for backend in BACKENDS:
            with cold():
                start = time.perf_counter()
                calls[backend] = torch.compile(net, backend=backend, dynamic=False)
                got = run(calls[backend], inputs, arguments.training)
                row[f"{backend}_compile_s"] = time.perf_counter() - start
                row[f"{backend}_error"] = error(got, want)
        samples: dict[str, list[float]] = {backend: [] for backend in BACKENDS}
        for _ in range(arguments.rounds):
            for backend, call in calls.items():
                start = time.perf_counter()
                for _ in range(arguments.calls):
                    run(call, inputs, arguments.training)
                samples[backend].append((time.perf_counter() - start) / arguments.calls)
    for backend, times in samples.items():
        times.sort()
        row[f"{backend}_ms"] = times[len(times) // 2] * 1e3
        row[f"{backend}_p10_ms"] = times[len(times) // 10] * 1e3
        row[f"{backend}_p90_ms"] = times[len(times) * 9 // 10] * 1e3
    row["speedup"] = float(row["inductor_ms"]) / float(row["ollie_ms"])
    row["compile_ratio"] = float(row["ollie_compile_s"]) / float(row["inductor_compile_s"])
    return row


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    groups = {"vision": list(VISION_AND_AUDIO), "language": list(LANGUAGE)}
    parser.add_argument("--models", nargs="+", choices=[*groups, *ZOO], default=list(groups))
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--calls", type=int, default=5, help="calls timed together")
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no model begins after these")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    job = "forward and backward" if arguments.training else "forward, no_grad"
    config = f"fp32, 1 thread, {job}, small random models, default options, medians of {arguments.rounds} "
    config += f"interleaved rounds of {arguments.calls}, cold compilations"
    table = Table("ollie_zoo", "A zoo nobody tuned for: OLLIE beside Inductor", config)
    with torch.no_grad(), cold():
        for backend in BACKENDS:
            torch.compile(nn.Conv2d(8, 1, 1), backend=backend)(torch.randn(1, 8, 4, 4))
    stop = time.perf_counter() + arguments.seconds
    names = [name for chosen in arguments.models for name in groups.get(chosen, [chosen])]
    for place, name in enumerate(names):
        if time.perf_counter() > stop:
            print("not begun:", *names[place:])
            break
        try:
            table.add(name, **compare(name, arguments))
        except Exception as fault:  # a row that says so; the others go on
            table.add(name, failed=f"{type(fault).__name__}: {str(fault).partition(chr(10))[0]}")
    table.finish()


if __name__ == "__main__":
    main()
