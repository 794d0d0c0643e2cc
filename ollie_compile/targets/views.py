"""Reads as views: a tensor read at affine indices is a pad followed by slices, windows and permutes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from ollie_compile.expr import Affine, Loop, Quotient, Ranges, Read, Remainder, Scope

Box = tuple[tuple[int, int], ...]


def is_view(read: Read) -> bool:
    """Whether `Window` can take the read: no divisions but whole (quotient, remainder) pairs."""
    _, index, _ = merge_pairs(read.index, read.tensor.box)
    return not any(True for i in index for _ in i.divisions())


def merge_pairs(index: Sequence[Affine], box: Box) -> tuple[list[list[int]], list[Affine], Box]:
    """Join dimensions read at (e // b + c, e % b) into one dimension read at e + b * c.

    Returns:
        the old dimensions that each new one joins, the new index and the new box. The joined
        remainders must have the box [0, b).
    """
    groups: list[list[int]] = []
    merged: list[Affine] = []
    bounds: list[tuple[int, int]] = []
    tails = {}
    for place, expression in enumerate(index):
        atom = expression.terms[0][0] if len(expression.terms) == 1 else None
        if isinstance(atom, Remainder) and expression == Affine.of(atom):
            tails[atom] = place
    joined = set()
    for place, expression in enumerate(index):
        atom = expression.terms[0][0] if len(expression.terms) == 1 else None
        if isinstance(atom, Quotient) and expression.terms[0][1] == 1:
            tail = tails.get(Remainder(atom.of, atom.by))
            if tail is not None and tail not in joined:
                joined.add(tail)
                groups.append([place, tail])
                merged.append(atom.of + expression.const * atom.by)
                bounds.append((box[place][0] * atom.by, box[place][1] * atom.by))
                continue
        groups.append([place])
        merged.append(expression)
        bounds.append(box[place])
    keep = [at for at, group in enumerate(groups) if group[0] not in joined]
    return [groups[at] for at in keep], [merged[at] for at in keep], tuple(bounds[at] for at in keep)


@dataclass
class Window:
    """A tensor with the index it is read at; `value` holds the tensor on `box`."""

    value: Tensor
    index: list[Affine]
    box: Box

    @classmethod
    def of(cls, index: Sequence[Affine], box: Box, value: Tensor, ranges: Ranges) -> Window:
        """`value`, which holds a tensor on `box`, padded so that no index leaves it within `ranges`."""
        value, box = padded(value, box, [i.bounds(ranges) for i in index])
        groups, index, joined = merge_pairs(index, box)
        if len(groups) < value.dim():
            value = value.permute([place for group in groups for place in group])
            value = value.reshape([high - low for low, high in joined])
        return cls(value, list(index), joined)

    def at(self, constants: Mapping[str, int], loops: Sequence[Loop]) -> Tensor:
        """The read over `loops` with the other iterators at `constants`.

        Returns:
            a view with one dimension a loop, of its extent, or 1 where the read does not use it.
        """
        known = {name: Affine(const=value) for name, value in constants.items()}
        extents = {loop.name: (loop.low, loop.high) for loop in loops}
        value = self.value
        names: list[str] = []
        for index, (low, _) in zip(self.index, self.box, strict=True):
            value, taken = _take(value, len(names), index.substitute(known, extents), low, extents)
            names += taken
        while repeated := next((name for name in names if names.count(name) > 1), None):
            first, second = [place for place, name in enumerate(names) if name == repeated][:2]
            value = value.diagonal(0, first, second)
            names = [name for place, name in enumerate(names) if place not in (first, second)] + [repeated]
        used = [loop.name for loop in loops if loop.name in names]
        if used != names:
            value = value.permute([names.index(name) for name in used])
        if len(used) < len(loops):
            sizes = dict(zip(used, value.shape, strict=True))
            value = value.view([sizes.get(loop.name, 1) for loop in loops])
        return value


def padded(value: Tensor, box: Box, bounds: Sequence[tuple[int, int]]) -> tuple[Tensor, Box]:
    """Add zeros so that the box holds every position from first to last (inclusive) of `bounds`."""
    pads = [
        (max(0, low - first), max(0, last + 1 - high))
        for (low, high), (first, last) in zip(box, bounds, strict=True)
    ]
    if any(pad != (0, 0) for pad in pads):
        value = functional.pad(value, [side for pad in reversed(pads) for side in pad])
    return value, tuple((low - a, high + b) for (low, high), (a, b) in zip(box, pads, strict=True))


def _take(value: Tensor, axis: int, index: Affine, low: int, ranges: Ranges) -> tuple[Tensor, list[str]]:
    """Replace dimension `axis`, whose first position is `low`, by one dimension an iterator of `index`."""
    first, last = index.bounds(ranges)
    if not index.terms:
        return value.select(axis, first - low), []
    span = last - first + 1
    if span != value.shape[axis]:
        value = value.narrow(axis, first - low, span)
    names = []
    for name, step in sorted(((str(a), c) for a, c in index.terms), key=lambda term: -abs(term[1])):
        start, stop = ranges[name]
        span -= abs(step) * (stop - 1 - start)  # covered by the iterators after this one
        if span == 1:
            if abs(step) > 1:
                value = value[(slice(None),) * axis + (slice(None, None, abs(step)),)]
        else:
            value = value.unfold(axis, span, abs(step)).movedim(-1, axis + 1)
        if step < 0:
            value = value.flip(axis)
        names.append(name)
        axis += 1
        if span == 1 and len(names) < len(index.terms):
            value = value.unsqueeze(axis)
    return value, names


def whole_iterators(scope: Scope, read: Read, places: Iterable[int]) -> list[str] | None:
    """The iterators that dimensions are read at, or None where one is not read as a whole."""
    names = []
    for place in places:
        name = read.index[place].iterator
        if name is None or read.index[place] != Affine.of(name):
            return None
        if read.tensor.box[place] != scope.ranges[name]:
            return None
        names.append(name)
    return names
