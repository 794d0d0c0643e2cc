"""Floating-point checks and their reproducers."""

import pytest
import torch

from ollie_compile.lower.lowering import Program
from ollie_compile.plan.checks import check_program, reproducer, rounding_error
from ollie_compile.rules import simplify
from ollie_compile.rules.bilinear import bilinear_decomposition
from tests.ollie.strategies import operator


def conv(padding=1, dtype=torch.float32):
    return operator(
        torch.zeros(1, 2, 6, 6, dtype=dtype), torch.zeros(3, 2, 3, 3, dtype=dtype), padding=padding
    )


def bilinear(padding=1):
    return Program(simplify(next(bilinear_decomposition(conv(padding).expression())))[0], "rows")


@pytest.mark.parametrize(
    ("padding", "derivation", "program"),
    [(1, "derivation: None", "program: None"), (0, "derivation: differs over", "program: has shape")],
)
def test_a_reproducer_says_what_is_wrong(capsys, padding, derivation, program):
    source = reproducer(conv(), bilinear(padding))
    exec(compile(source, "reproducer", "exec"), {})
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(derivation)
    assert second.startswith(program)


def test_values_that_are_no_numbers_are_wrong():
    class Broken(Program):
        def __call__(self, inputs):
            return super().__call__(inputs) * float("nan")

    right = bilinear()
    assert check_program(conv(), right) is None
    assert "differs by nan" in check_program(conv(), Broken(right.scope, right.layout))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rounding_is_that_of_the_dtype(dtype):
    error = rounding_error(conv(dtype=dtype), None)
    assert 0 <= error < 4 * torch.finfo(dtype).eps
