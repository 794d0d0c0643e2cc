"""A C++ kernel for selective additions on CPUs: planes are added up row by row.

Written out as aten, every tap is a slice and an addition that Inductor takes long to fuse, and with strides
its kernel reads and writes values that do not lie side by side. Here each phase of a row of the result is a
row of its own, whose taps are added up in registers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ollie_compile.compat import load_cpp
from ollie_compile.kernels.arguments import Numbers
from ollie_compile.kernels.cpp_transform import VECTORS, int64s

_ADDITION = """
#include <cstring>
#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif
constexpr int64_t LANES = sizeof(V) / sizeof(float), WIDE = 4;
// Those lanes of a vector that are in [low, high), and 0 in the others.
static inline V some(const float* from, int64_t low, int64_t high) {
  if (low <= 0 && high >= LANES) return load<V>(from);
  if (low >= LANES || high <= 0) return V{};
#ifdef __AVX512F__
  const unsigned below = high < LANES ? (1u << high) - 1 : 0xffffu;
  return (V)_mm512_maskz_loadu_ps(low > 0 ? below & ~((1u << low) - 1) : below, from);
#else
  const int32_t first = low > 0 ? low : 0, last = high < LANES ? high : LANES;
#ifdef __AVX2__
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  const __m256i above = _mm256_cmpgt_epi32(lane, _mm256_set1_epi32(first - 1));
  const __m256i below = _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane);
  return (V)_mm256_maskload_ps(from, _mm256_and_si256(above, below));
#else
  V found{};
  for (int32_t lane = first; lane < last; lane++) found[lane] = from[lane];
  return found;
#endif
#endif
}
static inline int64_t quotient(int64_t a, int64_t b) { return a / b - (a % b < 0); }
// Dimensions of x: two before, two of taps, two of positions, the last of which lies side by side.
extern "C" void selective_add(const float* x, float* y, const int64_t* extent, const int64_t* along,
                              const int64_t* size, const int64_t* stride, const int64_t* offset,
                              const int64_t* step, int64_t threads) {
  const int64_t all = extent[0] * extent[1] * size[0];
  #pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < all; item++) {
    float* const out = y + item * size[1];
    const int64_t h = item % size[0] + offset[0], row = quotient(h, stride[0]), tap = h - row * stride[0];
    const int64_t lead = item / size[0];
    const float* const plane = x + lead / extent[1] * along[0] + lead % extent[1] * along[1];
    for (int64_t phase = 0; phase < stride[1]; phase++) {
      // Places of the result with (place + offset) % stride == phase, and the positions of their first tap.
      const int64_t first = ((phase - offset[1]) % stride[1] + stride[1]) % stride[1];
      if (first >= size[1]) continue;
      const int64_t count = (size[1] - first + stride[1] - 1) / stride[1];
      const int64_t start = quotient(first + offset[1], stride[1]);
      for (int64_t begin = 0; begin < count; begin += WIDE * LANES) {
        const int64_t left = count - begin;
        V sum[WIDE] = {};
        for (int64_t a = tap, at = row; a < extent[2]; a += stride[0], at += step[0]) {
          if (at < 0 || at >= extent[4]) continue;
          int64_t position = begin + start;
          for (int64_t b = phase; b < extent[3]; b += stride[1], position += step[1]) {
            const float* const from = plane + a * along[2] + b * along[3] + at * along[4] + position;
            for (int64_t k = 0; k < WIDE; k++) {
              if (k * LANES >= left) break;
              const int64_t reached = position + k * LANES;
              sum[k] += some(from + k * LANES, -reached, extent[5] - reached);
            }
          }
        }
        const int64_t kept = left < WIDE * LANES ? left : WIDE * LANES;
        float found[WIDE * LANES];
        memcpy(found, sum, sizeof(found));
        if (stride[1] == 1) memcpy(out + begin, found, kept * sizeof(float));
        else for (int64_t i = 0; i < kept; i++) out[first + (begin + i) * stride[1]] = found[i];
      }
    }
  }
}
"""


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    return load_cpp(VECTORS + _ADDITION)


@functools.lru_cache(maxsize=4096)
def _prepared(
    extent: Numbers,
    along: Numbers,
    size: Numbers,
    stride: Numbers,
    offset: Numbers,
    step: Numbers,
    threads: int,
) -> Callable[[int, int], object]:
    """The kernel with its arguments but for the addresses of the data and of the result."""
    numbers = [*map(int64s, (extent, along, size, stride, offset, step))]
    kernel, count = _library().selective_add, ctypes.c_int64(threads)
    return lambda data, out: kernel(ctypes.c_void_p(data), ctypes.c_void_p(out), *numbers, count)


def selective_add(
    x: Tensor, size: Sequence[int], stride: Sequence[int], offset: Sequence[int], step: Sequence[int]
) -> Tensor:
    """`kernels.selective_add` for float32 tensors of a CPU."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    out = x.new_empty(*x.shape[:2], *size)
    if out.numel():
        numbers = map(tuple, (x.shape, x.stride(), size, stride, offset, step))
        _prepared(*numbers, torch.get_num_threads())(x.data_ptr(), out.data_ptr())
    return out
