"""The operators that lowered programs call are those that plan files may call."""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx

from ollie_compile.expr import Scope
from ollie_compile.lower.emitted import EMITTED
from ollie_compile.lower.layouts import programs, with_kernels
from ollie_compile.lower.lowering import Program
from ollie_compile.problems import polynomials, subprograms
from ollie_compile.problems.operators import Operator
from ollie_compile.search.hybrid import search
from tests.ollie.strategies import contractions, convolutions
from tests.ollie.strategies import operator as convolution

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
    names = called(drawn if operator is None else operator.expression(), operator, depth)
    assume(names)  # some expressions have no program
    assert names <= set(map(str, EMITTED))


def subprograms_of(function: Callable[..., Any], *inputs: torch.Tensor) -> list[Operator]:
    """The subprograms of a function, all inputs but the first of which are weights."""
    traced = make_fx(function, tracing_mode="fake", decomposition_table=select_decomp_table())(*inputs)
    traced.graph.eliminate_dead_code()
    weights = traced.graph.find_nodes(op="placeholder")[1:]
    return [operator for operator, _ in subprograms.find(traced.graph, frozenset(weights))]


def low_rank(x, a, b, c):
    """A sum of products, one of them scaled by a number."""
    return (x @ a + (x @ b) @ c * 0.5).relu()


def side_by_side(x, a, b):
    return (x @ a).relu(), (x @ b).exp()


def banded(x, y):
    """Each row meets the five rows around it in the second tensor."""
    return torch.einsum("bmk,bmkw->bmw", x, torch.nn.functional.pad(y, (0, 0, 2, 2)).unfold(1, 5, 1))


def weighted(x, y):
    """Each row is a sum of the five rows around it in the second tensor."""
    return torch.einsum("bmw,bmkw->bmk", x, torch.nn.functional.pad(y, (0, 0, 2, 2)).unfold(1, 5, 1))


zeros = torch.zeros
IMAGE, TAPS = zeros(1, 4, 6, 6), zeros(4, 4, 3, 3)
EXAMPLES = {
    "a convolution": lambda: [convolution(IMAGE, TAPS, padding=1)],
    "one result, channels last": lambda: [
        convolution(IMAGE.to(memory_format=torch.channels_last), zeros(1, 4, 3, 3), padding=1)
    ],
    "a transposed convolution": lambda: [
        convolution(IMAGE, zeros(4, 2, 4, 4), stride=2, padding=1, transposed=True)
    ],
    "groups": lambda: [convolution(IMAGE, zeros(4, 2, 3, 3), groups=2)],
    "a sum of products": lambda: subprograms_of(low_rank, zeros(5, 6), zeros(6, 6), zeros(6, 2), zeros(2, 6)),
    "side by side": lambda: subprograms_of(side_by_side, zeros(5, 6), zeros(6, 4), zeros(6, 3)),
    "banded": lambda: subprograms_of(banded, zeros(2, 9, 4), zeros(2, 9, 4)),
    "weighted": lambda: subprograms_of(weighted, zeros(2, 9, 5), zeros(2, 9, 4)),
}


def test_all_that_plan_files_may_call_is_called():
    names = {
        name for make in EXAMPLES.values() for one in make() for name in called(one.expression(), one, 1)
    }
    assert names == set(EMITTED)
