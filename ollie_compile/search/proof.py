"""The check of a derivation: both expressions at points, over the integers and over a prime field."""

from __future__ import annotations

import math

import numpy as np

from ollie_compile.expr import Scope, evaluate

# Reordered sums of n terms differ by about n * 1e-16; indices that are wrong differ by about 1.
LIMIT = 1e-10
PRIME, OTHER_PRIME = 2**31 - 19, 2**31 - 1  # products of two residues fit int64
POINTS, FEWEST_POINTS = 48, 4
MOST_TERMS = 1 << 21  # evaluated at once; expressions of more terms are checked at fewer points


def check_derivation(original: Scope, derived: Scope, *, points: int = POINTS, seed: int = 0) -> str | None:
    """Compare two expressions of one box at its corners and at random points.

    Over the integers every value is computed in full; over the field of `PRIME` elements inputs are
    uniform, so that by Schwartz-Zippel different polynomials agree with probability below 2**-29. Fractions
    together with functions, which have no residues, are computed in float64 in the place of integers.

    Returns:
        None, or what differs, with the seed that shows it again.
    """
    generator = np.random.default_rng(seed)
    at = sample_points(generator, original, points, max(terms_summed(original), terms_summed(derived)))
    exact = [("integers", None, -8, 9), ("prime field", PRIME, 0, PRIME)]
    if derived.constants() and _has_functions(derived):
        del exact[0]
        normal = {
            tensor.name: generator.standard_normal(tensor.shape) for tensor in original.inputs().values()
        }
        wrong = difference(evaluate(derived, normal, at), evaluate(original, normal, at), at)
        if wrong is not None:
            return f"{wrong} (seed {seed})"
    for name, modulus, low, high in exact:
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


def adds_the_same(original: Scope, derived: Scope, *, points: int = POINTS, seed: int = 0) -> bool:
    """Whether an expression adds up the products of the original in another order, and computes no others.

    Both are evaluated in an algebra whose sums commute and associate, and whose products distribute over no
    sum. Products with a 0 that lies outside of a tensor are not told apart from 0.
    """
    generator = np.random.default_rng(seed)
    at = sample_points(generator, original, points, max(terms_summed(original), terms_summed(derived)))
    inputs = {t.name: generator.integers(1, PRIME, size=t.shape) for t in original.inputs().values()}
    want, got = (evaluate(scope, inputs, at, PRIME, distributive=False) for scope in (original, derived))
    return bool((want == got).all())


def sample_points(generator: np.random.Generator, scope: Scope, count: int, terms: int) -> np.ndarray:
    """Up to `count` random points of a box, fewer where each sums many terms, and some corners."""
    count = _affordable(count, terms)
    box = np.array(scope.box, dtype=np.int64)
    inside = generator.integers(box[:, 0], box[:, 1], size=(count, len(box)))
    corners = np.where(generator.random((count // 4, len(box))) < 0.5, box[:, 0], box[:, 1] - 1)
    return np.concatenate([inside, corners])


def _affordable(count: int, terms: int) -> int:
    return max(FEWEST_POINTS, min(count, MOST_TERMS // terms))


def values_needed(scope: Scope, points: int | None = None) -> int:
    """About how many values a check of a derivation computes for an expression.

    Args:
        points: at which it is evaluated; None is as many as in `check_derivation`.
    """
    if points is None:
        points = 2 * _affordable(POINTS, terms_summed(scope))
    terms = min(points, math.prod(scope.shape)) * math.prod(loop.extent for loop in scope.summation)
    return terms + sum(values_needed(inner, terms) for inner in scope.below())


def difference(got: np.ndarray, want: np.ndarray, at: np.ndarray) -> str | None:
    errors = np.abs(got - want) / max(np.abs(want).max(), 1e-300)
    if (errors < LIMIT).all():
        return None
    where = at[(~(errors < LIMIT)).argmax()].tolist()
    return f"differs by {errors.max():.1e} of the largest value in float64 at {where}"


def _has_functions(scope: Scope) -> bool:
    return any(inner.function not in "*+" for inner in scope.scopes())


def terms_summed(scope: Scope) -> int:
    """How many terms one value of an expression sums, over all scopes below it."""
    below = max(
        (terms_summed(read.tensor) for read in scope.factors if isinstance(read.tensor, Scope)), default=1
    )
    return below * math.prod(loop.extent for loop in scope.summation)
