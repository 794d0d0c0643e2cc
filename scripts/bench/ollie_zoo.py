"""Models nobody tuned for, and chains of many layers: Inductor and OLLIE with its default budget.

    python scripts/bench/ollie_zoo.py [--models resnet gpt2 ...] [--rounds 30] [--training]
    python scripts/bench/ollie_zoo.py --models growth --rounds 0     # compile time by number of layers

Random weights, small widths; "growth" are chains of 3x3 convolutions with batch norms, all alike or each
wider by a channel. Results, and with --training gradients, must equal eager's before anything is timed; every
compilation is cold, in a cache folder of its own. Times are medians of interleaved rounds on one thread; a
model that fails is a row that says so.
"""

import argparse
import contextlib
import itertools
import warnings
from collections.abc import Callable, Mapping
from functools import partial

import torch
from common import Table, option, parse
from compilers import BACKENDS, cold, largest_error, warm_up
from harness import Race, require_equal, timed
from models.zoo import LANGUAGE, VISION_AND_AUDIO, ZOO, Built, build, loss
from torch import Tensor, nn


def chain(widths: list[int]) -> Built:
    """Convolutions from each width to the next, on [1, channels, 16, 16]."""
    parts: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        parts += [nn.Conv2d(before, after, 3, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*parts).eval(), {"input": torch.randn(1, widths[0], 16, 16)}


CHAINS = {
    **{f"{layers} layers, alike": partial(chain, [8] * (layers + 1)) for layers in (10, 20, 40, 80)},
    **{f"{n} layers, different": partial(chain, [8, *range(9, 9 + n)]) for n in (10, 20, 40)},
}
GROUPS = {"vision": VISION_AND_AUDIO, "language": LANGUAGE, "growth": CHAINS}


def run(module: Callable[..., Tensor], inputs: Mapping[str, Tensor], training: bool) -> list[Tensor]:
    """The result, and the gradients of the parameters where it is trained."""
    torch.manual_seed(0)
    with torch.set_grad_enabled(training):
        result = module(**inputs)
    if not training:
        return [result]
    assert isinstance(module, nn.Module), "models are modules"
    trained = [p for p in module.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss(result), trained, allow_unused=True)
    return [result, *(gradient for gradient in gradients if gradient is not None)]


def equal(got: list[Tensor], want: list[Tensor]) -> float:
    """Their `largest_error`; a gradient that is 0 but for rounding is judged by the largest one's size."""
    assert [g.shape for g in got] == [w.shape for w in want], "results have other shapes"
    largest = max((w.abs().max().item() for w in want[1:]), default=0.0)
    for index, (g, w) in enumerate(zip(got, want, strict=True)):
        size = max(w.abs().max().item(), 1e-4 * largest if index else 1e-6)
        torch.testing.assert_close(g / size, w / size, rtol=0, atol=1e-3)
    return largest_error(got, want)


def compare(name: str, options: argparse.Namespace) -> dict[str, float]:
    torch.compiler.reset()
    net, inputs = build(name) if name in ZOO else CHAINS[name]()
    want = run(net, inputs, options.training)
    # What only the first compilation of a process, or of a model, pays: imports and Python's caches.
    with contextlib.suppress(RuntimeError):  # aot_eager's own, such as group norm's of strided inputs
        run(torch.compile(net, backend="aot_eager", dynamic=False), inputs, options.training)
    row: dict[str, float] = {}
    calls = {}
    for backend in BACKENDS:
        with cold():
            compiled = torch.compile(net, backend=backend, dynamic=False)
            calls[backend] = partial(run, compiled, inputs, options.training)
            took = timed(calls[backend])
        row[f"{backend}_compile_s"] = took.wall
        row[f"{backend}_error"] = require_equal([(backend, took.result)], equal, want)[backend]
    row["compile_ratio"] = row["ollie_compile_s"] / row["inductor_compile_s"]
    if options.rounds:
        times = Race(calls, equal=equal, want=want).run(options.rounds, calls=options.calls)
        for backend in BACKENDS:
            columns = times[backend].columns("ms", median="ms")
            row |= {f"{backend}_{column}": value for column, value in columns.items()}
        row["speedup"] = times["inductor"].median / times["ollie"].median
    return row


def main() -> None:
    options = parse(
        __doc__,
        models=option(["vision", "language"], choices=[*GROUPS, *ZOO, *CHAINS]),
        rounds=option(30, "0 compiles only"),
        calls=option(5, "calls timed together"),
        training=option(False, "forward and backward"),
        threads=1,
    )
    warnings.simplefilter("ignore")
    job = "forward and backward" if options.training else "forward, no_grad"
    config = f"fp32, {job}, small random models, default options, medians, cold compilations; {options}"
    zoo = Table("ollie_zoo", "A zoo nobody tuned for: OLLIE beside Inductor", config)
    growth = Table("ollie_growth", "Compile time by number of layers", config)
    warm_up()
    for name in (name for chosen in options.models for name in GROUPS.get(chosen, [chosen])):
        table = zoo if name in ZOO else growth
        try:
            table.add(name, **compare(name, options))
        except Exception as fault:  # a row that says so; the others go on
            table.add(name, failed=f"{type(fault).__name__}: {str(fault).partition(chr(10))[0]}")
    zoo.finish()
    growth.finish()


if __name__ == "__main__":
    main()
