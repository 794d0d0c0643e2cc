"""One C++ kernel for a bilinear form: matrices, products between them, matrices again, tile by tile.

Apart, the three write what they give into memory and read it again, which is larger than the tensors around
them. Here a block of tiles goes through all three while it lies in the cache, and the products run on weights
that were packed ahead. The kernel is written out for its matrices and takes any sizes and strides.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ollie_compile.transform_kernels import VECTORS, Numbers, tile_source

PANEL = 16  # features that lie side by side in packed weights
CACHED = 1 << 17  # elements of transformed data that a block of tiles keeps in a core's second cache
MOST = 96  # tiles of a block
ROWS = 6  # tiles that one step of the products computes at once

_BILINEAR = """
#include <cstdlib>
#ifdef __AVX512F__
enum { PANELS = 4 };
#else
enum { PANELS = 1 };
#endif
enum { PANEL = 16, ROWS = 6, MOST = 96, LANES = sizeof(V) / sizeof(float), WIDE = PANEL / LANES };
struct Scratch {
  float* data = nullptr;
  int64_t size = 0;
  float* of(int64_t wanted) {
    if (wanted > size) {
      free(data);
      data = static_cast<float*>(aligned_alloc(64, (wanted * sizeof(float) + 63) / 64 * 64));
      size = wanted;
    }
    return data;
  }
  ~Scratch() { free(data); }
};
template <int R, int N>
static inline void rows(const float* __restrict a, int64_t lda, const float* __restrict b, int64_t ldb,
                        float* __restrict c, int64_t ldc, int64_t depth) {
  V sum[R][N * WIDE];
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N * WIDE; n++) sum[r][n] = V{};
  for (int64_t k = 0; k < depth; k++) {
    V w[N * WIDE];
    for (int n = 0; n < N * WIDE; n++) w[n] = load<V>(b + n / WIDE * ldb + k * PANEL + n % WIDE * LANES);
    for (int r = 0; r < R; r++) {
      const V x = V{} + a[r * lda + k];
      for (int n = 0; n < N * WIDE; n++) sum[r][n] += x * w[n];
    }
  }
  for (int r = 0; r < R; r++)
    for (int n = 0; n < N * WIDE; n++) store<V>(c + r * ldc + n * LANES, sum[r][n]);
}
template <int N>
static void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                    int64_t count, int64_t depth) {
  int64_t m = 0;
  for (; m + ROWS <= count; m += ROWS) rows<ROWS, N>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, depth);
  a += m * lda;
  c += m * ldc;
  switch (count - m) {
    case 5: return rows<5, N>(a, lda, b, ldb, c, ldc, depth);
    case 4: return rows<4, N>(a, lda, b, ldb, c, ldc, depth);
    case 3: return rows<3, N>(a, lda, b, ldb, c, ldc, depth);
    case 2: return rows<2, N>(a, lda, b, ldb, c, ldc, depth);
    case 1: return rows<1, N>(a, lda, b, ldb, c, ldc, depth);
  }
}
extern "C" void bilinear(const float* x, const float* u, float* y, int64_t dims, const int64_t* size,
                         const int64_t* stride, const int64_t* out_stride, const int64_t* step,
                         const int64_t* row, int64_t chunks, const int64_t* chunk, int64_t width,
                         int64_t features, int64_t first, int64_t second, int64_t block,
                         int64_t threads) {
  int64_t tiles = 1;
  for (int64_t d = 0; d < dims; d++) tiles *= size[d];
  const int64_t depth = chunks * width, planes = first * second, panels = (features + PANEL - 1) / PANEL;
  const int64_t groups = (panels + PANELS - 1) / PANELS, blocks = (tiles + block - 1) / block;
  const int64_t wanted = (threads + blocks - 1) / blocks, splits = wanted < groups ? wanted : groups;
  // Planes do not begin a multiple of 4096 bytes apart, where their values would meet in the first cache.
  const int64_t plane = block * depth + PANEL, found = block * PANELS * PANEL + PANEL;
  const int64_t inside[2] = {second * plane, plane}, outside[2] = {second * found, found};
  #pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < blocks * splits; item++) {
    static thread_local Scratch scratch;
    float* const v = scratch.of(planes * (plane + found));
    float* const m = v + planes * plane;
    const int64_t begin = item / splits * block, part = item % splits;
    const int64_t count = tiles - begin < block ? tiles - begin : block;
    float* to[MOST];
    for (int64_t t = 0; t < count; t++) {
      const float* from = x;
      to[t] = y;
      int64_t rest = begin + t;
      for (int64_t d = dims - 1; d >= 0; d--) {
        const int64_t place = rest % size[d];
        rest /= size[d];
        from += place * stride[d];
        to[t] += place * out_stride[d];
      }
      for (int64_t each = 0; each < chunks; each++) {
        const float* const in = from + chunk[each];
        float* const out = v + t * depth + each * width;
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) forward<V>(in + c, step, out + c, inside);
        for (; c < width; c++) forward<float>(in + c, step, out + c, inside);
      }
    }
    for (int64_t group = groups * part / splits; group < groups * (part + 1) / splits; group++) {
      const int64_t panel = group * PANELS, left = panels - panel < PANELS ? panels - panel : PANELS;
      for (int64_t p = 0; p < planes; p++) {
        const float* const a = v + p * plane;
        const float* const b = u + (p * panels + panel) * depth * PANEL;
        float* const c = m + p * found;
        switch (left) {
          case 4: product<4>(a, depth, b, depth * PANEL, c, PANELS * PANEL, count, depth); break;
          case 3: product<3>(a, depth, b, depth * PANEL, c, PANELS * PANEL, count, depth); break;
          case 2: product<2>(a, depth, b, depth * PANEL, c, PANELS * PANEL, count, depth); break;
          case 1: product<1>(a, depth, b, depth * PANEL, c, PANELS * PANEL, count, depth); break;
        }
      }
      const int64_t all = features - panel * PANEL;
      const int64_t some = all < PANELS * PANEL ? all : PANELS * PANEL;
      for (int64_t t = 0; t < count; t++) {
        const float* const in = m + t * PANELS * PANEL;
        float* const out = to[t] + panel * PANEL;
        int64_t f = 0;
        for (; f + LANES <= some; f += LANES) backward<V>(in + f, outside, out + f, row);
        for (; f < some; f++) backward<float>(in + f, outside, out + f, row);
      }
    }
  }
}
"""

Matrices = tuple[tuple[tuple[float, ...], ...], ...]


def packed(weight: Tensor) -> Tensor:
    """Weights in the order in which the kernel reads them.

    Args:
        weight: [planes, contracted, features].

    Returns:
        [planes, panels, contracted, PANEL], zeros beyond the features.
    """
    planes, contracted, features = weight.shape
    padded = functional.pad(weight, (0, -features % PANEL))
    return padded.view(planes, contracted, -1, PANEL).transpose(1, 2).contiguous()


@functools.lru_cache(maxsize=64)
def _library(data: Matrices, result: Matrices) -> Any:
    from torch._inductor.codecache import CppCodeCache

    tiles = tile_source("forward", data) + tile_source("backward", result)
    return CppCodeCache.load(VECTORS + tiles + _BILINEAR, needs_vec_isa=True)


def matrices(text: str) -> tuple[Matrices, Matrices]:
    """Those of the data and of the result, from JSON."""
    data, result = (tuple(tuple(map(tuple, matrix)) for matrix in side) for side in json.loads(text))
    return data, result


def _block(tiles: int, planes: int, contracted: int, features: int) -> int:
    """How many tiles go through the kernel together: those with which least is read from the last cache.

    Each block reads all weights, and its transformed data once for 64 features where they are too large.
    """

    def moved(block: int) -> int:
        blocks, data = -(-tiles // block), block * planes * contracted
        again = -(-features // 64) * data if data > CACHED else 0
        return blocks * (planes * contracted * features + again)

    return min(range(ROWS, min(MOST, tiles + ROWS), ROWS), key=moved)


@functools.lru_cache(maxsize=4096)
def _prepared(
    size: Numbers,
    stride: Numbers,
    places: Numbers,
    steps: Numbers,
    features: int,
    channels: Numbers,
    channel_stride: Numbers,
    text: str,
    threads: int,
) -> Callable[[int, int, int], object]:
    """The kernel with its arguments but for the addresses of the data, of the weights and of the result."""
    data, result = matrices(text)
    loops = [at for at in range(len(size) - features) if at not in places]
    out_stride = [math.prod(size[at + 1 :]) for at in range(len(size))]
    two = [0] * (2 - len(places))
    first, second = (*(len(matrix) for matrix in data), 1)[:2]
    chunk = [
        sum(place * step for place, step in zip(at, channel_stride, strict=False))
        for at in itertools.product(*map(range, channels[:-1]))
    ]
    tiles = math.prod(size[at] for at in loops)
    columns = math.prod(size[len(size) - features :])

    def numbers(given: Sequence[int]) -> Any:
        return (ctypes.c_int64 * len(given))(*given)

    arguments = (
        ctypes.c_int64(len(loops)),
        numbers([size[at] for at in loops]),
        numbers([stride[at] for at in loops]),
        numbers([out_stride[at] for at in loops]),
        numbers([*steps, *two]),
        numbers([*(out_stride[at] for at in places), *two]),
        ctypes.c_int64(len(chunk)),
        numbers(chunk),
        ctypes.c_int64(channels[-1]),
        ctypes.c_int64(columns),
        ctypes.c_int64(first),
        ctypes.c_int64(second),
        ctypes.c_int64(_block(tiles, first * second, math.prod(channels), columns)),
        ctypes.c_int64(threads),
    )
    kernel = _library(data, result).bilinear
    address = ctypes.c_void_p
    return lambda x, u, y: kernel(address(x), address(u), address(y), *arguments)


def bilinear(
    x: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int,
    places: Sequence[int],
    steps: Sequence[int],
    features: int,
    channels: Sequence[int],
    channel_stride: Sequence[int],
    text: str,
) -> Tensor:
    """`kernels.bilinear` for contiguous float32 tensors of a CPU."""
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert channel_stride[-1] == 1
    out = x.new_empty(size)
    if out.numel():
        call = _prepared(
            tuple(size),
            tuple(stride),
            tuple(places),
            tuple(steps),
            features,
            tuple(channels),
            tuple(channel_stride),
            text,
            torch.get_num_threads(),
        )
        call(x.data_ptr() + x.element_size() * offset, weight.data_ptr(), out.data_ptr())
    return out


def reference(
    x: Tensor,
    weight: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int,
    places: Sequence[int],
    steps: Sequence[int],
    features: int,
    channels: Sequence[int],
    channel_stride: Sequence[int],
    text: str,
) -> Tensor:
    """The same of any dtype and device, by torch."""
    data, result = (
        [torch.tensor(one, dtype=x.dtype, device=x.device) for one in side] for side in matrices(text)
    )
    loops = [at for at in range(len(size) - features) if at not in places]
    at = torch.full((), offset, device=x.device)
    columns = [matrix.shape[1] for matrix in data]
    for count, step in (
        *zip(columns, steps, strict=True),
        *((size[loop], stride[loop]) for loop in loops),
        *zip(channels, channel_stride, strict=True),
    ):
        at = at.unsqueeze(-1) + torch.arange(count, device=x.device) * step
    taken = x.flatten()[at].flatten(len(data) + len(loops))
    for matrix in data:  # each takes the first dimension and leaves its rows as the last
        taken = torch.tensordot(taken, matrix, ([0], [1]))
    tiles = [size[loop] for loop in loops]
    plain = weight.transpose(1, 2).flatten(2)[..., : math.prod(size[len(size) - features :])]
    products = torch.einsum("tcp,pcf->ptf", taken.reshape(math.prod(tiles), -1, len(plain)), plain)
    found = products.unflatten(0, [len(matrix) for matrix in data])
    for matrix in result:
        found = torch.tensordot(found, matrix, ([0], [1]))
    rows = [len(matrix) for matrix in result]
    found = found.reshape(*tiles, *size[len(size) - features :], *rows)
    trailing = range(len(size) - features, len(size))
    order = [*loops, *trailing, *places]
    return found.permute([order.index(at) for at in range(len(size))]).contiguous()
