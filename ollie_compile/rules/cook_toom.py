"""Cook-Toom matrices: a correlation of R taps at m neighbouring places with m + R - 1 products.

    Sum[r] g[r] * d[x + r]  =  Sum[i] At[x, i] * (Sum[r] G[i, r] * g[r]) * (Sum[j] Bt[i, j] * d[j])

for x in [0, m), with i and j in [0, m + R - 1). It is the transposed multiplication of polynomials by
evaluation at m + R - 2 points and at infinity (Winograd, Arithmetic Complexity of Computations, 1980;
Lavin and Gray, arXiv 1509.09308).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fractions import Fraction

from ollie_compile.expr import Constant

# By how many there are. Pairs of c and -c, of 1/c too where there are four, round least (Alam et al., arXiv
# 2201.10369): four times less than 0, 1, -1, 2, -2, with the same zeros in the matrices.
POINTS = (
    "",
    "0",
    "0 1",
    "0 1 -1",
    "1/2 -1/2 3/2 -3/2",
    "0 2/3 -2/3 3/2 -3/2",
    "1/2 -1/2 1 -1 2 -2",
    "0 1/2 -1/2 1 -1 2 -2",
)
LARGEST = len(POINTS)  # products of one dimension; the rounding error grows steeply with them


@functools.lru_cache
def matrices(tile: int, taps: int) -> tuple[Constant, Constant, Constant]:
    """At [tile, products], G [products, taps] and Bt [products, products], products = tile + taps - 1.

    Raises:
        ValueError: more than `LARGEST` products.
    """
    products = tile + taps - 1
    if not 2 <= products <= LARGEST:
        raise ValueError(
            f"tile + taps - 1 must be in [2, {LARGEST}], got {tile} + {taps} - 1: take a smaller tile."
        )
    points = tuple(map(Fraction, POINTS[products - 1].split()))
    output = [[*(p**x for p in points), Fraction(x == tile - 1)] for x in range(tile)]
    weight, data = [], []
    for place, point in enumerate(points):
        others = points[:place] + points[place + 1 :]
        scale = _product([point - other for other in others])
        weight.append([point**r / scale for r in range(taps)])
        data.append([*_from_roots(others), Fraction(0)])
    weight.append([Fraction(r == taps - 1) for r in range(taps)])
    data.append(_from_roots(points))
    for x in range(tile):
        for r in range(taps):
            for j in range(products):
                total = sum(output[x][i] * weight[i][r] * data[i][j] for i in range(products))
                assert total == (j == x + r), "the three matrices make a correlation"
    name = f"{tile}x{taps}"
    return (
        Constant.matrix(f"At{name}", output),
        Constant.matrix(f"G{name}", weight),
        Constant.matrix(f"Bt{name}", data),
    )


def amplification(tile: int, taps: int) -> float:
    """How much larger the terms may get than those of the direct sum, max_x Sum[i] |At| |G|_1 |Bt|_1 / taps.

    Rounding errors of one dimension grow at most by this factor, those of several by the product.
    """
    output, weight, data = matrices(tile, taps)
    products = tile + taps - 1
    norms = [
        sum(abs(weight.at(i, r)) for r in range(taps)) * sum(abs(data.at(i, j)) for j in range(products))
        for i in range(products)
    ]
    most = max(sum(abs(output.at(x, i)) * norms[i] for i in range(products)) for x in range(tile))
    return float(most / taps)


def _product(values: Sequence[Fraction]) -> Fraction:
    total = Fraction(1)
    for value in values:
        total *= value
    return total


def _from_roots(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients of the product of (X - root), the constant one first."""
    coefficients = [Fraction(1)]
    for root in roots:
        shifted = [Fraction(0), *coefficients]
        coefficients = [s - root * c for s, c in zip(shifted, [*coefficients, Fraction(0)], strict=True)]
    return coefficients
