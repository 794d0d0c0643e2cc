"""Operators of the library "ollie" that eOperators may be lowered to, with their references in torch.

On CUDA they run the Triton kernels of `triton_kernels.py`, on a CPU in float32 those in C++; elsewhere the
reference. Their results are contiguous, sums are taken in float32 or wider, and their inputs may have any
strides.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ollie_compile import compat
from ollie_compile.kernels import arguments

# Not a custom_op, whose calls take tens of microseconds.
_library = torch.library.Library("ollie", "FRAGMENT")


def _selective_add(
    x: Tensor, size: list[int], stride: list[int], offset: list[int], step: list[int]
) -> Tensor:
    """Overlapping planes added up: OffsetAdd, and with strides the selective addition of transposed convs.

    With t = stride * r + (h + offset) % stride and l = (h + offset) // stride + step * r in each dimension,
    O[n, f, h1, h2] = Sum[r1, r2] X[n, f, t1, t2, l1, l2], where what lies outside of X is 0.

    Args:
        x: [batch, channels, taps1, taps2, length1, length2], a floating dtype.
        size: of the result's last two dimensions.

    Returns:
        [batch, channels, *size] in the dtype of `x`.
    """
    arguments.check_selective_add(x, size, stride, offset, step)
    if x.device.type == "cuda":
        from ollie_compile.kernels import triton_kernels

        return triton_kernels.selective_add(x, size, stride, offset, step)
    if x.device.type == "cpu" and x.dtype == torch.float32:
        from ollie_compile.kernels import cpp_addition

        return cpp_addition.selective_add(x, size, stride, offset, step)
    batch, channels, *taps, first, second = x.shape
    wide = x if x.dtype == torch.float64 else x.float()
    total = wide.new_zeros(batch, channels, *size)
    for tap1, places1 in _places(taps[0], first, size[0], stride[0], offset[0], step[0], x.device):
        for tap2, places2 in _places(taps[1], second, size[1], stride[1], offset[1], step[1], x.device):
            plane = wide[:, :, tap1, tap2]
            rows = plane.index_select(2, places1[1]).index_select(3, places2[1])
            total[:, :, places1[0][:, None], places2[0]] += rows
    return total.to(x.dtype)


def _places(
    taps: int, length: int, size: int, stride: int, offset: int, step: int, device: torch.device
) -> list[tuple[int, tuple[Tensor, Tensor]]]:
    """For each tap the places of the result that it is added to, and the positions they read."""
    h = torch.arange(size, device=device) + offset
    found = []
    for tap in range(taps):
        position = h // stride + step * (tap // stride)
        valid = (h % stride == tap % stride) & (position >= 0) & (position < length)
        found.append((tap, (h[valid] - offset, position[valid])))
    return found


@torch.library.custom_op("ollie::banded_scores", mutates_args=())
def banded_scores(a: Tensor, b: Tensor, places: int, dilation: int, offset: int) -> Tensor:
    """G2BMM: O[n, m, w] = Sum[k] A[n, m, k] * B[n, m + dilation * w + offset, k], zeros outside of B.

    Args:
        a, b: [batch, length, features] and [batch, keys, features] of one floating dtype.
        places: how many keys each row meets.

    Returns:
        [batch, length, places] in their dtype.
    """
    arguments.check_banded(a, b, dilation, features=True)
    wide = a.dtype if a.dtype == torch.float64 else torch.float32
    window = _window(b.to(wide), a.shape[1], places, dilation, offset)
    return torch.einsum("nmk,nmwk->nmw", a.to(wide), window).to(a.dtype)


@torch.library.custom_op("ollie::banded_values", mutates_args=())
def banded_values(a: Tensor, b: Tensor, dilation: int, offset: int) -> Tensor:
    """GBMM: O[n, m, k] = Sum[w] A[n, m, w] * B[n, m + dilation * w + offset, k], zeros outside of B.

    Args:
        a, b: [batch, length, places] and [batch, keys, features] of one floating dtype.

    Returns:
        [batch, length, features] in their dtype.
    """
    arguments.check_banded(a, b, dilation, features=False)
    wide = a.dtype if a.dtype == torch.float64 else torch.float32
    window = _window(b.to(wide), a.shape[1], a.shape[2], dilation, offset)
    return torch.einsum("nmw,nmwk->nmk", a.to(wide), window).to(a.dtype)


def _window(b: Tensor, length: int, places: int, dilation: int, offset: int) -> Tensor:
    """[batch, length, places, features]: the rows of B that each row meets."""
    reach = length + dilation * (places - 1)
    padded = functional.pad(b, (0, 0, -offset, reach + offset - b.shape[1]))
    return padded.unfold(1, reach - length + 1, 1)[..., ::dilation].transpose(2, 3)


_library.define(
    "selective_add(Tensor x, SymInt[] size, SymInt[] stride, SymInt[] offset, SymInt[] step) -> Tensor"
)
_library.impl("selective_add", _selective_add, "CompositeExplicitAutograd")
selective_add = torch.ops.ollie.selective_add.default


@torch.library.register_fake("ollie::selective_add", lib=_library)
def _(x: Tensor, size: list[int], *_others: object) -> Tensor:
    return x.new_empty(*x.shape[:2], *size)


@banded_scores.register_fake
def _(a: Tensor, b: Tensor, places: int, dilation: int, offset: int) -> Tensor:
    return a.new_empty(*a.shape[:2], places)


@banded_values.register_fake
def _(a: Tensor, b: Tensor, dilation: int, offset: int) -> Tensor:
    return a.new_empty(*a.shape[:2], b.shape[2])


@banded_scores.register_kernel("cuda")
def _(a: Tensor, b: Tensor, places: int, dilation: int, offset: int) -> Tensor:
    from ollie_compile.kernels import triton_kernels

    arguments.check_banded(a, b, dilation, features=True)
    return triton_kernels.banded_scores(a, b, places, dilation, offset)


@banded_values.register_kernel("cuda")
def _(a: Tensor, b: Tensor, dilation: int, offset: int) -> Tensor:
    from ollie_compile.kernels import triton_kernels

    arguments.check_banded(a, b, dilation, features=False)
    return triton_kernels.banded_values(a, b, dilation, offset)


def _transform(
    x: Tensor,
    size: list[int],
    stride: list[int],
    offset: int,
    places: list[int],
    steps: list[int],
    values: list[float],
    columns: list[int],
) -> Tensor:
    """One or two constant matrices applied to strided dimensions of a tensor, windows of it among them.

    O[.., i1, .., i2, ..] = Sum[j1, j2] A[i1, j1] * B[i2, j2] * x[offset + steps . j + stride . loops], where
    where x is read as it lies in memory, and never outside of it.

    Args:
        x: contiguous.
        size: of the result, its last dimension one that x has stride 1 along.
        stride: of x along each dimension of the result, 0 at those of the matrices.
        places: dimensions of the result that are the matrices' rows.
        steps: strides of x along what the matrices sum over.
        values: of the matrices, one behind the other, row by row.
        columns: of each matrix.

    Returns:
        [*size], contiguous, in the dtype of `x`.
    """
    from ollie_compile.kernels import cpp_transform

    x = x.contiguous()
    layout, windows = (tuple(size), tuple(stride), offset), (tuple(places), tuple(steps))
    arguments.check_transform(x.numel(), *layout, *windows, tuple(values), tuple(columns))
    if x.device.type == "cpu" and x.dtype == torch.float32:
        return cpp_transform.transform(x, size, stride, offset, places, steps, values, columns)
    loops = [at for at in range(len(size)) if at not in places]
    at = torch.full((), offset, device=x.device)
    for count, step in (
        *zip(columns, steps, strict=True),
        *((size[place], stride[place]) for place in loops),
    ):
        at = at.unsqueeze(-1) + torch.arange(count, device=x.device) * step
    taken = x.flatten()[at]
    for matrix in cpp_transform.matrices_of(size, places, values, columns):
        # Each takes the first dimension and leaves its rows as the last.
        taken = torch.tensordot(taken, torch.tensor(matrix, dtype=x.dtype, device=x.device), ([0], [1]))
    found = [*loops, *places]
    return taken.permute([found.index(at) for at in range(len(size))]).contiguous()


_library.define(
    "transform(Tensor x, SymInt[] size, SymInt[] stride, SymInt offset, SymInt[] places, SymInt[] steps, "
    "float[] values, SymInt[] columns) -> Tensor"
)
_library.impl("transform", _transform, "CompositeExplicitAutograd")
transform = torch.ops.ollie.transform.default


@torch.library.register_fake("ollie::transform", lib=_library)
def _(x: Tensor, size: list[int], *_others: object) -> Tensor:
    return x.new_empty(size)


def _bilinear(
    x: Tensor,
    weight: Tensor,
    size: list[int],
    apart: int,
    tiles: list[int],
    stride: list[int],
    out_stride: list[int],
    offset: int,
    reads: list[int],
    writes: list[int],
    channels: list[int],
    channel_stride: list[int],
    features: int,
    matrices: str,
) -> Tensor:
    """A bilinear form as a whole: constant matrices, a product for each of their rows, matrices again.

    With V[i1, i2, t, c] = Sum[j1, j2] A[i1, j1] * B[i2, j2] * x[offset + stride . t + steps . j + c],
    P[i1, i2, t, f] = Sum[c] V[i1, i2, t, c] * W[i1, i2, c, f] and
    O[out_stride . t + rows . k + f] = Sum[i1, i2] C[k1, i1] * D[k2, i2] * P[i1, i2, t, f],
    where what lies outside of a window's extent is read as 0 and not written.

    Args:
        x: contiguous.
        weight: W as `cpp_bilinear.packed` gives it.
        size: of the result.
        apart: how many of t's dimensions, the first ones, W has too.
        tiles: extents of t; stride, out_stride: of x and of the result along each.
        reads: for each matrix of the data the stride of x along what it sums over, the position of its first
            value at the first tile, the step and the extent of positions, and how far each of t moves it.
        writes: for each matrix of the result the same along its rows.
        channels, channel_stride: sizes and strides of x along c, the last stride 1.
        features: how many f are, which lie side by side in the result.
        matrices: those of the data and those of the result as JSON, [[A, B], [C, D]] or [[A], [C]].

    Returns:
        [*size], contiguous, in the dtype of `x`.
    """
    from ollie_compile.kernels import cpp_bilinear

    x, weight = x.contiguous(), weight.contiguous()
    plain = x.device.type == "cpu" and x.dtype == torch.float32
    form = arguments.Form(
        apart,
        tuple(tiles),
        tuple(stride),
        tuple(out_stride),
        offset,
        tuple(reads),
        tuple(writes),
        tuple(channels),
        tuple(channel_stride),
        features,
        matrices,
    )
    if (weight.dtype, weight.device) != (x.dtype, x.device):
        given = f"{weight.dtype} on {weight.device}"
        raise ValueError(
            f"torch.ops.ollie.bilinear: `weight` must be {x.dtype} on {x.device}, got {given}: move it there."
        )
    cpp_bilinear.check(form, x.numel(), tuple(weight.shape), tuple(size))
    call = cpp_bilinear.bilinear if plain else cpp_bilinear.reference
    return call(x, weight, size, form)


_library.define(
    "bilinear(Tensor x, Tensor weight, SymInt[] size, int apart, SymInt[] tiles, SymInt[] stride, "
    "SymInt[] out_stride, SymInt offset, SymInt[] reads, SymInt[] writes, SymInt[] channels, "
    "SymInt[] channel_stride, int features, str matrices) -> Tensor"
)
_library.impl("bilinear", _bilinear, "CompositeExplicitAutograd")
bilinear = torch.ops.ollie.bilinear.default


@torch.library.register_fake("ollie::bilinear", lib=_library)
def _(x: Tensor, weight: Tensor, size: list[int], *_others: object) -> Tensor:
    return x.new_empty(size)


def _onednn(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a @ b + bias by oneDNN, in float32 on a CPU; any strides."""
    arguments.check_product(a, b, bias)
    return compat.onednn_product(a, b, bias)


_library.define("product(Tensor a, Tensor b, Tensor? bias=None) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
_library.impl("product", _onednn, "CPU")
product = torch.ops.ollie.product.default


@torch.library.register_fake("ollie::product", lib=_library)
def _(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    return a.new_empty(a.shape[0], b.shape[1])


def has_libraries(value: Any) -> bool:
    """Whether products of a tensor may go to torch's library or to oneDNN."""
    return (
        isinstance(value, Tensor)
        and value.device.type == "cpu"
        and value.dtype == torch.float32
        and all(type(size) is int and size > 0 for size in value.shape)
    )


def folded(x: Tensor, size: list[int], stride: list[int], offset: list[int], step: list[int]) -> Tensor:
    """`selective_add` by torch's fold, of one or two dimensions.

    Args:
        x: [batch, channels, taps .., lengths ..]; `step` is -1 where `stride` is above 1.
    """
    dims = len(size)
    lead, taps, lengths = x.shape[:2], list(x.shape[2 : 2 + dims]), list(x.shape[2 + dims :])
    # fold adds tap t of position l at stride * l + dilation * t; a positive step reverses the taps.
    reversed_dims = [2 + at for at, by in enumerate(step) if by > 0]
    x = x.flip(reversed_dims) if reversed_dims else x
    start = [o + by * (t - 1) if by > 0 else o for o, by, t in zip(offset, step, taps, strict=True)]
    dilation = list(map(abs, step))
    full = [s * (n - 1) + d * (t - 1) + 1 for s, n, d, t in zip(stride, lengths, dilation, taps, strict=True)]
    one = [1] * (2 - dims)
    x = x.reshape(-1, math.prod(taps), math.prod(lengths))
    total = fold(x, [*full, *one], [*taps, *one], [*stride, *one], [*dilation, *one]).reshape(*lead, *full)
    ends = zip(start, full, size, strict=True)
    pads = [(-first, first + wanted - whole) for first, whole, wanted in ends]
    return functional.pad(total, [side for pad in reversed(pads) for side in pad])


@torch.library.custom_op("ollie::fold", mutates_args=())
def fold(x: Tensor, size: list[int], taps: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    """torch.nn.functional.fold without padding, which Inductor takes as it is: it would write out aten's.

    Args:
        x: [batch, channels * taps, positions].

    Returns:
        [batch, channels, *size].
    """
    return functional.fold(x, size, taps, dilation, 0, stride)


@fold.register_fake
def _(x: Tensor, size: list[int], taps: list[int], stride: list[int], dilation: list[int]) -> Tensor:
    return x.new_empty(x.shape[0], x.shape[1] // (taps[0] * taps[1]), *size)
