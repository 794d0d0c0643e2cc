"""Cost of a program: measured products plus an analytic bound for the rest (OLLIE, section 5.3).

The bound ranks candidates and prunes those that cannot win; what survives is compiled and measured.
"""

from __future__ import annotations

import math

import torch

from ollie_compile.expr import Scope
from ollie_compile.kernels import library
from ollie_compile.lower.lowering import Product, Program, operator_of
from ollie_compile.measure.profile import Profile
from ollie_compile.measure.timing import least_seconds, median_seconds
from ollie_compile.targets.bilinear import match_bilinear
from ollie_compile.targets.convolutions import ConvolutionCall
from ollie_compile.targets.transforms import is_transform, row_loop


def product_seconds(
    apart: int,
    left: int,
    contracted: int,
    right: int,
    shared: bool,
    dtype: torch.dtype,
    device: torch.device,
    profile: Profile,
) -> float:
    """Measured time of a [apart, left, contracted] @ [apart, contracted, right] product, by the faster
    library."""

    def measure() -> float:
        first = torch.zeros(1 if shared else apart, left, contracted, dtype=dtype, device=device)
        second = torch.zeros(apart, contracted, right, dtype=dtype, device=device)
        if apart > 1:
            return median_seconds(lambda: torch.bmm(first.expand(apart, -1, -1), second))
        seconds = median_seconds(lambda: torch.mm(first[0], second[0]))
        if library.has_onednn() and library.has_libraries(first):
            other = median_seconds(lambda: library.product(first[0], second[0]))
            seconds = min(seconds, other)
        return seconds

    what = f"product {apart}x{left}x{contracted}x{right}{' shared' if shared else ''} {dtype}"
    return profile.seconds(device, what, measure)


def convolution_seconds(
    call: ConvolutionCall, channels_last: bool, dtype: torch.dtype, device: torch.device, profile: Profile
) -> float:
    """Measured time of a library convolution, its padding included."""

    def measure() -> float:
        x = torch.zeros(call.unpadded_shape, dtype=dtype, device=device)
        weight = torch.zeros(call.weight_shape, dtype=dtype, device=device)
        if channels_last and x.dim() > 3:
            layout = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
            x, weight = x.contiguous(memory_format=layout), weight.contiguous(memory_format=layout)
        return median_seconds(lambda: call(x, weight))

    return profile.seconds(device, f"{call} {channels_last} {dtype}", measure)


def bytes_per_second(dtype: torch.dtype, device: torch.device, profile: Profile) -> float:
    """Measured traffic of an elementwise kernel whose tensors fit a cache."""
    count = 1 << 16

    def measure() -> float:
        x = torch.zeros(count, dtype=dtype, device=device)
        out = torch.empty_like(x)
        return least_seconds(lambda: torch.add(x, x, out=out))

    return 3 * count * dtype.itemsize / profile.seconds(device, f"addition of {count} {dtype}", measure)


def products_per_second(dtype: torch.dtype, device: torch.device, profile: Profile) -> float:
    """Measured multiplications of a matrix product or a convolution that fit a cache, whichever is faster."""
    size, channels, side = 256, 64, 28
    image = torch.zeros(1, channels, side, side, dtype=dtype, device=device)
    weight = torch.zeros(channels, channels, 3, 3, dtype=dtype, device=device)
    image, weight = (t.contiguous(memory_format=torch.channels_last) for t in (image, weight))
    seconds = profile.seconds(
        device,
        f"convolution of {channels}x{side}x{side} {dtype}",
        lambda: least_seconds(lambda: torch.conv2d(image, weight, padding=1)),
    )
    product = product_seconds(1, size, size, size, False, dtype, device, profile)
    return max(size**3 / product, (channels * 3 * side) ** 2 / seconds)


def bound_seconds(
    program: Program, dtype: torch.dtype, device: torch.device, profile: Profile, *, limit: float = math.inf
) -> float:
    """Time of the program's operators, and of moving each eOperator's reads and result once.

    Args:
        limit: seconds above which no library call is measured: its multiplications at the device's best
            speed are enough then.
    """
    rate = products_per_second(dtype, device, profile)
    moved, calls = 0, []
    ideal = 0.0
    left, seen = [program.scope], set[Scope]()
    while left:
        scope = left.pop()
        if scope in seen:
            continue
        seen.add(scope)
        operator = operator_of(scope, program.layout)
        whole = match_bilinear(scope) if program.kernels == "cpp" else None
        below = [*scope.below()]
        if whole is not None:
            read = [whole.data.read.tensor, whole.weight.tensor]
            below = [tensor for tensor in read if isinstance(tensor, Scope)]
            ideal += _multiplications(whole.product) / rate
            moved += sum(math.prod(tensor.shape) for tensor in (scope, *read))
        elif operator is not None:
            ideal += _multiplications(scope) / rate
            calls.append((scope, operator))
        elif not scope.is_view:
            moved += _moved(scope)
        left += below
    moved_s = moved * dtype.itemsize / bytes_per_second(dtype, device, profile)
    if ideal + moved_s > limit:
        return ideal + moved_s
    total = ideal + moved_s
    for scope, operator in calls:
        total -= _multiplications(scope) / rate
        if isinstance(operator, Product):
            total += product_seconds(*operator.shape(scope), operator.shared, dtype, device, profile)
        else:
            call = ConvolutionCall.of(scope, operator)
            total += convolution_seconds(call, program.layout == "channels last", dtype, device, profile)
    return total


def _multiplications(scope: Scope) -> int:
    return math.prod(loop.extent for loop in scope.traversal + scope.summation)


def largest_elements(scope: Scope) -> int:
    """Elements of the largest tensor that computing `scope` makes."""
    return max(math.prod(inner.shape) for inner in scope.scopes())


def _moved(scope: Scope) -> int:
    """Elements that an eOperator loads and stores."""
    size, taps = math.prod(scope.shape), math.prod(loop.extent for loop in scope.summation)
    if is_transform(scope):  # each value is loaded once for all rows of the matrix
        return size + size // row_loop(scope).extent * taps
    return size * (taps * len(scope.factors) + 1)
