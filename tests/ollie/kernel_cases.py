"""The kernels of eOperators against torch, on any device; run as a script, under Triton's interpreter."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F


@contextmanager
def threads_set(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOLERANCES = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def additions() -> Iterator[tuple[tuple[int, ...], tuple[list[int], ...]]]:
    """Shapes [batch, channels, taps, taps, length, length] with size, stride, offset and step."""
    yield (1, 2, 3, 3, 7, 5), ([7, 5], [1, 1], [-1, -1], [1, 1])  # OffsetAdd of a 3x3
    yield (1, 1, 1, 5, 3, 9), ([3, 9], [1, 1], [0, 4], [1, -2])  # dilated, taps reversed
    yield (1, 1, 4, 9, 5, 3), ([9, 7], [2, 2], [1, 4], [-1, -1])  # selective, 4x9 of stride 2
    yield (1, 2, 5, 1, 4, 1), ([13, 1], [3, 1], [-2, 0], [-1, 1])  # a stride that does not divide the taps
    yield (16, 1, 1, 3, 1, 5), ([1, 5], [1, 1], [0, -1], [1, 1])
    yield (2, 1, 2, 5, 3, 47), ([4, 93], [1, 2], [0, 2], [1, -1])  # rows longer than the widest vectors


def by_fold(x: Tensor, size: list[int], stride: list[int], offset: list[int], step: list[int]) -> Tensor:
    """The same by torch's fold over a margin, from which the result is cut."""
    batch, channels, t1, t2, l1, l2 = x.shape
    flips = [at + 2 for at in (0, 1) if step[at] > 0]
    start = [o + s * (t - 1) if s > 0 else o for o, s, t in zip(offset, step, (t1, t2), strict=True)]
    columns = x.flip(flips).reshape(batch, channels * t1 * t2, l1 * l2).double()
    full = [
        s * (n - 1) + abs(d) * (t - 1) + 1
        for s, n, d, t in zip(stride, (l1, l2), step, (t1, t2), strict=True)
    ]
    total = F.fold(columns, full, (t1, t2), dilation=[abs(d) for d in step], stride=stride)
    margin = max(*full, *size) + 16
    total = F.pad(total, [margin] * 4)
    begin = [margin + first for first in start]
    return total[:, :, begin[0] : begin[0] + size[0], begin[1] : begin[1] + size[1]].to(x.dtype)


def bands() -> Iterator[tuple[int, int, int, int, int, int, int]]:
    """Batch, length, keys, features, places, dilation, offset."""
    yield 1, 37, 37, 20, 7, 1, -3
    yield 1, 11, 13, 33, 4, 3, -6
    yield 1, 5, 3, 3, 40, 1, 1
    yield 16, 3, 3, 5, 2, 1, -1


def dense(length: int, keys: int, places: int, dilation: int, offset: int) -> Tensor:
    """[length, places, keys]: 1 where a row's place is a key."""
    one = torch.zeros(length, places, keys)
    for m, w in itertools.product(range(length), range(places)):
        key = m + dilation * w + offset
        if 0 <= key < keys:
            one[m, w, key] = 1
    return one


def check(kernels, device: str) -> None:
    """Compare a module's functions with torch, in all dtypes, with rows and columns swapped in memory."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int, dtype: torch.dtype) -> Tensor:
        swapped = torch.randn(*shape[:-2], shape[-1], shape[-2], generator=generator).to(device, dtype)
        return swapped.transpose(-1, -2)

    def equal(got: Tensor, want: Callable[[], Tensor], dtype: torch.dtype) -> None:
        assert got.dtype == dtype
        assert got.is_contiguous()
        error = (got.double() - want().double()).abs().max() / want().double().abs().max().clamp_min(1)
        assert error < TOLERANCES[dtype], f"{dtype}: {error}"

    for dtype in DTYPES:
        for shape, arguments in additions():
            x = random(*shape, dtype=dtype)
            for laid in (x, x.contiguous(), x.transpose(0, 3).contiguous().transpose(0, 3)):
                equal(kernels.selective_add(laid, *arguments), lambda: by_fold(x, *arguments), dtype)  # noqa: B023
        for batch, length, keys, features, places, dilation, offset in bands():
            a, b = random(batch, length, features, dtype=dtype), random(batch, keys, features, dtype=dtype)
            band = dense(length, keys, places, dilation, offset).to(device).double()
            got = kernels.banded_scores(a, b, places, dilation, offset)
            equal(got, lambda: torch.einsum("nmk,mwj,njk->nmw", a.double(), band, b.double()), dtype)  # noqa: B023
            w = random(batch, length, places, dtype=dtype)
            got = kernels.banded_values(w, b, dilation, offset)
            equal(got, lambda: torch.einsum("nmw,mwj,njk->nmk", w.double(), band, b.double()), dtype)  # noqa: B023
    empty = kernels.selective_add(
        torch.zeros(0, 2, 3, 3, 4, 4, device=device), [4, 4], [1, 1], [0, 0], [1, 1]
    )
    assert empty.shape == (0, 2, 4, 4)


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported
    from ollie_compile.kernels import triton_kernels

    check(triton_kernels, "cpu")
    zeros = torch.zeros(1, 2, 3, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"got torch.float64"):
        triton_kernels.banded_values(zeros, zeros, 1, 0)
