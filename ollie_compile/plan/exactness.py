"""`non_finite="exact"`: programs whose NaNs, infinities and overflows are the original's.

Two things are asked of a candidate. Its expression must add up the original's products and no others, which
leaves out bilinear forms, merged weights and other orders of matrix products. And its program must give the
results of torch's operator on inputs with a few values that are not finite, and on inputs just below
overflow, which leaves out programs that multiply values by the zeros around a tensor.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from ollie_compile.lower.lowering import Program
from ollie_compile.plan.results import original, run
from ollie_compile.problems.operators import Operator, Subprogram
from ollie_compile.search.proof import adds_the_same

OTHER_TERMS = "it adds or multiplies what the original does not"
TRIALS = 3  # for each input, with other places of the values that are not finite
NON_FINITE = (float("nan"), float("inf"), -float("inf"))
FINITE_SHARE = 0.5  # of the results that stay finite, at least, so that others would be seen
HEADROOM = 16.0  # by which the largest sum of |products| stays below overflow
aten = torch.ops.aten
_SCALES = {
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.neg.default,
    aten.sub.Tensor,
}
_ARITHMETIC = _SCALES | {
    aten.add.Tensor,
    aten.addmm.default,
    aten.baddbmm.default,
    aten.bmm.default,
    aten.convolution.default,
    aten.linear.default,
    aten.matmul.default,
    aten.mm.default,
}


def fault(operator: Operator, program: Program) -> str | None:
    """None, or why a program is not exact where values are not finite."""
    if not adds_the_same(operator.expression(), program.scope):
        return OTHER_TERMS
    for name, inputs in _trials(operator):
        want, got = original(operator, inputs), run(operator, program, inputs)
        if not all(map(_alike, want, got)):
            return f"with {name} other results are not finite than in eager torch"
    return None


def lifted_otherwise(operator: Operator) -> str | None:
    """None, or why an operator's own expression is not what torch computes where values are not finite.

    Lifting moves factors of products and of sums into weights, and writes averages and indices as products
    with constants.
    """
    subprogram = getattr(operator, "base", operator)  # of a dynamic one
    if not isinstance(subprogram, Subprogram):
        return None
    if subprogram.expression().constants():
        return "its expression multiplies by constants that torch does not multiply by"
    computed: set[fx.Node] = set()
    for node in subprogram.graph.graph.nodes:
        of_computed = bool(computed & {*node.all_input_nodes})
        if node.target in _SCALES and of_computed:
            return f"its expression moves {node.target} into a weight"
        if node.target in _ARITHMETIC or (of_computed and node.op == "call_function"):
            computed.add(node)
    return None


def _alike(want: Tensor, got: Tensor) -> bool:
    """Whether NaNs and both infinities are in the same places."""
    tests = (torch.isnan, torch.isposinf, torch.isneginf)
    return all(torch.equal(test(want), test(got)) for test in tests)


def _trials(operator: Operator) -> Iterator[tuple[str, Sequence[Tensor]]]:
    """Inputs with a few values that are not finite, and inputs near overflow, with what is odd about them.

    Weights that are not finite are left out: torch's own convolutions differ in whether they multiply them by
    the zeros of padding, by the sizes and the number of threads.
    """
    generator = torch.Generator().manual_seed(0)
    for place, name in enumerate(operator.inputs):
        for _ in range(TRIALS if name not in operator.parameters else 0):
            yield f"NaNs and infinities in {name}", _poisoned(operator, place, generator)
        yield f"{name} near overflow", _near_overflow(operator, place)


def _poisoned(operator: Operator, place: int, generator: torch.Generator) -> list[Tensor]:
    """Inputs of which one has so many values that are not finite that about half of the results still are."""
    count = max(1, operator.example_inputs()[place].numel() // 16)
    while True:
        inputs = list(operator.example_inputs())
        flat = torch.randint(inputs[place].numel(), (count,), generator=generator)
        index = torch.unravel_index(flat, inputs[place].shape)
        kinds = torch.randint(len(NON_FINITE), (count,), generator=generator)
        values = torch.tensor(NON_FINITE, dtype=operator.dtype)[kinds]
        inputs[place][index] = values.to(operator.device)
        results = original(operator, inputs)
        share = min(result.isfinite().double().mean().item() for result in results)
        if share >= FINITE_SHARE or count == 1:
            return inputs
        count //= 2


def _near_overflow(operator: Operator, place: int) -> list[Tensor]:
    """Inputs of which one is so large that sums of |products| are nearly too large for the dtype."""
    inputs = list(operator.example_inputs())
    wide = [value.double().abs() for value in inputs]
    largest = max(result.abs().max().item() for result in original(operator, wide))
    largest = max(largest, wide[place].max().item())
    most = torch.finfo(operator.dtype).max / HEADROOM
    inputs[place] = inputs[place] * (most / largest)
    return inputs
