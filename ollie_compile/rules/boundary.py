"""Boundary tightening: iterations that only read zeros are left out (OLLIE, table 2)."""

from collections.abc import Iterator

from ollie_compile.expr import Affine, Loop, Read, Scope


def boundary_tightening(scope: Scope) -> Iterator[Scope]:
    """Narrow every range to where no factor is read outside its box; outside, the product is 0.

    The result reads the narrowed scope over the old box, for the whole expression must keep its shape.
    """
    if scope.is_view or scope.function != "*":
        return
    traversal = tuple(_tightened(scope, loop) for loop in scope.traversal)
    summation = tuple(_tightened(scope, loop) for loop in scope.summation)
    if (traversal, summation) != (scope.traversal, scope.summation):
        inner = Scope(traversal, summation, scope.factors)
        yield Scope(scope.traversal, (), (Read(inner, tuple(Affine.of(loop.name) for loop in traversal)),))


def _tightened(scope: Scope, loop: Loop) -> Loop:
    low, high = loop.low, loop.high
    for read in scope.factors:
        for index, (first, last) in zip(read.index, read.tensor.box, strict=True):
            if index.iterator != loop.name:
                continue
            # first <= step * i + const < last, solved for i in exact integer arithmetic.
            step = index.coefficient(loop.name)
            bounds = (first - index.const, last - 1 - index.const)
            least, most = bounds if step > 0 else (-bounds[1], -bounds[0])
            low = max(low, -(-least // abs(step)))
            high = min(high, most // abs(step) + 1)
    # A range with nothing in it would be a tensor of no size: leave the zeros to be computed.
    return Loop(loop.name, low, high) if low < high else loop
