"""Floating-point checks of lowered programs, and what shows a failure again."""

from __future__ import annotations

from torch import Tensor

from ollie_compile.lower import Program
from ollie_compile.operators import Operator, Subprogram, Tensors

# Reordered sums of n terms differ by about n * 1e-16; indices that are wrong differ by about 1.
LIMIT = 1e-10


def exact_results(operator: Operator) -> tuple[Tensor, ...]:
    """What torch computes in float64 from the operator's example inputs."""
    return _all(operator.reference(*_in_float64(operator)))


def check_program(
    operator: Operator, program: Program, exact: tuple[Tensor, ...] | None = None
) -> str | None:
    """Compare the lowered program with torch's operators in float64.

    Args:
        exact: `exact_results(operator)`, for many programs of one operator; None computes them.

    Returns:
        None, or the largest difference relative to the largest output, or the wrong shape.
    """
    exact = exact_results(operator) if exact is None else exact
    results = _all(_run(operator, program, _in_float64(operator)))
    for got, want in zip(results, exact, strict=True):
        if got.shape != want.shape:
            return f"has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
        error = _relative_error(got, want)
        if not error < LIMIT:
            return f"differs by {error:.1e} of the largest output in float64"
    return None


def rounding_error(
    operator: Operator, program: Program | None, exact: tuple[Tensor, ...] | None = None
) -> float:
    """The largest error in the operator's dtype, relative to the largest exact output.

    Args:
        program: None is the operator itself, as torch computes it.
        exact: as in `check_program`.
    """
    exact = exact_results(operator) if exact is None else exact
    inputs = operator.example_inputs()
    got = _all(operator.reference(*inputs) if program is None else _run(operator, program, inputs))
    return max(_relative_error(mine.double(), want) for mine, want in zip(got, exact, strict=True))


def reproducer(operator: Operator, program: Program) -> str:
    """Python source that checks a program of an operator again and prints what is wrong with it.

    The operators of a subprogram stand in it as a comment: its derivation is checked, and its program is
    where a right derivation leaves the fault.
    """
    expression, derived = operator.expression(), program.scope
    tensors = [f"    {t.name!r}: {t!r}," for t in {**expression.inputs(), **derived.inputs()}.values()]
    tensors += [f"    {constant.name!r}: {constant!r}," for constant in derived.constants().values()]
    lines = [
        "from fractions import Fraction",
        "",
        "import torch",
        "from torch import device",
        "",
        "from ollie_compile.expr import Constant, Input, parse",
        "from ollie_compile.lower import Program",
        "from ollie_compile.numeric import check_program",
        "from ollie_compile.gradients import Gradient",
        "from ollie_compile.operators import Convolution, Layout",
        "from ollie_compile.verify import check_derivation",
        "",
        f"# {operator}, products as {program.layout}, eOperators as {program.kernels}",
        "tensors = {",
        *tensors,
        "}",
        f'original = parse("{expression}", tensors)',
        f'derived = parse("{derived}", tensors)',
        'print("derivation:", check_derivation(original, derived))',
    ]
    if isinstance(operator, Subprogram):
        return "\n".join([*lines, *(f"# {line}" for line in operator.graph.code.strip().split("\n"))])
    written = f"Program(derived, {program.layout!r}, {program.kernels!r})"
    return "\n".join(
        [*lines, f"operator = {operator!r}", f'print("program:", check_program(operator, {written}))']
    )


def _in_float64(operator: Operator) -> tuple[Tensor, ...]:
    return tuple(value.double() for value in operator.example_inputs())


def _run(operator: Operator, program: Program, inputs: tuple[Tensor, ...]) -> Tensors:
    constants = program.constants(inputs[0].dtype, operator.device)
    return operator.finished(program)(*inputs, *constants.values())


def _all(tensors: Tensors) -> tuple[Tensor, ...]:
    return (tensors,) if isinstance(tensors, Tensor) else tuple(tensors)


def _relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()
