"""Checks of the arguments of the library `ollie`'s operators, before a kernel runs.

The kernels read and write at offsets and strides that the caller gives: a plan file from elsewhere, perhaps,
or a direct call of `torch.ops.ollie`. Each check bounds every position that a kernel may touch, from the
arguments alone; checks of many numbers remember the arguments that they have let pass.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Numbers = tuple[int, ...]
Matrix = tuple[tuple[float, ...], ...]
Matrices = tuple[Matrix, ...]

LARGEST = 2**31  # of a number that steps through a dimension, so that sums of products fit 64 bits
MOST_ROWS = 32  # of a matrix that a kernel is written out for


def check_selective_add(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: Sequence[int], step: Sequence[int]
) -> None:
    """Whether `x` has 6 dimensions and the others are two numbers each.

    The kernels leave out every position that lies outside of `x`.

    Raises:
        ValueError: they are not, a stride is below 1, or a number does not fit 31 bits.
    """
    if x.dim() != 6:
        _must(False, "selective_add", "`x` must have 6 dimensions", x.dim(), "add dimensions of size 1")
    _check_pairs(tuple(size), tuple(stride), tuple(offset), tuple(step))


@functools.lru_cache(maxsize=4096)
def _check_pairs(*pairs: Numbers) -> None:
    for name, pair in zip(("size", "stride", "offset", "step"), pairs, strict=True):
        low = {"size": 0, "stride": 1}.get(name, -LARGEST)
        valid = len(pair) == 2 and all(low <= number < LARGEST for number in pair)
        wanted = f"`{name}` must be two numbers" + (f", {low} or more" if low >= 0 else "")
        _must(valid, "selective_add", wanted, list(pair), "give one for each dimension")


def check_banded(a: Tensor, b: Tensor, dilation: int, *, features: bool) -> None:
    """Whether two tensors are the operands of a banded product.

    Args:
        features: whether the last dimension of both is one, as in `banded_scores`.

    Raises:
        ValueError: they are not, or `dilation` is below 1.
    """
    shapes = list(a.shape), list(b.shape)
    same = a.dim() == b.dim() == 3 and a.shape[0] == b.shape[0] and a.dtype == b.dtype
    same = same and (not features or a.shape[2] == b.shape[2])
    _must(same, "banded product", "`a` and `b` must be [batch, rows, features] alike", shapes, "reshape them")
    _must(0 < dilation < LARGEST, "banded product", "`dilation` must be 1 or more", dilation, "take 1")


def check_product(a: Tensor, b: Tensor, bias: Tensor | None) -> None:
    """Whether a @ b + bias is a product of matrices.

    Raises:
        ValueError: it is not.
    """
    fits = a.dim() == b.dim() == 2 and a.shape[1] == b.shape[0] and a.dtype == b.dtype
    if fits and (bias is None or (bias.dim() == 1 and bias.shape[0] == b.shape[1] and bias.dtype == a.dtype)):
        return
    shapes = [list(tensor.shape) for tensor in (a, b, bias) if tensor is not None]
    wanted = "the operands must be [m, k], [k, n] and a bias [n] of one dtype"
    _must(False, "product", wanted, shapes, "reshape them")


@functools.lru_cache(maxsize=4096)
def check_transform(
    elements: int,
    size: Numbers,
    stride: Numbers,
    offset: int,
    places: Numbers,
    steps: Numbers,
    values: tuple[float, ...],
    columns: Numbers,
) -> None:
    """Whether `kernels.transform` reads only the `elements` of its tensor, and has a value for each entry.

    Raises:
        ValueError: it does not.
    """
    name = "transform"
    _check_sizes(name, size)
    count = len(places)
    valid = len(stride) == len(size) and count in (1, 2) and len(steps) == len(columns) == count
    _must(
        valid,
        name,
        "`stride` must have a number for each dimension, and `places`, `steps` and `columns` one for each of "
        "one or two matrices",
        [len(stride), count, len(steps), len(columns)],
        "give as many",
    )
    last = len(size) - 1
    valid = len(set(places)) == count and all(0 <= place < last for place in places) and stride[last] == 1
    wanted = "`places` must be different dimensions before the last, which must have a stride of 1"
    _must(valid, name, wanted, list(places), "permute the tensor")
    rows = [size[place] for place in places]
    valid = all(0 < n <= MOST_ROWS for n in (*rows, *columns))
    valid = valid and len(values) == sum(map(math.prod, zip(rows, columns, strict=True)))
    valid = valid and all(map(math.isfinite, values))
    wanted = f"`values` must be the finite entries of matrices of 1 to {MOST_ROWS} rows and columns"
    _must(valid, name, wanted, f"{len(values)} of {rows} by {list(columns)}", "give each entry, row by row")
    loops = [(size[at], stride[at]) for at in range(len(size)) if at not in places]
    _check_reach(name, "read", _reach(offset, [*loops, *zip(columns, steps, strict=True)]), elements)


class Form(NamedTuple):
    """The arguments of `kernels.bilinear` but for its tensors and the result's size; `text` is `matrices`."""

    apart: int
    tiles: Numbers
    stride: Numbers
    out_stride: Numbers
    offset: int
    reads: Numbers
    writes: Numbers
    channels: Numbers
    channel_stride: Numbers
    features: int
    text: str


def check_bilinear(
    form: Form, data: Matrices, result: Matrices, elements: int, weight: Numbers, size: Numbers, panel: int
) -> None:
    """Whether `kernels.bilinear` reads only the `elements` of its tensor and weights of the shape `weight`,
    and writes only what has the shape `size`.

    Args:
        data, result: the matrices.
        panel: features that lie side by side in packed weights.

    Raises:
        ValueError: it does not.
    """
    name = "bilinear"
    _check_sizes(name, size)
    _check_sizes(name, (*form.tiles, *form.channels, form.features), least=1)
    _check_counts(form, data, result)
    depth, planes = math.prod(form.channels), math.prod(map(len, data))
    apart, panels = math.prod(form.tiles[: form.apart]), -(-form.features // panel)
    wanted = (apart, planes, panels, depth, panel)
    _must(
        weight == wanted, name, f"`weight` must be packed, of shape {list(wanted)}", list(weight), "pack it"
    )
    windows = _windows(form.reads, len(form.tiles), [len(matrix[0]) for matrix in data])
    start = _reach(form.offset, [*zip(form.channels, form.channel_stride, strict=True)])
    _check_reach(name, "read", _reach_of_windows(start, form.tiles, form.stride, windows), elements)
    windows = _windows(form.writes, len(form.tiles), [len(matrix) for matrix in result])
    steps = [window.step for window in windows]
    _must({*steps} == {1}, name, "`writes` must go by steps of 1", steps, "write neighbouring rows")
    start = _reach(0, [(form.features, 1)])
    written = _reach_of_windows(start, form.tiles, form.out_stride, windows)
    _check_reach(name, "write", written, math.prod(size))


def _check_counts(form: Form, data: Matrices, result: Matrices) -> None:
    """Whether there are as many numbers as dimensions and matrices."""
    dims, count, rows = len(form.tiles), len(data), [*map(len, data)]
    counts = [len(form.stride), len(form.out_stride), len(form.channel_stride)]
    matched = count in (1, 2) and all(map(_is_matrix, (*data, *result)))
    matched = matched and [len(matrix[0]) for matrix in result] == rows
    _must(
        matched,
        "bilinear",
        f"`matrices` must be one or two of the data, of up to {MOST_ROWS} rows and columns of finite values, "
        "and as many of the result, with a column for each row of the data's",
        [rows, [*map(len, result)]],
        "give them in pairs",
    )
    valid = 0 <= form.apart <= dims and counts == [dims, dims, len(form.channels)]
    valid = (
        valid and form.channel_stride[-1] == 1 and len(form.reads) == len(form.writes) == count * (4 + dims)
    )
    _must(
        valid,
        "bilinear",
        f"{dims} tiles and {len(form.channels)} channels must have as many strides, the last of which is 1, "
        f"and {count * (4 + dims)} numbers of `reads` and `writes` each",
        [*counts, len(form.reads), len(form.writes)],
        "give one for each",
    )


class Window(NamedTuple):
    """Where a matrix reads or writes: `taps` positions from `first` on, `step` apart, of `extent` in all.

    In memory a step is `stride` long. Each tile moves the first position by its number in `by`.
    """

    stride: int
    first: int
    step: int
    extent: int
    by: Numbers
    taps: int


def _windows(numbers: Numbers, dims: int, counts: Sequence[int]) -> list[Window]:
    each = 4 + dims
    parts = [numbers[place * each : (place + 1) * each] for place in range(len(counts))]
    return [
        Window(stride, first, step, extent, tuple(by), taps)
        for (stride, first, step, extent, *by), taps in zip(parts, counts, strict=True)
    ]


def _reach_of_windows(
    start: tuple[int, int], tiles: Numbers, stride: Numbers, windows: Sequence[Window]
) -> tuple[int, int] | None:
    """The lowest and highest position of all tiles, where each window leaves out what it does not hold;
    None where nothing is held.

    A position of a window is `first + step * j + by . tile`, and lies `stride * j + strides . tile` away in
    memory. Where `stride` is a whole number of units for each step, the memory is counted by positions, which
    the window bounds, and by how far the tiles move besides.
    """
    low, high = start
    rest = list(stride)
    for window in windows:
        terms = [(window.taps, window.step), *zip(tiles, window.by, strict=True)]
        lowest, highest = _reach(window.first, terms)
        lowest, highest = max(lowest, 0), min(highest, window.extent - 1)
        if lowest > highest:
            return None
        whole = window.step != 0 and window.stride % window.step == 0
        unit = window.stride // window.step if whole else 0
        ends = [(end - window.first) * unit for end in (lowest, highest)]
        besides = [0, (window.taps - 1) * (window.stride - window.step * unit)]
        low, high = low + min(ends) + min(besides), high + max(ends) + max(besides)
        rest = [own - unit * moved for own, moved in zip(rest, window.by, strict=True)]
    least, most = _reach(0, [*zip(tiles, rest, strict=True)])
    return low + least, high + most


def _reach(start: int, loops: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The lowest and highest position of loops of so many steps of some length."""
    ends = [max(count - 1, 0) * step for count, step in loops]
    return start + sum(min(0, end) for end in ends), start + sum(max(0, end) for end in ends)


def _check_sizes(name: str, size: Numbers, least: int = 0) -> None:
    valid = bool(size) and all(least <= number < LARGEST for number in size)
    _must(valid, name, f"sizes must be {least} or more", list(size), "give the size of each dimension")


def _check_reach(name: str, verb: str, reach: tuple[int, int] | None, elements: int) -> None:
    if reach is not None:
        inside = reach[0] >= 0 and reach[1] < elements
        wanted = f"it must {verb} the positions 0 to {elements - 1} of its tensor"
        _must(
            inside,
            name,
            wanted,
            f"{reach[0]} to {reach[1]}",
            "give the strides and the offset of that tensor",
        )


def _is_matrix(matrix: Matrix) -> bool:
    widths = {*map(len, matrix)}
    fits = 0 < len(matrix) <= MOST_ROWS and len(widths) == 1 and 0 < min(widths) <= MOST_ROWS
    return fits and all(math.isfinite(value) for row in matrix for value in row)


def _must(valid: bool, name: str, wanted: str, got: object, way: str) -> None:
    if not valid:
        raise ValueError(f"torch.ops.ollie.{name}: {wanted}, got {got}: {way}.")
