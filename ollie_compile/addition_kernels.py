"""A C++ kernel for selective additions on CPUs: planes are added up row by row, in the first cache.

Written out as aten, every tap is a slice and an addition that Inductor takes long to fuse, and with strides
its kernel reads and writes values that do not lie side by side. Here each phase of a row of the result is a
row of its own, which the taps are added to as vectors.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ollie_compile.transform_kernels import VECTORS, Numbers

_ADDITION = """
#include <algorithm>
#include <vector>
typedef float V8 __attribute__((vector_size(32)));
typedef float V4 __attribute__((vector_size(16)));
template <typename T> static inline int64_t add(float* to, const float* from, int64_t at, int64_t count) {
  const int64_t lanes = sizeof(T) / sizeof(float);
  for (; at + lanes <= count; at += lanes) store<T>(to + at, load<T>(to + at) + load<T>(from + at));
  return at;
}
static inline int64_t quotient(int64_t a, int64_t b) { return a / b - (a % b < 0); }
// Dimensions of x: two before, two of taps, two of positions, the last of which lies side by side.
extern "C" void selective_add(const float* x, float* y, const int64_t* extent, const int64_t* along,
                              const int64_t* size, const int64_t* stride, const int64_t* offset,
                              const int64_t* step, int64_t threads) {
  const int64_t all = extent[0] * extent[1] * size[0];
  #pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t item = 0; item < all; item++) {
    static thread_local std::vector<float> phases;
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
      float* to = out;
      if (stride[1] > 1) {
        phases.resize(std::max<size_t>(phases.size(), count));
        to = phases.data();
      }
      std::fill(to, to + count, 0.0f);
      for (int64_t a = tap, at = row; a < extent[2]; a += stride[0], at += step[0]) {
        if (at < 0 || at >= extent[4]) continue;
        int64_t shift = start;
        for (int64_t b = phase; b < extent[3]; b += stride[1], shift += step[1]) {
          const int64_t low = std::max<int64_t>(0, -shift), high = std::min(count, extent[5] - shift);
          const float* const from = plane + a * along[2] + b * along[3] + at * along[4] + shift;
          int64_t i = low;
          i = add<V>(to, from, i, high);
          if (sizeof(V) > sizeof(V8)) i = add<V8>(to, from, i, high);
          i = add<V4>(to, from, i, high);
          add<float>(to, from, i, high);
        }
      }
      if (stride[1] > 1) for (int64_t i = 0; i < count; i++) out[first + i * stride[1]] = to[i];
    }
  }
}
"""


@functools.lru_cache(maxsize=1)
def _library() -> Any:
    from torch._inductor.codecache import CppCodeCache

    return CppCodeCache.load(VECTORS + _ADDITION, needs_vec_isa=True)


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
    numbers = [(ctypes.c_int64 * len(each))(*each) for each in (extent, along, size, stride, offset, step)]
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
