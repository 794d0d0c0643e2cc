"""The operators that lowered programs call are those that plan files may call."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ollie_compile.expr import Scope
from ollie_compile.lower.layouts import programs, with_kernels
from ollie_compile.lower.lowering import Program
from ollie_compile.problems import polynomials
from ollie_compile.problems.operators import Operator
from ollie_compile.search.hybrid import search
from tests.ollie.strategies import contractions, convolutions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")  # naming a device needs none


def ways(scope: Scope) -> list[Program]:
    """The programs of an expression on CPUs and on GPUs, with the kernels of this package and without."""
    plain = [*programs(scope, CPU), *programs(scope, CPU, portable=True), *programs(scope, CUDA)]
    return [
        *plain,
        *(one for program in plain for device in (CPU, CUDA) for one in with_kernels(program, device)),
    ]


def called(expression: Scope, operator: Operator | None, depth: int) -> set[str]:
    """The operators that programs of an expression call.

    Raises:
        ValueError: one is missing in `EMITTED`.
    """
    names: set[str] = set()
    for derivation in search(expression, max_depth=depth, budget_s=2.0).derivations[:12]:
        for program in dict.fromkeys(ways(derivation.scope)):
            names.update(str(call.target) for call in recorded(program, operator).calls)
    return names


def recorded(program: Program, operator: Operator | None) -> polynomials.Calls:
    constants = program.constants(torch.float32, CPU).values()
    shapes = {name: tensor.shape for name, tensor in program.scope.inputs().items()}

    def tensors():
        inputs = (
            [torch.empty(shape) for shape in shapes.values()]
            if operator is None
            else [torch.empty_strided(one.shape, one.stride) for one in operator.inputs.values()]
        )
        return [*inputs, *(torch.empty(constant.shape) for constant in constants)]

    names = [*shapes, *program.scope.constants()]
    plain = lambda *values: program(dict(zip(names, values, strict=True)))  # noqa: E731
    return polynomials.record(plain if operator is None else operator.finished(program), tensors)


@settings(max_examples=12, deadline=None)
@given(st.one_of(convolutions(), contractions()), st.integers(0, 1))
def test_lowering_calls_what_plan_files_may_call(drawn, depth):
    operator = None if isinstance(drawn, Scope) else drawn
    assert called(drawn if operator is None else operator.expression(), operator, depth)
