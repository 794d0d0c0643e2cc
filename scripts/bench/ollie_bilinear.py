"""Bilinear forms of wide 3x3 convolutions against the direct ones (docs/results/ollie_bilinear.csv).

    python scripts/bench/ollie_bilinear.py [--shapes 128x28x1 ...] [--rounds 20]

A shape is channels x size x batch. Weights are transformed ahead, data and results are channels last; the
peers are eager in both layouts and Inductor with freezing. Errors are relative to the largest float64 output.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from common import Table
from ollie_main import freezing, interleaved

from ollie_compile.lower.lowering import Program
from ollie_compile.measure.calls import compiled
from ollie_compile.plan.checks import check_program
from ollie_compile.problems.operators import Convolution, Layout
from ollie_compile.rules import simplify
from ollie_compile.rules.bilinear import TILES, amplification, bilinear_decomposition

SHAPES = ("64x56x1", "128x28x1", "256x14x1", "512x7x1", "256x14x16", "512x7x16")


def operator(x: torch.Tensor, weight: torch.Tensor) -> Convolution:
    out = torch.conv2d(x, weight, padding=1)
    layouts = [Layout(tuple(t.shape), tuple(t.stride())) for t in (x, weight, out)]
    return Convolution(
        input=layouts[0],
        weight=layouts[1],
        output=layouts[2],
        stride=(1, 1),
        padding=(1, 1),
        dilation=(1, 1),
        transposed=False,
        output_padding=(0, 0),
        groups=1,
        dtype=x.dtype,
        device=x.device,
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = f"fp32, 1 thread, random data, medians of {arguments.rounds} interleaved rounds of 5"
    table = Table("ollie_bilinear", "3x3 convolutions in bilinear form", config)
    for shape in arguments.shapes:
        channels, size, batch = map(int, shape.split("x"))
        torch.manual_seed(0)
        x = torch.randn(batch, channels, size, size)
        weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
        x_last, weight_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        conv = operator(x_last, weight_last)
        want = torch.conv2d(x.double(), weight.double(), padding=1)
        with torch.no_grad():
            calls: dict[str, Callable[[], object]] = {
                "eager": lambda x=x, w=weight: torch.conv2d(x, w, padding=1),
                "eager channels last": lambda x=x_last, w=weight_last: torch.conv2d(x, w, padding=1),
            }
            layer = torch.nn.Conv2d(channels, channels, 3, padding=1, bias=False).eval()
            layer.weight.copy_(weight)
            frozen = torch.compile(layer, dynamic=False)
            with freezing("inductor freezing"):
                frozen(x)
            calls["inductor freezing"] = lambda frozen=frozen, x=x: frozen(x)
            growth = dict.fromkeys(calls, 1.0)
            for tile, derived in zip(TILES, bilinear_decomposition(conv.expression()), strict=True):
                program = Program(simplify(derived)[0], "rows", "cpp")
                assert check_program(conv, program) is None
                values = (x_last, weight_last, *program.constants(x.dtype, x.device).values())
                name = f"F({tile}x{tile})"
                calls[name] = compiled(conv.finished(program), values, constant=1)
                growth[name] = amplification(program.scope)
            errors = {}
            for name, call in calls.items():
                got = call()
                got = got[0] if isinstance(got, (tuple, list)) else got
                errors[name] = ((got.double() - want).abs().max() / want.abs().max()).item()
                assert errors[name] < 1e-3, f"{name} differs by {errors[name]}"
            samples = interleaved(calls, arguments.rounds)
        median = {name: sorted(times)[len(times) // 2] for name, times in samples.items()}
        best = min(seconds for name, seconds in median.items() if not name.startswith("F("))
        for name, seconds in median.items():
            table.add(
                f"{shape}: {name}",
                median_ms=seconds * 1e3,
                speedup_over_best_peer=best / seconds,
                largest_relative_error=errors[name],
                term_growth=growth[name],
            )
    table.finish()


if __name__ == "__main__":
    main()
