"""Lowering: a derived expression becomes plain aten calls.

Matched scopes become matrix products. Every other scope is an eOperator (OLLIE, section 4.4): its few
summed taps are written out as sums of pads, slices and views, which Inductor makes into one kernel.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ollie_compile.expr import ELEMENTWISE, Affine, Read, Scope
from ollie_compile.kernels import cpp_bilinear, library
from ollie_compile.targets import bilinear, transforms
from ollie_compile.targets.bilinear import Bilinear, match_bilinear
from ollie_compile.targets.convolutions import (
    ConvolutionCall,
    ConvolutionMatch,
    data_order,
    match_convolution,
    output_order,
)
from ollie_compile.targets.eoperators import Banded, SelectiveAdd, match_banded, match_selective_add
from ollie_compile.targets.matmul import match_matmul
from ollie_compile.targets.transforms import Transform, is_transform, match_transform, start, strides
from ollie_compile.targets.views import Box, Window, padded

Layout = Literal["rows", "columns", "batched", "convolution", "channels last"]
"""How contractions are written: products as rows A @ B; as columns B^T @ A^T; batched like columns, one
product for each value of the first row iterator, which keeps a batch of images apart. The other two call
the library's convolution for what is one, on contiguous or channels-last data, and products as rows."""

CONVOLVED = ("convolution", "channels last")

Kernels = Literal["aten", "fold", "triton", "cpp"]
"""How eOperators are written: as plain aten; selective additions as torch's `fold`; these and banded products
by the Triton kernels of `kernels`, which are for CUDA; or selective additions and constant matrices by its
C++ kernels, for CPUs."""


@dataclass(frozen=True)
class Program:
    """An expression and the layout of its products: one way to compute it.

    Called with a tensor for each input and constant, it gives a tensor of the scope's shape.
    """

    scope: Scope
    layout: Layout
    kernels: Kernels = "aten"

    def constants(self, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
        """The constants of the expression by name."""
        return {
            name: torch.tensor(list(map(float, constant.values)), dtype=dtype, device=device).view(
                constant.shape
            )
            for name, constant in self.scope.constants().items()
        }

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        return _Lowering(inputs, self).scope(self.scope)


def is_batched(scope: Scope) -> bool:
    """Whether it is a product that the layout "batched" writes differently from "columns"."""
    match = match_matmul(scope)
    low, high = scope.ranges[match.rows[0]] if match is not None and len(match.rows) > 1 else (0, 1)
    return match is not None and not match.batch and high - low > 1


@dataclass(frozen=True, slots=True)
class Product:
    """A matrix product as it is called: [apart, left, contracted] @ [apart, contracted, right]."""

    apart: tuple[str, ...]
    left: tuple[str, ...]
    right: tuple[str, ...]
    contracted: tuple[str, ...]
    swapped: bool  # whether the second factor of the scope is on the left
    shared: bool  # whether the left operand is the same for every `apart`

    @classmethod
    def of(cls, scope: Scope, layout: Layout) -> Product | None:
        """The product that `scope` is written as, or None where it is no matrix product."""
        match = match_matmul(scope)
        if match is None:
            return None
        if layout in ("rows", *CONVOLVED):
            return cls(match.batch, match.rows, match.columns, match.contracted, False, False)
        if layout == "batched" and is_batched(scope):
            return cls(match.rows[:1], match.columns, match.rows[1:], match.contracted, True, True)
        return cls(match.batch, match.columns, match.rows, match.contracted, True, False)

    def shape(self, scope: Scope) -> tuple[int, int, int, int]:
        """Extents of (apart, left, contracted, right)."""
        groups = (self.apart, self.left, self.contracted, self.right)
        apart, left, contracted, right = (math.prod(extents(scope, group)) for group in groups)
        return apart, left, contracted, right


def operator_of(scope: Scope, layout: Layout) -> Product | ConvolutionMatch | None:
    """The library operator that computes `scope` in a layout, or None where it is an eOperator."""
    product = Product.of(scope, layout)
    if product is None and layout in CONVOLVED:
        return match_convolution(scope)
    return product


def extents(scope: Scope, names: Sequence[str]) -> list[int]:
    return [scope.ranges[name][1] - scope.ranges[name][0] for name in names]


def _combined(function: str, values: list[Tensor]) -> Tensor:
    if function in "*+":
        return functools.reduce(torch.mul if function == "*" else torch.add, values)
    return ELEMENTWISE[function].torch(*values)


class _Lowering:
    def __init__(self, inputs: Mapping[str, Tensor], program: Program) -> None:
        self.inputs, self.layout, self.kernels = inputs, program.layout, program.kernels
        self.done: dict[Scope, Tensor] = {}

    def scope(self, scope: Scope) -> Tensor:
        """The value on the scope's box, dimensions in the order of its traversal."""
        if scope not in self.done:
            self.done[scope] = self._value(scope)
        return self.done[scope]

    def _value(self, scope: Scope) -> Tensor:
        operator = operator_of(scope, self.layout)
        if isinstance(operator, Product):
            return self._product(scope, operator)
        if operator is not None:
            return self._convolution(scope, operator)
        if self.kernels == "triton" and (banded := match_banded(scope)):
            return self._banded(scope, banded)
        add = match_selective_add(scope) if self.kernels != "aten" else None
        if add is not None and (self.kernels != "fold" or add.folds):
            return self._selective_add(scope, add)
        if self.kernels == "cpp" and (whole := match_bilinear(scope)):
            return self._bilinear(whole)
        if self.kernels == "cpp" and (transform := match_transform(scope)):
            return self._matrices(transform)
        return self._transform(scope) if is_transform(scope) else self._eoperator(scope)

    def _tensor(self, read: Read) -> Tensor:
        tensor = read.tensor
        return self.scope(tensor) if isinstance(tensor, Scope) else self.inputs[tensor.name]

    def _window(self, read: Read, scope: Scope) -> Window:
        return Window.of(read.index, read.tensor.box, self._tensor(read), scope.ranges)

    def _transform(self, scope: Scope) -> Tensor:
        read = transforms.data(scope)
        (summed,) = scope.summation
        # In the order of the traversal, so that the additions run along contiguous values.
        rank = {loop.name: place for place, loop in enumerate(scope.traversal)}
        order = sorted(
            range(len(read.index)),
            key=lambda at: max((rank.get(name, -1) for name in read.index[at].iterators()), default=-1),
        )
        value = self._tensor(read).permute(order).contiguous()
        index, box = [read.index[at] for at in order], tuple(read.tensor.box[at] for at in order)
        window = Window.of(index, box, value, scope.ranges)
        matrix = self.inputs[transforms.matrix(scope).name]
        return transforms.apply(scope, matrix, lambda value, loops: window.at({summed.name: value}, loops))

    def _matrices(self, call: Transform) -> Tensor:

        value, index, box = self._contiguous(call)
        names = [loop.name for loop in call.loops]
        result = library.transform(
            value,
            [loop.extent for loop in call.loops],
            [strides(index, value.stride(), name) for name in names],
            start(index, value.stride(), box, {name: low for name, (low, _) in call.ranges.items()}),
            [names.index(one.row) for one in call.matrices],
            [strides(index, value.stride(), one.column) for one in call.matrices],
            [float(number) for one in call.matrices for number in one.constant.values],
            [one.constant.shape[1] for one in call.matrices],
        )
        for part in call.joined:
            at = names.index(part.whole)
            result = result.flatten(at, at + 1).narrow(at, part.start, part.size)
            names[at : at + 2] = [part.name]
        return result

    def _contiguous(
        self, call: Transform, kept: Collection[int | None] = ()
    ) -> tuple[Tensor, tuple[Affine, ...], Box]:
        """What a transform reads, contiguous along its last loop, with its index and box.

        It is padded to all that is read, but for the dimensions `kept`.
        """
        last, read = call.loops[-1].name, call.read
        places = sorted(range(len(read.index)), key=lambda at: last in read.index[at].iterators())
        index, box = tuple(read.index[at] for at in places), tuple(read.tensor.box[at] for at in places)
        bounds = [
            (low, high - 1) if place in kept else at.bounds(call.ranges)
            for place, at, (low, high) in zip(places, index, box, strict=True)
        ]
        value, box = padded(self._tensor(read).permute(places), box, bounds)
        return value.contiguous(), index, box

    def _bilinear(self, call: Bilinear) -> Tensor:
        value, index, box = self._contiguous(call.data, bilinear.windows(call))
        contracted = tuple(name for name, _ in call.contracted)
        groups = (call.apart, call.products, contracted, call.features)
        weight = self._operand(call.weight, call.product, groups)
        return library.bilinear(
            value,
            cpp_bilinear.packed(weight),
            **bilinear.arguments(call, index, box, value.stride()),
        )

    def _convolution(self, scope: Scope, match: ConvolutionMatch) -> Tensor:
        read, other = scope.factors[match.data], scope.factors[1 - match.data]
        call = ConvolutionCall.of(scope, match)
        x = self._tensor(read)
        for place in set(range(x.dim())) - set(match.places):
            first, stop = scope.ranges[read.index[place].iterator or ""]
            x = x.narrow(place, first - read.tensor.box[place][0], stop - first)
        x = x.permute(data_order(read, match)).reshape(call.unpadded_shape)
        loops = {loop.name: loop for loop in scope.traversal + scope.summation}
        names = (*match.groups, *match.outputs, *match.channels, *match.taps)
        weight = self._window(other, scope).at({}, [loops[name] for name in names]).reshape(call.weight_shape)
        if self.layout == "channels last" and x.dim() > 3:
            layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
        order = output_order(match)
        value = call(x, weight).reshape(extents(scope, order))
        return value.permute([order.index(loop.name) for loop in scope.traversal])

    def _eoperator(self, scope: Scope) -> Tensor:
        windows = [self._window(read, scope) for read in scope.factors]
        total: Tensor | None = None
        for taps in itertools.product(*(range(loop.low, loop.high) for loop in scope.summation)):
            at = {loop.name: tap for loop, tap in zip(scope.summation, taps, strict=True)}
            views = [window.at(at, scope.traversal) for window in windows]
            term = _combined(scope.function, views)
            total = term if total is None else total + term
        assert total is not None, "a summation has at least one tap"
        return total.expand(scope.shape)

    def _selective_add(self, scope: Scope, add: SelectiveAdd) -> Tensor:

        names = [name for name, _ in add.plain]
        taken = [*(place for _, place in add.plain), *(o.tap for o in add.overlaps)]
        value = self._tensor(add.read).permute([*taken, *(o.position for o in add.overlaps)])
        dims = len(add.overlaps)
        taps, lengths = value.shape[-2 * dims : -dims], value.shape[-dims:]
        last = extents(scope, names[-1:])
        lead = [math.prod(extents(scope, names[:-1])), *(last or [1])]
        sizes = extents(scope, [overlap.out for overlap in add.overlaps])
        stride, offset, step = (
            [getattr(o, key) for o in add.overlaps] for key in ("stride", "offset", "step")
        )
        if self.kernels == "fold":
            total = library.folded(value.reshape(*lead, *taps, *lengths), sizes, stride, offset, step)
        else:
            # One dimension is two, the first with one tap and one position.
            one = [1] * (2 - dims)
            value = value.reshape(*lead, *one, *taps, *one, *lengths)
            total = library.selective_add(
                value, [*one, *sizes], [*one, *stride], [*(0 for _ in one), *offset], [*one, *step]
            )
        found = [*names, *(overlap.out for overlap in add.overlaps)]
        order = [found.index(loop.name) for loop in scope.traversal if loop.name in found]
        return total.reshape(extents(scope, found)).permute(order).reshape(scope.shape)

    def _banded(self, scope: Scope, banded: Banded) -> Tensor:
        of_a, of_b = scope.factors[banded.first], scope.factors[1 - banded.first]
        names = [index.iterator for index in of_a.index]
        summed, kept = banded.feature, banded.place
        if not banded.scores:
            summed, kept = kept, summed
        a = self._tensor(of_a).permute([names.index(name) for name in (*banded.batch, banded.row, summed)])
        names = [None if at == banded.key else index.iterator for at, index in enumerate(of_b.index)]
        b = self._tensor(of_b).permute([names.index(name) for name in (*banded.batch, None, banded.feature)])
        batch = math.prod(extents(scope, banded.batch))
        a, b = (x.reshape(batch, *x.shape[-2:]) for x in (a, b))
        if banded.scores:
            (places,) = extents(scope, (banded.place,))
            value = library.banded_scores(a, b, places, banded.dilation, banded.offset)
        else:
            value = library.banded_values(a, b, banded.dilation, banded.offset)
        found = (*banded.batch, banded.row, kept)
        return value.reshape(extents(scope, found)).permute(
            [found.index(loop.name) for loop in scope.traversal]
        )

    def _product(self, scope: Scope, product: Product) -> Tensor:
        left, right = reversed(scope.factors) if product.swapped else scope.factors
        apart, rows, columns = product.apart, product.left, product.right
        first = self._operand(left, scope, (() if product.shared else apart, rows, product.contracted))
        second = self._operand(right, scope, (apart, product.contracted, columns))
        if apart:
            value = torch.bmm(first.expand(len(second), -1, -1), second)
        else:
            value = torch.mm(first[0], second[0])
        order = (*apart, *rows, *columns)
        return value.view(extents(scope, order)).permute([order.index(loop.name) for loop in scope.traversal])

    def _operand(self, read: Read, scope: Scope, groups: Sequence[tuple[str, ...]]) -> Tensor:
        """A factor with one dimension for each group of iterators."""
        loops = {loop.name: loop for loop in scope.traversal + scope.summation}
        value = self._window(read, scope).at({}, [loops[name] for group in groups for name in group])
        return value.reshape([math.prod(extents(scope, group)) for group in groups])
