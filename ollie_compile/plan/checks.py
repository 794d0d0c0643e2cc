"""Checks of candidates: their derivations, their programs in float64, how much they round; and notations."""

from __future__ import annotations

import functools
import logging

import numpy as np
import torch
from torch import Tensor

from ollie_compile.config import OllieConfig
from ollie_compile.expr import Scope, evaluate
from ollie_compile.lower.lowering import Program
from ollie_compile.measure.machine import Machine
from ollie_compile.plan import exactness
from ollie_compile.plan.candidates import OUT_OF_TIME, Candidate
from ollie_compile.plan.magnitudes import LARGE, MixedMagnitudes
from ollie_compile.plan.results import exact_results, in_float64, original, run
from ollie_compile.problems.operators import Operator, Subprogram
from ollie_compile.search.hybrid import Derivation
from ollie_compile.search.proof import (
    LIMIT,
    POINTS,
    check_derivation,
    difference,
    sample_points,
    terms_summed,
)

logger = logging.getLogger(__name__)

HALF_SLACK = 2.0  # times the rounding of the original that a candidate may have above the tolerance


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
    results = run(operator, program, in_float64(operator))
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
    got = original(operator, inputs) if program is None else run(operator, program, inputs)
    return max(_relative_error(mine.double(), want) for mine, want in zip(got, exact, strict=True))


def reproducer(operator: Operator, program: Program) -> str:
    """Python source that checks a program of an operator again and prints the differences.

    Of a subprogram only the derivation is checked, and its operators are a comment: if the derivation is
    right, the fault is in the lowered program.
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
        "from ollie_compile.lower.lowering import Program",
        "from ollie_compile.plan.checks import check_program",
        "from ollie_compile.problems.gradients import Gradient",
        "from ollie_compile.problems.operators import Convolution, Layout",
        "from ollie_compile.search.proof import check_derivation",
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


def _relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()


def check_notation(operator: Operator, *, points: int = POINTS, seed: int = 0) -> str | None:
    """Compare an operator's expression with its only result, in float64.

    Returns:
        None, or how they differ.
    """
    scope = operator.expression()
    at = sample_points(np.random.default_rng(seed), scope, points, terms_summed(scope))
    inputs = operator.example_inputs(torch.float64)
    want = operator.reference(*inputs)
    assert isinstance(want, torch.Tensor), "a notation has one result"
    values = {name: value.cpu().numpy() for name, value in zip(operator.inputs, inputs, strict=True)}
    places = at - np.array(scope.box, dtype=np.int64)[:, 0]
    return difference(evaluate(scope, values, at), want.cpu().numpy()[tuple(places.T)], at)


class Checks:
    """The checks of one operator's candidates; after `deadline` no check begins."""

    def __init__(self, operator: Operator, config: OllieConfig, machine: Machine, deadline: float) -> None:
        self.operator, self.config, self.machine, self.deadline = operator, config, machine, deadline
        self.slowest_s = 0.0

    @functools.cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """The results in float64."""
        return exact_results(self.operator)

    @functools.cached_property
    def limit(self) -> float:
        """The largest rounding error that a candidate may have."""
        if self.operator.dtype.itemsize >= 4:
            return self.config.tolerance
        return max(self.config.tolerance, HALF_SLACK * rounding_error(self.operator, None, self.exact))

    @functools.cached_property
    def mixed(self) -> MixedMagnitudes:
        """Inputs of mixed magnitude."""
        return MixedMagnitudes(self.operator)

    @functools.cached_property
    def mixed_limit(self) -> float:
        """The largest error that a candidate may have on inputs of mixed magnitude."""
        if self.operator.dtype.itemsize >= 4:
            return self.config.tolerance
        return max(self.config.tolerance, HALF_SLACK * self.mixed.error(None))

    def passes(self, candidate: Candidate) -> bool:
        """Whether a candidate is right and rounds no more than it may; otherwise it is rejected."""
        start = self.machine.now()
        late = start + self.slowest_s > self.deadline
        try:
            candidate.rejected = OUT_OF_TIME if late else self._fault(candidate)
        except Exception as error:  # of a kernel, or too little memory: the other candidates still stand
            candidate.rejected = f"its check failed: {error}"
            logger.error(
                "ollie: %s: %s is dropped, it raised", self.operator, candidate.program, exc_info=True
            )
        self.slowest_s = max(self.slowest_s, self.machine.now() - start)
        return candidate.rejected is None

    def check_derivation(self, derived: Scope) -> str | None:
        """None, or how an expression differs from the operator's."""
        return check_derivation(self.operator.expression(), derived)

    def _fault(self, candidate: Candidate) -> str | None:
        """None, or why a candidate is rejected."""
        operator, program = self.operator, candidate.program
        if self.config.verify:
            wrong = self.check_derivation(program.scope)
            if wrong is None and self.machine.now() > self.deadline:
                return OUT_OF_TIME
            wrong = wrong or check_program(operator, program, self.exact)
            if wrong is not None:
                wrong += self._first_wrong_step(candidate.derivation)
                candidate.reproducer = reproducer(operator, program)
                logger.error(
                    "ollie: %s: dropped, it %s; to see it again:\n%s", operator, wrong, candidate.reproducer
                )
                return f"wrong: {wrong}"
        candidate.error = rounding_error(operator, program, self.exact)
        if not candidate.error <= self.limit:
            return f"its rounding error {candidate.error:.1e} is above the tolerance {self.limit:.1e}"
        return self._numbers_fault(candidate) or operator.refused(program, self.config)

    def _numbers_fault(self, candidate: Candidate) -> str | None:
        """None, or how a candidate treats values that are not finite, or that are next to larger ones.

        Without constant matrices a program multiplies and adds as the original does, which loses no digits.
        """
        operator, program = self.operator, candidate.program
        if self.config.non_finite == "exact":
            return exactness.fault(operator, program)
        if program.scope.constants().keys() <= operator.expression().constants().keys():
            return None
        candidate.mixed_error = self.mixed.error(program)
        if candidate.mixed_error <= self.mixed_limit:
            return None
        return (
            f"next to values {LARGE:.0e} times larger its error is {candidate.mixed_error:.1e} of a result's "
            f"own sum of |products|, above the tolerance {self.mixed_limit:.1e}"
        )

    def _first_wrong_step(self, derivation: Derivation) -> str:
        for step in derivation.steps:
            if self.check_derivation(step.scope) is not None:
                return f", first after the rules {' + '.join(step.rules)}"
        return ""
