"""Three independent checks that a program computes what the original expression does."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from ollie_compile.expr import Scope, evaluate
from ollie_compile.lower import Program
from ollie_compile.operators import Convolution

PRIME, OTHER_PRIME = 2**31 - 19, 2**31 - 1  # products of two residues fit int64
POINTS, FEWEST_POINTS = 48, 4
MOST_TERMS = 1 << 21  # evaluated at once; expressions of more terms are checked at fewer points


def check_derivation(original: Scope, derived: Scope, *, points: int = POINTS, seed: int = 0) -> str | None:
    """Compare two expressions of one box at its corners and at random points, exactly.

    Over the integers every value is computed in full; over the field of `PRIME` elements inputs are
    uniform, so that by Schwartz-Zippel different polynomials agree with probability below 2**-29.

    Returns:
        None, or what differs, with the seed that shows it again.
    """
    generator = np.random.default_rng(seed)
    points = max(FEWEST_POINTS, min(points, MOST_TERMS // max(_terms(original), _terms(derived))))
    box = np.array(original.box, dtype=np.int64)
    at = generator.integers(box[:, 0], box[:, 1], size=(points, len(box)))
    corners = np.where(generator.random((points // 4, len(box))) < 0.5, box[:, 0], box[:, 1] - 1)
    at = np.concatenate([at, corners])
    for name, modulus, low, high in (("integers", None, -8, 9), ("prime field", PRIME, 0, PRIME)):
        inputs = {
            tensor.name: generator.integers(low, high, size=tensor.shape)
            for tensor in original.inputs().values()
        }
        want = evaluate(original, inputs, at, modulus)
        if derived.constants() and modulus is None:
            # An integer that fractions add up to is the residue nearest to 0, as long as it is small.
            got = evaluate(derived, inputs, at, OTHER_PRIME)
            got = np.where(got > OTHER_PRIME // 2, got - OTHER_PRIME, got)
        else:
            got = evaluate(derived, inputs, at, modulus)
        if (want != got).any():
            where = at[(want != got).argmax()].tolist()
            return f"differs over the {name} at {where} (seed {seed})"
    return None


def _terms(scope: Scope) -> int:
    """How many terms one value of an expression sums, over all scopes below it."""
    below = max((_terms(read.tensor) for read in scope.factors if isinstance(read.tensor, Scope)), default=1)
    return below * math.prod(loop.extent for loop in scope.summation)


def check_program(operator: Convolution, program: Program) -> str | None:
    """Compare the lowered program with torch's operator in float64.

    Returns:
        None, or the largest difference relative to the largest output.
    """
    x, weight = operator.example_inputs(torch.float64)
    want = operator.reference(x, weight)
    constants = program.constants(torch.float64, operator.device)
    got = operator.finished(program)(x, weight, *constants.values())
    if got.shape != want.shape:
        return f"has shape {tuple(got.shape)} instead of {tuple(want.shape)}"
    error = _relative_error(got, want)
    # Reordered sums of n terms differ by about n * 1e-16; indices that are wrong differ by about 1.
    return None if error < 1e-10 else f"differs by {error:.1e} of the largest output in float64"


def rounding_error(operator: Convolution, program: Program) -> float:
    """The largest error of the program in the operator's dtype, relative to the largest exact output."""
    x, weight = operator.example_inputs()
    constants = program.constants(operator.dtype, operator.device)
    got = operator.finished(program)(x, weight, *constants.values())
    return _relative_error(got.double(), operator.reference(x.double(), weight.double()))


def _relative_error(got: Tensor, want: Tensor) -> float:
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-300)).item()
