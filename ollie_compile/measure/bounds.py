"""Cost of a program: measured products plus an analytic bound for the rest (OLLIE, section 5.3).

The bound ranks candidates and prunes those that cannot win; what survives is compiled and measured.
"""

from __future__ import annotations

import math

import torch

from ollie_compile.expr import Scope
from ollie_compile.lower.lowering import Program
from ollie_compile.measure.profile import Profile
from ollie_compile.measure.timing import least_seconds
from ollie_compile.targets.matmul import timed_product
from ollie_compile.targets.target import Timed


def library_seconds(timed: Timed, dtype: torch.dtype, device: torch.device, profile: Profile) -> float:
    """Measured seconds of library calls, the fastest of them."""

    def measure() -> float:
        return min(least_seconds(call) for call in timed.calls(dtype, device))

    return profile.seconds(device, f"{timed.name} {dtype}", measure)


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
    product = library_seconds(timed_product(1, size, size, size), dtype, device, profile)
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
    costs = [one.target.cost(one.match, one.scope, program.layout) for one in program.computed]
    elements = sum(cost.elements for cost in costs)
    total = elements * dtype.itemsize / bytes_per_second(dtype, device, profile)
    total += sum(cost.multiplications for cost in costs) / rate
    if total > limit:
        return total
    for cost in costs:
        if cost.timed is not None:
            total -= cost.multiplications / rate
            total += library_seconds(cost.timed, dtype, device, profile)
    return total


def largest_elements(scope: Scope) -> int:
    """Elements of the largest tensor that computing `scope` makes."""
    return max(math.prod(inner.shape) for inner in scope.scopes())
