"""C++ kernels of constant matrices: one or two dimensions of a tensor through small matrices at once.

Inductor's kernels for them are slow to make and to run, since it does not keep a tile in registers. The
kernels here are written out for their matrices, run along contiguous values and take any sizes and strides,
so that one serves all shapes; Inductor's own cache compiles and keeps them.
"""

from __future__ import annotations

import ctypes
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ollie_compile.compat import load_cpp
from ollie_compile.kernels.arguments import Matrices, Numbers

VECTORS = """
#include <cstdint>
// Inductor's own kernels round each product; here a product and the sum it goes into are one instruction.
#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")
#endif
#ifdef __AVX512F__
typedef float V __attribute__((vector_size(64)));
#else
typedef float V __attribute__((vector_size(32)));
#endif
template <typename T> static inline T load(const float* from) {
  T x;
  __builtin_memcpy(&x, from, sizeof(T));
  return x;
}
template <typename T> static inline void store(float* to, T x) { __builtin_memcpy(to, &x, sizeof(T)); }
"""

_TRANSFORM = """
extern "C" void transform(const float* in, float* out, int64_t dims, const int64_t* size,
                          const int64_t* stride, const int64_t* out_stride, const int64_t* step,
                          const int64_t* row, int64_t threads) {
  int64_t total = 1;
  for (int64_t d = 0; d + 1 < dims; d++) total *= size[d];
  const int64_t width = size[dims - 1], lanes = sizeof(V) / sizeof(float);
  #pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int64_t at = 0; at < total; at++) {
    const float* from = in;
    float* to = out;
    int64_t rest = at;
    for (int64_t d = dims - 2; d >= 0; d--) {
      const int64_t place = rest % size[d];
      rest /= size[d];
      from += place * stride[d];
      to += place * out_stride[d];
    }
    int64_t c = 0;
    for (; c + lanes <= width; c += lanes) tile<V>(from + c, step, to + c, row);
    for (; c < width; c++) tile<float>(from + c, step, to + c, row);
  }
}
"""


def tile_source(name: str, matrices: Sequence[Sequence[Sequence[float]]]) -> str:
    """C++ of O[i1, i2] = Sum[j1, j2] A[i1, j1] * B[i2, j2] * X[j1, j2], or with one matrix, for one tile."""
    first, second = matrices[0], matrices[1] if len(matrices) > 1 else [[1.0]]
    rows, columns, others, across = len(first), len(first[0]), len(second), len(second[0])
    lines = [
        "template <typename T>",
        f"static inline void {name}(const float* __restrict in, const int64_t* step, float* __restrict out,",
        "                        const int64_t* row) {",
    ]
    for b in range(across):
        for a in range(columns):
            lines.append(f"  T x{a}_{b} = load<T>(in + {a} * step[0] + {b} * step[1]);")
        for i in range(rows):
            lines.append(f"  T t{i}_{b} = {_sum(first[i], [f'x{a}_{b}' for a in range(columns)])};")
    for i in range(rows):
        for k in range(others):
            value = _sum(second[k], [f"t{i}_{b}" for b in range(across)])
            lines.append(f"  store<T>(out + {i} * row[0] + {k} * row[1], {value});")
    return "\n".join([*lines, "}", ""])


def _sum(coefficients: Sequence[float], names: Sequence[str]) -> str:
    terms = []
    for coefficient, name in zip(coefficients, names, strict=True):
        if coefficient:
            terms.append(name if coefficient == 1 else f"{coefficient!r}f * {name}")
    return " + ".join(terms) if terms else f"{names[0]} * 0.0f"


def int64s(given: Sequence[int]) -> Any:
    """Numbers as a C array."""
    return (ctypes.c_int64 * len(given))(*given)


@functools.lru_cache(maxsize=64)
def _library(matrices: Matrices) -> Any:
    return load_cpp(VECTORS + tile_source("tile", matrices) + _TRANSFORM)


def matrices_of(
    size: Sequence[int], places: Sequence[int], values: Sequence[float], columns: Sequence[int]
) -> Matrices:
    """The matrices whose values lie one behind the other, row by row."""
    left = iter(values)
    return tuple(
        tuple(tuple(next(left) for _ in range(width)) for _ in range(size[place]))
        for place, width in zip(places, columns, strict=True)
    )


@functools.lru_cache(maxsize=4096)
def _prepared(
    size: Numbers,
    stride: Numbers,
    places: Numbers,
    steps: Numbers,
    values: tuple[float, ...],
    columns: Numbers,
    threads: int,
) -> Callable[[int, int], object]:
    """The kernel with its arguments but for the addresses of the data and of the result."""
    loops = [at for at in range(len(size)) if at not in places]
    out_stride = [math.prod(size[at + 1 :]) for at in range(len(size))]
    two = [0] * (2 - len(places))

    arguments = (
        ctypes.c_int64(len(loops)),
        int64s([size[at] for at in loops]),
        int64s([stride[at] for at in loops]),
        int64s([out_stride[at] for at in loops]),
        int64s([*steps, *two]),
        int64s([*(out_stride[at] for at in places), *two]),
        ctypes.c_int64(threads),
    )
    kernel = _library(matrices_of(size, places, values, columns)).transform
    return lambda data, out: kernel(ctypes.c_void_p(data), ctypes.c_void_p(out), *arguments)


def transform(
    x: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    offset: int,
    places: Sequence[int],
    steps: Sequence[int],
    values: Sequence[float],
    columns: Sequence[int],
) -> Tensor:
    """`kernels.transform` for contiguous float32 tensors of a CPU and what `check_transform` has let pass."""
    assert x.is_contiguous()
    out = x.new_empty(size)
    if out.numel():
        call = _prepared(
            tuple(size),
            tuple(stride),
            tuple(places),
            tuple(steps),
            tuple(values),
            tuple(columns),
            torch.get_num_threads(),
        )
        call(x.data_ptr() + x.element_size() * offset, out.data_ptr())
    return out
