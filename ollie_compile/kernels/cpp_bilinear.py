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

from ollie_compile.compat import load_cpp
from ollie_compile.kernels.arguments import Form, Matrices, Numbers, check_bilinear
from ollie_compile.kernels.cpp_transform import VECTORS, int64s, tile_source

PANEL = 16  # features that lie side by side in packed weights
CACHED = 1 << 17  # elements of transformed data that a block of tiles keeps in a core's second cache
MOST = 96  # tiles of a block
ROWS = 6  # tiles that one step of the products computes at once, where the features are many

_BILINEAR = """
#include <cstdlib>
#include <cstring>
#ifdef __AVX512F__
constexpr int64_t PANELS = 4;
#else
constexpr int64_t PANELS = 1;
#endif
constexpr int64_t PANEL = 16, MOST = 96, LANES = sizeof(V) / sizeof(float), WIDE = PANEL / LANES;
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
// As many rows as there are registers for beside the weights.
template <int N> constexpr int most() { return PANELS == 1 ? 6 : N == 1 ? 14 : N == 2 ? 12 : N == 3 ? 8 : 6; }
template <int R, int N>
static int64_t by(int64_t m, const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                  int64_t count, int64_t depth) {
  for (; m + R <= count; m += R) rows<R, N>(a + m * lda, lda, b, ldb, c + m * ldc, ldc, depth);
  return m;
}
template <int N>
static void product(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                    int64_t count, int64_t depth) {
  int64_t m = by<most<N>(), N>(0, a, lda, b, ldb, c, ldc, count, depth);
  m = by<4, N>(m, a, lda, b, ldb, c, ldc, count, depth);
  m = by<2, N>(m, a, lda, b, ldb, c, ldc, count, depth);
  by<1, N>(m, a, lda, b, ldb, c, ldc, count, depth);
}
struct Tile {
  int64_t from, to, read[2], written[2];
};
static inline bool whole(int64_t first, int64_t step, int64_t count, int64_t extent) {
  const int64_t last = first + step * (count - 1);
  return first >= 0 && last >= 0 && first < extent && last < extent;
}
// `reads` and `writes` hold for each matrix: stride, first position, step, extent, positions a tile each.
// The first `apart` dimensions have weights of their own.
extern "C" void bilinear(const float* x, const float* u, float* y, int64_t dims, int64_t apart,
                         const int64_t* tiles, const int64_t* stride, const int64_t* out_stride,
                         const int64_t* reads, const int64_t* writes, int64_t chunks, const int64_t* chunk,
                         int64_t width, int64_t features, int64_t block, int64_t threads) {
  int64_t all = 1, weights = 1;
  for (int64_t d = 0; d < dims; d++) (d < apart ? weights : all) *= tiles[d];
  const int64_t depth = chunks * width, planes = FIRST * SECOND, panels = (features + PANEL - 1) / PANEL;
  const int64_t groups = (panels + PANELS - 1) / PANELS, blocks = (all + block - 1) / block;
  const int64_t items = weights * blocks, wanted = (threads + items - 1) / items;
  const int64_t splits = wanted < groups ? wanted : groups;
  // Planes do not begin a multiple of 4096 bytes apart, where their values would meet in the first cache.
  const int64_t plane = block * depth + PANEL, found = block * PANELS * PANEL + PANEL;
  const int64_t inside[2] = {SECOND * plane, plane}, outside[2] = {SECOND * found, found};
  const int64_t *const read[2] = {reads, reads + 4 + dims}, *const write[2] = {writes, writes + 4 + dims};
  const int64_t step[2] = {read[0][0], MATRICES > 1 ? read[1][0] : 0};
  const int64_t row[2] = {write[0][0], MATRICES > 1 ? write[1][0] : 0};
  const int64_t edge_step[2] = {COLUMNS1 * width, width};
  const int64_t edge_row[2] = {ROWS1 * PANELS * PANEL, PANELS * PANEL};
  const int64_t edges = COLUMNS0 * COLUMNS1 * width + ROWS0 * ROWS1 * PANELS * PANEL;
  #pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < items * splits; item++) {
    static thread_local Scratch scratch;
    float* const v = scratch.of(planes * (plane + found) + edges);
    float *const m = v + planes * plane, *const edge = m + planes * found;
    const int64_t begin = item / splits % blocks * block, part = item % splits;
    const int64_t own = item / splits / blocks;
    const float* const w = u + own * planes * panels * depth * PANEL;
    const int64_t count = all - begin < block ? all - begin : block;
    Tile at[MOST];
    for (int64_t t = 0; t < count; t++) {
      Tile& tile = at[t];
      tile.from = tile.to = 0;
      for (int k = 0; k < MATRICES; k++) {
        tile.read[k] = read[k][1];
        tile.written[k] = write[k][1];
      }
      int64_t rest = own * all + begin + t;
      for (int64_t d = dims - 1; d >= 0; d--) {
        const int64_t place = rest % tiles[d];
        rest /= tiles[d];
        tile.from += place * stride[d];
        tile.to += place * out_stride[d];
        for (int k = 0; k < MATRICES; k++) {
          tile.read[k] += place * read[k][4 + d];
          tile.written[k] += place * write[k][4 + d];
        }
      }
      bool plain = whole(tile.read[0], read[0][2], COLUMNS0, read[0][3]);
      if (MATRICES > 1) plain = plain && whole(tile.read[1], read[1][2], COLUMNS1, read[1][3]);
      for (int64_t each = 0; each < chunks; each++) {
        const float* in = x + tile.from + chunk[each];
        float* const out = v + t * depth + each * width;
        if (!plain) {  // what lies outside is 0
          for (int64_t a = 0; a < COLUMNS0; a++)
            for (int64_t b = 0; b < COLUMNS1; b++) {
              bool held = whole(tile.read[0] + a * read[0][2], 0, 1, read[0][3]);
              if (MATRICES > 1) held = held && whole(tile.read[1] + b * read[1][2], 0, 1, read[1][3]);
              float* const to = edge + a * edge_step[0] + b * edge_step[1];
              if (held) memcpy(to, in + a * step[0] + b * step[1], width * sizeof(float));
              else memset(to, 0, width * sizeof(float));
            }
          in = edge;
        }
        const int64_t* const by = plain ? step : edge_step;
        int64_t c = 0;
        for (; c + LANES <= width; c += LANES) forward<V>(in + c, by, out + c, inside);
        for (; c < width; c++) forward<float>(in + c, by, out + c, inside);
      }
    }
    for (int64_t group = groups * part / splits; group < groups * (part + 1) / splits; group++) {
      const int64_t panel = group * PANELS, left = panels - panel < PANELS ? panels - panel : PANELS;
      for (int64_t p = 0; p < planes; p++) {
        const float* const a = v + p * plane;
        const float* const b = w + (p * panels + panel) * depth * PANEL;
        float* const c = m + p * found;
        switch (left) {
          case 4: product<4>(a, depth, b, depth * PANEL, c, PANELS * PANEL, count, depth); break;
          case 3: product<3>(a, depth, b, depth * PANEL, c, PANELS * PANEL, count, depth); break;
          case 2: product<2>(a, depth, b, depth * PANEL, c, PANELS * PANEL, count, depth); break;
          case 1: product<1>(a, depth, b, depth * PANEL, c, PANELS * PANEL, count, depth); break;
        }
      }
      const int64_t last = features - panel * PANEL;
      const int64_t some = last < PANELS * PANEL ? last : PANELS * PANEL;
      float* const result = edge + COLUMNS0 * COLUMNS1 * width;
      for (int64_t t = 0; t < count; t++) {
        const Tile& tile = at[t];
        bool plain = whole(tile.written[0], 1, ROWS0, write[0][3]);
        if (MATRICES > 1) plain = plain && whole(tile.written[1], 1, ROWS1, write[1][3]);
        const float* const in = m + t * PANELS * PANEL;
        float* const to = y + tile.to + panel * PANEL;
        float* const out = plain ? to : result;
        const int64_t* const by = plain ? row : edge_row;
        int64_t f = 0;
        for (; f + LANES <= some; f += LANES) backward<V>(in + f, outside, out + f, by);
        for (; f < some; f++) backward<float>(in + f, outside, out + f, by);
        if (plain) continue;
        for (int64_t a = 0; a < ROWS0; a++)
          for (int64_t b = 0; b < ROWS1; b++) {
            bool held = whole(tile.written[0] + a, 0, 1, write[0][3]);
            if (MATRICES > 1) held = held && whole(tile.written[1] + b, 0, 1, write[1][3]);
            if (held) memcpy(to + a * row[0] + b * row[1], result + a * edge_row[0] + b * edge_row[1],
                             some * sizeof(float));
          }
      }
    }
  }
}
"""


def packed(weight: Tensor) -> Tensor:
    """Weights in the order in which the kernel reads them.

    Args:
        weight: [apart, planes, contracted, features].

    Returns:
        [apart, planes, panels, contracted, PANEL], zeros beyond the features.
    """
    padded = functional.pad(weight, (0, -weight.shape[-1] % PANEL))
    return padded.unflatten(-1, (-1, PANEL)).transpose(2, 3).contiguous()


@functools.lru_cache(maxsize=64)
def _library(data: Matrices, result: Matrices) -> Any:
    one = ((1.0,),)  # in the place of a second matrix
    (first, second), (row, other) = (*data, one)[:2], (*result, one)[:2]
    sizes = {
        "MATRICES": len(data),
        "FIRST": len(first),
        "SECOND": len(second),
        "COLUMNS0": len(first[0]),
        "COLUMNS1": len(second[0]),
        "ROWS0": len(row),
        "ROWS1": len(other),
    }
    known = f"constexpr int64_t {', '.join(f'{name} = {size}' for name, size in sizes.items())};\n"
    tiles = tile_source("forward", data) + tile_source("backward", result)
    return load_cpp(VECTORS + tiles + known + _BILINEAR)


def matrices(text: str) -> tuple[Matrices, Matrices]:
    """Those of the data and of the result, from JSON.

    Raises:
        ValueError: the text does not hold two lists of matrices.
    """
    try:
        data, result = (
            tuple(tuple(tuple(map(float, row)) for row in matrix) for matrix in side)
            for side in json.loads(text)
        )
    except (TypeError, ValueError, RecursionError):
        raise ValueError(
            "torch.ops.ollie.bilinear: `matrices` must be those of the data and of the result as JSON, "
            f"got {text[:40]!r}: write [[A, B], [C, D]]."
        ) from None
    return data, result


@functools.lru_cache(maxsize=4096)
def check(form: Form, elements: int, weight: Numbers, size: Numbers) -> None:
    """Whether the kernel reads and writes inside of its tensors only; as `arguments.check_bilinear`."""
    data, result = matrices(form.text)
    check_bilinear(form, data, result, elements, weight, size, PANEL)


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
def _prepared(form: Form, threads: int) -> Callable[[int, int, int], object]:
    """The kernel with its arguments but for the addresses of the data, of the weights and of the result."""
    apart, tiles, stride, out_stride, _, reads, writes, channels, channel_stride, features, text = form
    data, result = matrices(text)
    chunk = [
        sum(place * step for place, step in zip(at, channel_stride, strict=False))
        for at in itertools.product(*map(range, channels[:-1]))
    ]
    planes = math.prod(len(matrix) for matrix in data)

    arguments = (
        ctypes.c_int64(len(tiles)),
        ctypes.c_int64(apart),
        *map(int64s, (tiles, stride, out_stride, reads, writes)),
        ctypes.c_int64(len(chunk)),
        int64s(chunk),
        ctypes.c_int64(channels[-1]),
        ctypes.c_int64(features),
        ctypes.c_int64(_block(math.prod(tiles[apart:]), planes, math.prod(channels), features)),
        ctypes.c_int64(threads),
    )
    kernel = _library(data, result).bilinear
    address = ctypes.c_void_p
    return lambda x, u, y: kernel(address(x), address(u), address(y), *arguments)


def bilinear(x: Tensor, weight: Tensor, size: Sequence[int], form: Form) -> Tensor:
    """`kernels.bilinear` for contiguous float32 tensors of a CPU and what `check` has let pass."""
    assert x.is_contiguous()
    assert weight.is_contiguous()
    out = x.new_empty(size)
    if out.numel():
        call = _prepared(form, torch.get_num_threads())
        call(x.data_ptr() + x.element_size() * form.offset, weight.data_ptr(), out.data_ptr())
    return out


def reference(x: Tensor, weight: Tensor, size: Sequence[int], form: Form) -> Tensor:
    """The same of any dtype and device, by torch."""
    apart, tiles, stride, out_stride, offset, reads, writes, channels, channel_stride, features, text = form
    data, result = (
        [torch.tensor(one, dtype=x.dtype, device=x.device) for one in side] for side in matrices(text)
    )

    def places(
        strides: Sequence[int], windows: Sequence[int], within: Sequence[int]
    ) -> tuple[Tensor, Tensor]:
        """Where values lie over [*tiles, *within], and whether they are there."""
        each = 4 + len(tiles)
        extents = [*tiles, *within]
        grid = [
            torch.arange(extent, device=x.device).view(-1, *[1] * (len(extents) - at - 1))
            for at, extent in enumerate(extents)
        ]
        where = sum(step * at for step, at in zip(strides, grid, strict=False))
        held = torch.ones(extents, dtype=torch.bool, device=x.device)
        for number in range(len(within)):
            own_stride, first, step, extent, *by = windows[number * each : (number + 1) * each]
            inside = grid[len(tiles) + number]
            position = first + step * inside + sum(b * at for b, at in zip(by, grid, strict=False))
            held &= (position >= 0) & (position < extent)
            where = where + own_stride * inside
        return torch.as_tensor(where, device=x.device).expand(extents), held

    where, held = places(stride, reads, [matrix.shape[1] for matrix in data])
    along = torch.zeros((), dtype=torch.int64, device=x.device)
    for count, step in zip(channels, channel_stride, strict=True):
        along = along.unsqueeze(-1) + torch.arange(count, device=x.device) * step
    index = (where + offset).masked_fill(~held, 0).unsqueeze(-1)
    index = torch.where(held.unsqueeze(-1), index + along.flatten(), 0)
    taken = x.flatten()[index] * held.unsqueeze(-1)  # [*tiles, *columns, channels]
    weights = math.prod(tiles[:apart])
    taken = taken.reshape(-1, *taken.shape[len(tiles) :])  # one tile where there is no loop over tiles
    for matrix in data:  # each takes the first of the columns and leaves its rows as the last
        taken = torch.tensordot(taken, matrix, ([1], [1]))
    planes = taken.flatten(2).unflatten(0, (weights, -1))
    plain = weight.transpose(2, 3).flatten(3)[..., :features]
    found = torch.einsum("atcp,apcf->atfp", planes, plain).flatten(0, 1)
    found = found.unflatten(2, [len(matrix) for matrix in data])
    for matrix in result:
        found = torch.tensordot(found, matrix, ([2], [1]))  # [tiles, features, *rows]
    where, held = places(out_stride, writes, [len(matrix) for matrix in result])
    out = x.new_zeros(math.prod(size))
    index = where[held].unsqueeze(-1) + torch.arange(features, device=x.device)
    out[index] = found.movedim(1, -1).reshape(*held.shape, features)[held]
    return out.view(*size)
