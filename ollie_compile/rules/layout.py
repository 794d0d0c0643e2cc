"""Data-layout transformation: a tensor is rearranged before a product reads it (OLLIE, table 2)."""

from collections.abc import Iterator

from ollie_compile.expr import Affine, Input, Read, Scope


def rearrange(scope: Scope, position: int) -> Scope:
    """Read factor `position` through a new tensor that has one dimension for each of its iterators.

    Applied to an activation this is im2col; applied to a weight, a transform done ahead of time.
    """
    read = scope.factors[position]
    used = {name for index in read.index for name in index.iterators()}
    loops = tuple(loop for loop in scope.traversal + scope.summation if loop.name in used)
    moved = Read(Scope(loops, (), (read,)), tuple(Affine.of(loop.name) for loop in loops))
    return scope.with_factor(position, moved)


def layout_transformation(scope: Scope) -> Iterator[Scope]:
    """Every factor of a contraction that reads an input at a compound index."""
    if scope.is_contraction:
        for position, read in enumerate(scope.factors):
            if isinstance(read.tensor, Input) and any(index.compound for index in read.index):
                yield rearrange(scope, position)
