"""Banded products as a target: OLLIE's G2BMM and GBMM, products along the diagonals of a band."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from torch import Tensor

from ollie_compile.expr import Read, Scope
from ollie_compile.kernels import library
from ollie_compile.targets.target import Kernel, Lowering, ProductLayout, extents
from ollie_compile.targets.views import whole_iterators


@dataclass(frozen=True, slots=True)
class Banded:
    """A product along the diagonals of a band (OLLIE's G2BMM and GBMM).

    Counted from 0 in every dimension, with key = row + dilation * place + offset:
    scores O[batch, row, place] = Sum[feature] A[batch, row, feature] * B[batch, key, feature], or
    values O[batch, row, feature] = Sum[place] A[batch, row, place] * B[batch, key, feature].

    Args:
        first: position of A among the factors.
        key: dimension of B that is read at the key.
    """

    scores: bool
    first: int
    batch: tuple[str, ...]
    row: str
    place: str
    feature: str
    key: int
    dilation: int
    offset: int


def match_banded(scope: Scope) -> Banded | None:
    """The banded product that a scope is, or None."""
    if not scope.is_contraction or len(scope.factors) != 2 or len(scope.summation) != 1:
        return None
    return _match_banded(scope, 0) or _match_banded(scope, 1)


def _match_banded(scope: Scope, first: int) -> Banded | None:
    a, b = scope.factors[first], scope.factors[1 - first]
    keys = [place for place, index in enumerate(b.index) if index.compound]
    if len(keys) != 1:
        return None
    (at,) = keys
    key = b.index[at]
    of_a, of_b = (
        whole_iterators(scope, a, range(len(a.index))),
        whole_iterators(scope, b, set(range(len(b.index))) - {at}),
    )
    if of_a is None or of_b is None or len(key.terms) != 2 or any(True for _ in key.divisions()):
        return None
    (summed,) = (loop.name for loop in scope.summation)
    traversed = [loop.name for loop in scope.traversal]
    batch = tuple(name for name in traversed if name in of_a and name in of_b)
    for row, place in itertools.permutations(key.iterators()):
        scores = place != summed
        feature = next((name for name in of_b if name not in batch), "")
        wanted = [(*batch, row, feature if scores else place), (*batch, feature)]
        wanted += [(*batch, row, place if scores else feature)]
        if [*map(sorted, wanted)] != [*map(sorted, (of_a, of_b, traversed))]:
            continue
        dilation = key.coefficient(place)
        if key.coefficient(row) == 1 and dilation > 0:
            start = sum(key.coefficient(name) * scope.ranges[name][0] for name in (row, place))
            offset = key.const + start - b.tensor.box[at][0]
            return Banded(scores, first, batch, row, place, feature, at, dilation, offset)
    return None


class TritonBands(Kernel[Banded]):
    """The Triton kernels, which compute tiles of the band as plain products."""

    family, title, devices, sole = "triton", "bands in Triton", ("cuda",), True

    def match(self, scope: Scope, layout: ProductLayout) -> Banded | None:
        return match_banded(scope)

    def call(self, match: Banded, scope: Scope, lowering: Lowering) -> Tensor:
        of_a, of_b = scope.factors[match.first], scope.factors[1 - match.first]
        summed, kept = match.feature, match.place
        if not match.scores:
            summed, kept = kept, summed
        a = _permuted(of_a, lowering.value(of_a), (*match.batch, match.row, summed))
        b = _permuted(of_b, lowering.value(of_b), (*match.batch, None, match.feature), match.key)
        batch = math.prod(extents(scope, match.batch))
        a, b = (x.reshape(batch, *x.shape[-2:]) for x in (a, b))
        if match.scores:
            (places,) = extents(scope, (match.place,))
            value = library.banded_scores(a, b, places, match.dilation, match.offset)
        else:
            value = library.banded_values(a, b, match.dilation, match.offset)
        found = (*match.batch, match.row, kept)
        dims = [found.index(loop.name) for loop in scope.traversal]
        return value.reshape(extents(scope, found)).permute(dims)


def _permuted(read: Read, value: Tensor, order: tuple[str | None, ...], key: int | None = None) -> Tensor:
    """A tensor with its dimensions in the order of the iterators that they are read at.

    Args:
        key: the dimension that stands for None.
    """
    names = [None if at == key else index.iterator for at, index in enumerate(read.index)]
    return value.permute([names.index(name) for name in order])
