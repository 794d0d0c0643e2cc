"""Bilinear forms of wide 3x3 convolutions against the direct ones (docs/results/ollie_bilinear.csv).

    python scripts/bench/ollie_bilinear.py [--shapes 128x28x1 ...] [--rounds 20]

A shape is channels x size x batch. Weights are transformed ahead, data and results are channels last; the
peers are eager in both layouts and Inductor with freezing. Errors are relative to the largest float64 output.
"""

from functools import partial
from typing import Any

import torch
from common import Table, option, parse
from compilers import first_call
from harness import Race
from torch import Tensor, nn

from ollie_compile.lower.lowering import Program
from ollie_compile.measure import calls
from ollie_compile.measure.profile import Profile
from ollie_compile.plan.checks import check_program
from ollie_compile.problems.operators import Convolution, Layout
from ollie_compile.rules import simplify
from ollie_compile.rules.bilinear import TILES, bilinear_decomposition

SHAPES = ["64x56x1", "128x28x1", "256x14x1", "512x7x1", "256x14x16", "512x7x16"]


def operator(x: Tensor, weight: Tensor) -> Convolution:
    """The 3x3 convolution with a padding of 1 of these tensors."""
    tensors = {"input": x, "weight": weight, "output": torch.conv2d(x, weight, padding=1)}
    return Convolution(
        **{name: Layout.of(tensor) for name, tensor in tensors.items()},
        **{"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "output_padding": (0, 0), "groups": 1},
        transposed=False,
        dtype=x.dtype,
        device=x.device,
    )


def bilinear(x: Tensor, weight: Tensor) -> dict[str, Any]:
    """The call of each tile's form."""
    conv, found = operator(x, weight), {}
    for tile, derived in zip(TILES, bilinear_decomposition(conv.expression()), strict=True):
        program = Program(simplify(derived)[0], "rows", "cpp")
        assert check_program(conv, program) is None
        values = (x, weight, *program.constants(x.dtype, x.device).values())
        call = calls.compiled(conv.finished(program), values, constant=1, profile=Profile())
        found[f"F({tile}x{tile})"] = call
    return found


def equal(got: Any, want: Tensor) -> float:
    """The largest error, relative to the largest value."""
    got = got[0] if isinstance(got, (tuple, list)) else got
    error = ((got.double() - want).abs().max() / want.abs().max()).item()
    assert error < 1e-3, f"the error is {error}"
    return error


@torch.no_grad()
def main() -> None:
    options = parse(__doc__, shapes=option(SHAPES), rounds=20, threads=1)
    config = f"fp32, random data, medians of rounds of 5, interleaved; {options}"
    table = Table("ollie_bilinear", "3x3 convolutions in bilinear form", config)
    for shape in options.shapes:
        channels, size, batch = map(int, shape.split("x"))
        torch.compiler.reset()
        torch.manual_seed(0)
        x = torch.randn(batch, channels, size, size)
        weight = torch.randn(channels, channels, 3, 3) / (9 * channels) ** 0.5
        x_last, weight_last = (t.contiguous(memory_format=torch.channels_last) for t in (x, weight))
        layer = nn.Conv2d(channels, channels, 3, padding=1, bias=False).eval()
        layer.weight.copy_(weight)
        contenders = {
            "eager": partial(torch.conv2d, x, weight, padding=1),
            "eager channels last": partial(torch.conv2d, x_last, weight_last, padding=1),
            "inductor freezing": partial(first_call("inductor freezing", layer, x), x),
        }
        contenders |= bilinear(x_last, weight_last)
        race = Race(contenders, equal=equal, want=torch.conv2d(x.double(), weight.double(), padding=1))
        for name, each in race.run(options.rounds, calls=5).items():
            error = {"largest_relative_error": race.errors[name]}
            table.add(f"{shape}: {name}", **each.columns("ms"), **error)
    table.finish()


if __name__ == "__main__":
    main()
