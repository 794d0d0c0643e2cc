"""Convolutions as a target: the library's, of one to three dimensions, with stride, dilation and groups."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from ollie_compile.expr import Affine, Ranges, Read, Scope
from ollie_compile.targets.target import (
    CONVOLVED,
    Cost,
    Lowering,
    ProductLayout,
    Target,
    Timed,
    extents,
    multiplications,
)
from ollie_compile.targets.views import is_view

MAX_SPATIAL = 3


@dataclass(frozen=True, slots=True)
class Spatial:
    """A dimension of the data read at stride * out + dilation * tap + const; `tap` None is a single tap.

    A negative dilation is a convolution with the taps in reverse order.
    """

    out: str
    tap: str | None
    stride: int
    dilation: int
    const: int


@dataclass(frozen=True, slots=True)
class ConvolutionMatch:
    """O[batch, groups, outputs, out ..] = Sum[channels, tap ..] data * weight.

    Args:
        data: position of the data among the factors.
        places: dimensions of the data that are spatial, in order.
    """

    data: int
    batch: tuple[str, ...]
    groups: tuple[str, ...]
    channels: tuple[str, ...]
    outputs: tuple[str, ...]
    spatial: tuple[Spatial, ...]
    places: tuple[int, ...]

    @property
    def dense(self) -> bool:
        """Whether no stride and no dilation skips values."""
        return all(s.stride == 1 and abs(s.dilation) == 1 for s in self.spatial)

    @property
    def taps(self) -> tuple[str, ...]:
        return tuple(s.tap for s in self.spatial if s.tap is not None)


def match_convolution(scope: Scope) -> ConvolutionMatch | None:
    """The convolution of one to three dimensions that `scope` is, or None."""
    if not scope.is_contraction or len(scope.factors) != 2 or scope.terms() != 2:
        return None
    return _match(scope, 0) or _match(scope, 1)


def _match(scope: Scope, data: int) -> ConvolutionMatch | None:
    read, weight = scope.factors[data], scope.factors[1 - data]
    if not is_view(weight):
        return None
    traversal = [loop.name for loop in scope.traversal]
    summation = {loop.name for loop in scope.summation}
    by_weight = {name for index in weight.index for name in index.iterators()}
    spatial: list[Spatial] = []
    places: list[int] = []
    plain: list[tuple[int, str]] = []
    for place, index in enumerate(read.index):
        if index.iterator is not None and index == Affine.of(index.iterator):
            (low, high), (first, stop) = read.tensor.box[place], scope.ranges[index.iterator]
            if first < low or stop > high:
                return None
            plain.append((place, index.iterator))
        elif index.terms:
            found = _spatial(index, set(traversal) - by_weight, summation & by_weight)
            if found is None:
                return None
            spatial.append(found)
            places.append(place)
        else:
            return None
    names = [name for _, name in plain] + [s.out for s in spatial]
    names += [s.tap for s in spatial if s.tap is not None]
    if not any(s.tap for s in spatial) or len(set(names)) < len(names):
        return None
    if set(names) | by_weight != set(traversal) | summation or not summation <= set(names) & by_weight:
        return None
    channels = tuple(name for _, name in plain if name in summation)
    # An iterator that is traversed after the channels is spatial too, as in a 1 x 7 convolution.
    last = max((place for place, name in plain if name in by_weight), default=-1)
    for place, name in plain:
        if name not in by_weight and place > last and len(spatial) < MAX_SPATIAL:
            spatial.append(Spatial(name, None, 1, 1, 0))
            places.append(place)
    if len(spatial) > MAX_SPATIAL:
        return None
    order = sorted(range(len(places)), key=lambda at: places[at])
    outs = {s.out for s in spatial}
    by_data = set(names)
    return ConvolutionMatch(
        data=data,
        batch=tuple(name for _, name in plain if name not in by_weight and name not in outs),
        groups=tuple(name for name in traversal if name in by_weight and name in by_data),
        channels=channels,
        outputs=tuple(name for name in traversal if name not in by_data),
        spatial=tuple(spatial[at] for at in order),
        places=tuple(places[at] for at in order),
    )


def _spatial(index: Affine, outs: set[str], taps: set[str]) -> Spatial | None:
    parts = {atom: coefficient for atom, coefficient in index.terms if isinstance(atom, str)}
    if len(parts) != len(index.terms) or len(parts) > 2:
        return None
    out = [name for name in parts if name in outs]
    tap = [name for name in parts if name in taps]
    if len(out) != 1 or len(out) + len(tap) != len(parts) or parts[out[0]] < 1:
        return None
    dilation = parts[tap[0]] if tap else 1
    return Spatial(out[0], tap[0] if tap else None, parts[out[0]], dilation, index.const)


@dataclass(frozen=True, slots=True)
class ConvolutionCall:
    """The arguments of the library's convolution, apart from its tensors."""

    input_shape: tuple[int, ...]
    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    pads: tuple[tuple[int, int], ...]  # zeros added (or values cut, where negative) ahead of the call
    flipped: tuple[int, ...]  # dimensions of the weight that are reversed

    @classmethod
    def of(cls, scope: Scope, match: ConvolutionMatch) -> ConvolutionCall:
        ranges = scope.ranges
        read = scope.factors[match.data]
        padding, pads, sizes, kernel = [], [], [], []
        for spatial, place in zip(match.spatial, match.places, strict=True):
            low, high = read.tensor.box[place]
            first, last = read.index[place].bounds(ranges)
            taps = _extent(ranges, spatial.tap)
            out = _extent(ranges, spatial.out)
            before, after = low - first, last + 1 - high
            reach = abs(spatial.dilation) * (taps - 1) + 1
            same = before >= 0 and (high - low + 2 * before - reach) // spatial.stride + 1 == out
            padding.append(before if same else 0)
            pads.append((0, 0) if same else (before, after))
            sizes.append(high - low if same else last + 1 - first)
            kernel.append(taps)
        batch, groups, channels, outputs = (
            math.prod(_extent(ranges, name) for name in names)
            for names in (match.batch, match.groups, match.channels, match.outputs)
        )
        return cls(
            input_shape=(batch, groups * channels, *sizes),
            weight_shape=(groups * outputs, channels, *kernel),
            stride=tuple(s.stride for s in match.spatial),
            padding=tuple(padding),
            dilation=tuple(abs(s.dilation) for s in match.spatial),
            groups=groups,
            pads=tuple(pads),
            flipped=tuple(2 + at for at, s in enumerate(match.spatial) if s.dilation < 0),
        )

    @property
    def unpadded_shape(self) -> tuple[int, ...]:
        """The shape of the data before `pads`."""
        spatial = zip(self.input_shape[2:], self.pads, strict=True)
        return (*self.input_shape[:2], *(size - before - after for size, (before, after) in spatial))

    def __call__(self, x: Tensor, weight: Tensor) -> Tensor:
        """[batch, channels, spatial ..] and [outputs, channels of a group, taps ..] as lifted."""
        if any(pad != (0, 0) for pad in self.pads):
            x = functional.pad(x, [side for pad in reversed(self.pads) for side in pad])
        weight = weight.flip(self.flipped) if self.flipped else weight
        no_output_padding = [0] * len(self.stride)
        return torch.ops.aten.convolution.default(
            x, weight, None, self.stride, self.padding, self.dilation, False, no_output_padding, self.groups
        )


def data_order(read: Read, match: ConvolutionMatch) -> list[int]:
    """Dimensions of the data in the order batch, groups, channels, spatial."""
    where = {index.iterator: place for place, index in enumerate(read.index) if place not in match.places}
    names = (*match.batch, *match.groups, *match.channels)
    return [*(where[name] for name in names), *match.places]


def output_order(match: ConvolutionMatch) -> Sequence[str]:
    """Iterators of the result in the order batch, groups, outputs, spatial."""
    return (*match.batch, *match.groups, *match.outputs, *(s.out for s in match.spatial))


def _extent(ranges: Ranges, name: str | None) -> int:
    return 1 if name is None else ranges[name][1] - ranges[name][0]


class Convolutions(Target[ConvolutionMatch]):
    """The library's convolutions, on contiguous or channels-last data."""

    def match(self, scope: Scope, layout: ProductLayout) -> ConvolutionMatch | None:
        return match_convolution(scope) if layout in CONVOLVED else None

    def call(self, match: ConvolutionMatch, scope: Scope, lowering: Lowering) -> Tensor:
        read, other = scope.factors[match.data], scope.factors[1 - match.data]
        call = ConvolutionCall.of(scope, match)
        x = lowering.value(read)
        for place in set(range(x.dim())) - set(match.places):
            first, stop = scope.ranges[read.index[place].iterator or ""]
            x = x.narrow(place, first - read.tensor.box[place][0], stop - first)
        x = x.permute(data_order(read, match)).reshape(call.unpadded_shape)
        loops = {loop.name: loop for loop in scope.traversal + scope.summation}
        names = (*match.groups, *match.outputs, *match.channels, *match.taps)
        weight = lowering.window(other, scope).at({}, [loops[name] for name in names])
        x, weight = laid_out(lowering.layout, x, weight.reshape(call.weight_shape))
        order = output_order(match)
        value = call(x, weight).reshape(extents(scope, order))
        return value.permute([order.index(loop.name) for loop in scope.traversal])

    def cost(self, match: ConvolutionMatch, scope: Scope, layout: ProductLayout) -> Cost:
        call = ConvolutionCall.of(scope, match)

        def calls(dtype: torch.dtype, device: torch.device) -> Sequence[Callable[[], object]]:
            x = torch.zeros(call.unpadded_shape, dtype=dtype, device=device)
            weight = torch.zeros(call.weight_shape, dtype=dtype, device=device)
            x, weight = laid_out(layout, x, weight)
            return [lambda: call(x, weight)]

        return Cost(multiplications(scope), timed=Timed(f"{call} {layout == 'channels last'}", calls))


def laid_out(layout: ProductLayout, *tensors: Tensor) -> list[Tensor]:
    """Data and weights of images and volumes in the memory format of a layout."""
    if layout != "channels last" or tensors[0].dim() == 3:
        return list(tensors)
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return [tensor.contiguous(memory_format=formats[tensor.dim()]) for tensor in tensors]
