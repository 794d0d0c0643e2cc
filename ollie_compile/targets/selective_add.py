"""Selective additions as a target: overlapping planes of one tensor added up (OLLIE, section 4.4).

OffsetAdd, which remains of a convolution once its products are one, is such an addition with strides of 1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ollie_compile.expr import Affine, Loop, Quotient, Read, Remainder, Scope
from ollie_compile.kernels import library
from ollie_compile.targets.matmul import is_batched
from ollie_compile.targets.target import Cost, Kernel, Lowering, ProductLayout, extents
from ollie_compile.targets.views import whole_iterators

MAX_OVERLAPS = 2  # spatial dimensions of the kernels, and of torch's fold


@dataclass(frozen=True, slots=True)
class Overlap:
    """One spatial dimension of a selective addition, with its places among the dimensions of the data.

    Counted from 0 in every dimension, the result at h adds, for each r, the data at tap
    `stride * r + (h + offset) % stride` and position `(h + offset) // stride + step * r`.
    """

    out: str
    tap: int
    position: int
    stride: int
    offset: int
    step: int

    @property
    def folds(self) -> bool:
        """Whether each tap and position belongs to one place of the result, as in torch's fold."""
        return self.stride == 1 or self.step == -1


@dataclass(frozen=True, slots=True)
class SelectiveAdd:
    """A sum of overlapping planes of one tensor; with strides of 1 it is the paper's OffsetAdd.

    Args:
        read: the tensor whose planes are added.
        plain: its other dimensions, by the iterators of the result; others of those have one value.
    """

    read: Read
    plain: tuple[tuple[str, int], ...]
    overlaps: tuple[Overlap, ...]

    @property
    def folds(self) -> bool:
        return all(overlap.folds for overlap in self.overlaps)


def match_selective_add(scope: Scope) -> SelectiveAdd | None:
    """The selective addition that a scope computes, itself or by a rearranged read of one, or None."""
    if scope.is_view and isinstance(scope.factors[0].tensor, Scope):
        merged = _merged(scope, scope.factors[0])
        return None if merged is None else _match(merged)
    return _match(scope)


def _merged(scope: Scope, read: Read) -> Scope | None:
    """The scope below, traversed as its reader is; None where it is read outside its box."""
    inner = read.tensor
    assert isinstance(inner, Scope)
    if not inner.summation or {loop.name for loop in inner.summation} & scope.ranges.keys():
        return None
    for (low, high), index in zip(inner.box, read.index, strict=True):
        first, last = index.bounds(scope.ranges)
        if first < low or last >= high:
            return None
    values = {loop.name: index for loop, index in zip(inner.traversal, read.index, strict=True)}
    ranges = {**scope.ranges, **{loop.name: (loop.low, loop.high) for loop in inner.summation}}
    factors = inner.map_index(lambda index: index.substitute(values, ranges))
    return inner.over(traversal=scope.traversal, factors=factors)


def _match(scope: Scope) -> SelectiveAdd | None:
    if scope.function != "*" or len(scope.factors) != 1 or not 1 <= len(scope.summation) <= MAX_OVERLAPS:
        return None
    (read,) = scope.factors
    overlaps = []
    for summed in scope.summation:
        places = [place for place, index in enumerate(read.index) if summed.name in index.iterators()]
        if len(places) != 2:
            return None
        found = _overlap(scope, summed, *places) or _overlap(scope, summed, *places[::-1])
        if found is None:
            return None
        overlaps.append(found)
    taken = {place for overlap in overlaps for place in (overlap.tap, overlap.position)}
    places = [place for place in range(len(read.index)) if place not in taken]
    names = whole_iterators(scope, read, places)
    if names is None:
        return None
    known = [*names, *(overlap.out for overlap in overlaps)]
    left = [loop for loop in scope.traversal if loop.name not in known]
    if len(known) + len(left) != len(scope.traversal) or any(loop.extent > 1 for loop in left):
        return None
    return SelectiveAdd(read, tuple(zip(names, places, strict=True)), tuple(overlaps))


def _overlap(scope: Scope, summed: Loop, tap: int, position: int) -> Overlap | None:
    (read,) = scope.factors
    stride = read.index[tap].coefficient(summed.name)
    step = read.index[position].coefficient(summed.name)
    rest = read.index[tap] - Affine.of(summed.name) * stride
    whole = read.index[position] - Affine.of(summed.name) * step
    rest, whole = _stepped(rest, whole)
    if stride < 1 or step == 0 or len(whole.terms) != 1 or whole.terms[0][1] != 1:
        return None
    atom, first = whole.terms[0][0], whole.const
    if stride == 1:
        out, shift = (atom if isinstance(atom, str) else None), 0
        selected = Affine(const=rest.const)
    elif isinstance(atom, Quotient) and atom.by == stride:
        out, shift = atom.of.iterator, atom.of.const
        selected = Affine.of(Remainder(atom.of, stride)) + rest.const
        if out is None or atom.of.coefficient(out) != 1:
            return None
    else:
        return None
    (tap_low, tap_high), (low, _) = read.tensor.box[tap], read.tensor.box[position]
    aligned = rest == selected and stride * summed.low + rest.const == tap_low
    if out not in {loop.name for loop in scope.traversal} or not aligned:
        return None
    if tap_high - tap_low > stride * summed.extent:
        return None
    start = first + step * summed.low - low
    return Overlap(out, tap, position, stride, scope.ranges[out][0] + shift + stride * start, step)


def _stepped(rest: Affine, whole: Affine) -> tuple[Affine, Affine]:
    """The phases of phase splitting as those of the next place: 1 - h % 2 is (h + 1) % 2, and h // 2 + h % 2
    is (h + 1) // 2."""
    for atom, coefficient in rest.terms:
        if isinstance(atom, Remainder) and atom.by == 2 and coefficient == -1:
            phase, following = Affine.of(atom), atom.of + 1
            if whole - phase - Affine.of(Quotient(atom.of, 2)) == Affine(const=whole.const):
                rest = rest + phase - 1 + Affine.of(Remainder(following, 2))
                whole = Affine.of(Quotient(following, 2)) + whole.const
    return rest, whole


class Addition(Kernel[SelectiveAdd]):
    """A kernel for selective additions; subclasses say which one adds the planes."""

    @abstractmethod
    def add(self, planes: Tensor, lead: Sequence[int], size: Sequence[int], match: SelectiveAdd) -> Tensor:
        """The sum, with the dimensions `lead` and then `size`.

        Args:
            planes: with dimensions that `lead` has the sizes of, then the taps, then the positions.
        """

    def match(self, scope: Scope, layout: ProductLayout) -> SelectiveAdd | None:
        return match_selective_add(scope)

    def call(self, match: SelectiveAdd, scope: Scope, lowering: Lowering) -> Tensor:
        names = [name for name, _ in match.plain]
        order = [*(place for _, place in match.plain), *(overlap.tap for overlap in match.overlaps)]
        order += [overlap.position for overlap in match.overlaps]
        planes = lowering.value(match.read).permute(order)
        lead = [math.prod(extents(scope, names[:-1])), *(extents(scope, names[-1:]) or [1])]
        outs = [overlap.out for overlap in match.overlaps]
        planes = planes.reshape(*lead, *planes.shape[-2 * len(outs) :])
        total = self.add(planes, lead, extents(scope, outs), match)
        found = [*names, *outs]
        dims = [found.index(loop.name) for loop in scope.traversal if loop.name in found]
        return total.reshape(extents(scope, found)).permute(dims).reshape(scope.shape)

    def cost(self, match: SelectiveAdd, scope: Scope, layout: ProductLayout) -> Cost:
        taps = math.prod(
            -(-(high - low) // overlap.stride)
            for overlap in match.overlaps
            for low, high in (match.read.tensor.box[overlap.tap],)
        )
        return Cost(elements=math.prod(scope.shape) * (taps + 1))

    def reads(self, match: SelectiveAdd, scope: Scope) -> Iterable[Scope]:
        return [match.read.tensor] if isinstance(match.read.tensor, Scope) else []


class FoldAdditions(Addition):
    """torch's `fold`, if each tap and position belongs to one value of the result."""

    family, title = "fold", "additions by fold"

    def match(self, scope: Scope, layout: ProductLayout) -> SelectiveAdd | None:
        match = match_selective_add(scope)
        return match if match is not None and match.folds else None

    def add(self, planes: Tensor, lead: Sequence[int], size: Sequence[int], match: SelectiveAdd) -> Tensor:
        return library.folded(planes, list(size), *_steps(match))


class _OwnAddition(Addition):
    """This package's operator for selective additions, at any strides."""

    def add(self, planes: Tensor, lead: Sequence[int], size: Sequence[int], match: SelectiveAdd) -> Tensor:
        # One dimension is two, the first with one tap and one position.
        dims = len(match.overlaps)
        one = [1] * (2 - dims)
        taps, lengths = planes.shape[2 : 2 + dims], planes.shape[2 + dims :]
        stride, offset, step = _steps(match)
        return library.selective_add(
            planes.reshape(*lead, *one, *taps, *one, *lengths),
            [*one, *size],
            [*one, *stride],
            [*(0 for _ in one), *offset],
            [*one, *step],
        )


class TritonAdditions(_OwnAddition):
    """The Triton kernel."""

    family, title, devices = "triton", "additions in Triton", ("cuda",)


class CppAdditions(_OwnAddition):
    """The C++ kernel, which adds along positions."""

    family, title, devices = "cpp", "additions in C++", ("cpu",)

    def layouts(self, offered: Sequence[ProductLayout], scope: Scope) -> Sequence[ProductLayout]:
        """Those in which positions lie side by side."""
        layouts = [_ALONG_POSITIONS.get(layout, layout) for layout in offered]
        if layouts == ["columns"] and any(map(is_batched, scope.scopes())):
            layouts.append("batched")
        return layouts

    def native(self, match: SelectiveAdd) -> frozenset[str]:
        return frozenset(["selective additions"])


_ALONG_POSITIONS: dict[ProductLayout, ProductLayout] = {"rows": "columns", "channels last": "convolution"}


def _steps(match: SelectiveAdd) -> tuple[list[int], list[int], list[int]]:
    """Stride, offset and step in each spatial dimension, as `library.selective_add` takes them."""
    overlaps = match.overlaps
    return [o.stride for o in overlaps], [o.offset for o in overlaps], [o.step for o in overlaps]
