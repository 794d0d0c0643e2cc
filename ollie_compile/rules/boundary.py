"""Boundaries: where expressions are 0, and iterations left out for it (OLLIE, table 2)."""

from collections.abc import Iterator

from ollie_compile.expr import ELEMENTWISE, Affine, Loop, Ranges, Read, Scope

UNBOUNDED = 2**60


def boundary_tightening(scope: Scope) -> Iterator[Scope]:
    """Narrow every range to where no factor is read outside its box; outside, the product is 0.

    The result reads the narrowed scope over the old box, for the whole expression must keep its shape.
    """
    if scope.is_view or scope.function != "*":
        return
    within = {name: list(bounds) for name, bounds in scope.ranges.items()}
    for read in scope.factors:
        for index, box in zip(read.index, read.tensor.box, strict=True):
            name = index.iterator
            if name is not None:
                least, most = _inside(index, name, box)
                bounds = within[name]
                bounds[0], bounds[1] = max(bounds[0], least), min(bounds[1], most + 1)
    # A range with nothing in it would be a tensor of no size: leave the zeros to be computed.
    loops = {name: Loop(name, low, high) for name, (low, high) in within.items() if low < high}
    traversal = tuple(loops.get(loop.name, loop) for loop in scope.traversal)
    summation = tuple(loops.get(loop.name, loop) for loop in scope.summation)
    if (traversal, summation) != (scope.traversal, scope.summation):
        inner = Scope(traversal, summation, scope.factors)
        yield Scope(scope.traversal, (), (Read(inner, tuple(Affine.of(loop.name) for loop in traversal)),))


def vanishes(read: Read, ranges: Ranges, name: str, low: int = -UNBOUNDED, high: int = UNBOUNDED) -> bool:
    """Whether `read` is provably 0 wherever the iterator `name` is outside [low, high).

    It is where an index then leaves its tensor's box, or where the expression that is read is itself 0.

    Args:
        ranges: of the iterators that the read uses.
    """
    return _vanishes(read, {**ranges, name: (-UNBOUNDED, UNBOUNDED)}, name, (low, high), "'")


def _vanishes(read: Read, ranges: Ranges, name: str, within: tuple[int, int], mark: str) -> bool:
    for index, box in zip(read.index, read.tensor.box, strict=True):
        if index.iterator == name:
            least, most = _inside(index, name, box)
            if within[0] <= least and most < within[1]:
                return True
    inner = read.tensor
    if not isinstance(inner, Scope):
        return False
    # Summed iterators are marked by their depth, for an inner scope may use a name of an outer one.
    values = dict(zip((loop.name for loop in inner.traversal), read.index, strict=True))
    values |= {loop.name: Affine.of(mark + loop.name) for loop in inner.summation}
    ranges = {**ranges, **{mark + loop.name: (loop.low, loop.high) for loop in inner.summation}}
    factors = inner.map_index(lambda index: index.substitute(values, ranges))
    zeros = (_vanishes(factor, ranges, name, within, mark + "'") for factor in factors)
    if inner.function == "*":
        return any(zeros)
    return (inner.function == "+" or ELEMENTWISE[inner.function].keeps_zero) and all(zeros)


def _inside(index: Affine, name: str, box: tuple[int, int]) -> tuple[int, int]:
    """The smallest and largest value of `name` at which index = step * name + const is inside `box`."""
    step = index.coefficient(name)
    bounds = (box[0] - index.const, box[1] - 1 - index.const)
    least, most = bounds if step > 0 else (-bounds[1], -bounds[0])
    return -(-least // abs(step)), most // abs(step)
