// Products of a few tokens with neurons, straight from their stored bytes: nothing is decoded into memory.
//
// Written with vectors of 16 numbers, which compilers turn into whatever instructions the processor has.
// Dimension key: T tokens, U neurons, S rows that select (gate and up), H hidden, G groups of 32 weights.

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#ifdef __AVX512F__
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

constexpr int LANES = 16, GROUP = 32, NEURONS_AT_ONCE = 8;

typedef float Floats __attribute__((vector_size(LANES * 4)));
typedef int32_t Ints __attribute__((vector_size(LANES * 4)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef int16_t Shorts __attribute__((vector_size(LANES * 2)));
typedef int8_t Bytes __attribute__((vector_size(LANES)));

// Memory that starts as zeros; without the C++ library, so that a C compiler's linker will do.
struct Zeros {
  float *at;
  explicit Zeros(int64_t count) : at(static_cast<float *>(std::calloc(count, sizeof(float)))) {}
  ~Zeros() { std::free(at); }
  Zeros(const Zeros &) = delete;
};

template <typename V> V load(const void *from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

inline Floats all(float value) { return value - Floats{}; }

inline float sum(Floats v) {
  float total = 0;
  for (int lane = 0; lane < LANES; lane++) total += v[lane];
  return total;
}

// IEEE half to single precision by integers: shifted into place, with the exponent corrected by a product,
// which makes subnormals right; infinity and NaN keep their largest exponent.
inline Floats single(Halves h) {
#ifdef __AVX512F__
  return _mm512_cvtph_ps((__m256i)h);
#endif
  Words w = __builtin_convertvector(h, Words), magnitude = (w & 0x7fffu) << 13;
  Floats scaled = (Floats)magnitude * all(0x1p112f);
  Words special = (Words)(magnitude >= 0x0f800000u) & 0x7f800000u;
  return (Floats)((Words)scaled | special | ((w & 0x8000u) << 16));
}

inline float single(uint16_t h) {
#ifdef __FLT16_MANT_DIG__
  return load<_Float16>(&h);
#else
  return single(Halves{h})[0];
#endif
}

inline Ints integers(const uint8_t *from) {
#ifdef __AVX512F__
  return (Ints)_mm512_cvtepi8_epi32(load<__m128i>(from));  // GCC 12 takes 50 instructions for the line below
#else
  return __builtin_convertvector(__builtin_convertvector(load<Bytes>(from), Shorts), Ints);
#endif
}

// Each encoding gives the 32 weights of a group as two vectors, and the scale of the group. The order of the
// weights in the vectors is the encoding's own: `place` is the index of the weight at a position.

template <int BYTES> struct Plain {
  static constexpr bool SCALED = false;
  static constexpr int group_bytes = BYTES * GROUP;
  static int64_t stored(int64_t H) { return BYTES * H; }
  static int place(int position) { return position; }
};

struct F32 : Plain<4> {
  static void weights(const uint8_t *from, Floats &first, Floats &second) {
    first = load<Floats>(from), second = load<Floats>(from + 4 * LANES);
  }
};

struct BF16 : Plain<2> {
  static Floats widened(const uint8_t *from) {
    return (Floats)(__builtin_convertvector(load<Halves>(from), Words) << 16);
  }
  static void weights(const uint8_t *from, Floats &first, Floats &second) {
    first = widened(from), second = widened(from + 2 * LANES);
  }
};

struct F16 : Plain<2> {
  static void weights(const uint8_t *from, Floats &first, Floats &second) {
    first = single(load<Halves>(from)), second = single(load<Halves>(from + 2 * LANES));
  }
};

struct I8 : Plain<1> {
  static constexpr bool SCALED = true;
  static void weights(const uint8_t *from, Floats &first, Floats &second) {
    first = __builtin_convertvector(integers(from), Floats);
    second = __builtin_convertvector(integers(from + LANES), Floats);
  }
};

struct I4 {
  static constexpr bool SCALED = true;
  static int64_t stored(int64_t H) { return (H + 1) / 2; }
  static constexpr int group_bytes = GROUP / 2;
  static int place(int position) { return position < LANES ? 2 * position : 2 * (position - LANES) + 1; }
  static void weights(const uint8_t *from, Floats &first, Floats &second) {
    Ints both = integers(from);
    first = __builtin_convertvector((both & 15) - 8, Floats);
    second = __builtin_convertvector(((both >> 4) & 15) - 8, Floats);
  }
};

// A row of weights.
template <typename E> struct Row {
  const uint8_t *at;
  int64_t H;

  // Writes the weights of a group, and zeros behind the last one of a row; returns the group's scale.
  float group(int64_t g, Floats &first, Floats &second) const {
    const uint8_t *from = at + g * E::group_bytes;
    uint8_t rest[4 * GROUP];
    if ((g + 1) * GROUP > H) {
      std::memset(rest, 0, sizeof rest);
      std::memcpy(rest, from, E::stored(H) - g * E::group_bytes);
      from = rest;
    }
    E::weights(from, first, second);
    return E::SCALED ? single(load<uint16_t>(at + E::stored(H) + 2 * g)) : 1.0f;
  }
};

// Asks for a group of a row that is needed soon: rows lie apart, and processors read ahead within a page only.
template <typename E> void prefetch(const uint8_t *row, int64_t g) {
  constexpr int LINE = 64;
  if (g * E::group_bytes % LINE < E::group_bytes)
    for (int line = 0; line < E::group_bytes; line += LINE) __builtin_prefetch(row + g * E::group_bytes + line);
}

int64_t groups_of(int64_t H) { return (H + GROUP - 1) / GROUP; }

// Calls `run` with the index of each number of (tokens, 32 G), whose groups are in the encoding's order, and with
// its index in (tokens, H).
template <typename E, typename F> void spread(int64_t tokens, int64_t H, F run) {
  int64_t width = groups_of(H) * GROUP;
  for (int64_t t = 0; t < tokens; t++)
    for (int64_t position = 0; position < width; position++) {
      int64_t h = position / GROUP * GROUP + E::place(position % GROUP);
      if (h < H) run(t * width + position, t * H + h);
    }
}

template <typename E, int T>
void project(const uint8_t *memory, const int64_t *offsets, int64_t U, int64_t S, int64_t row_bytes,
             int64_t H, const float *x, float *out, int64_t tokens, int threads) {
  int64_t G = groups_of(H), width = G * GROUP;
#pragma omp parallel for num_threads(threads) schedule(static) if (threads > 1)
  for (int64_t u = 0; u < U; u++)
    for (int64_t s = 0; s < S; s++) {
      Row<E> row{memory + offsets[u] + s * row_bytes, H};
      const uint8_t *next = memory + offsets[u + 1 < U ? u + 1 : u] + s * row_bytes;
      Floats total[T] = {};
      for (int64_t g = 0; g < G; g++) {
        Floats first, second;
        prefetch<E>(next, g);
        Floats scale = all(row.group(g, first, second));
        for (int t = 0; t < T; t++) {
          const float *at = x + t * width + g * GROUP;
          Floats part = first * load<Floats>(at) + second * load<Floats>(at + LANES);
          total[t] += E::SCALED ? part * scale : part;
        }
      }
      for (int64_t t = 0; t < tokens; t++) out[(s * tokens + t) * U + u] = sum(total[t]);
    }
}

// y += a down, for the groups from `first` to `last`; y is (T, 32 G) in the encoding's order.
template <typename E, int T>
void accumulate_groups(const uint8_t *memory, const int64_t *offsets, int64_t U, int64_t H, const float *a,
                       float *y, int64_t first_group, int64_t last_group) {
  int64_t width = groups_of(H) * GROUP;
  for (int64_t start = 0; start < U; start += NEURONS_AT_ONCE) {
    // Neurons that are inactive for all tokens are left out: theirs are exact zeros.
    int64_t used[NEURONS_AT_ONCE], count = 0;
    for (int64_t u = start; u < U && u < start + NEURONS_AT_ONCE; u++) {
      bool active = false;
      for (int t = 0; t < T; t++) active |= a[t * U + u] != 0;
      if (active) used[count++] = u;
    }
    for (int64_t g = first_group; g < last_group; g++) {
      Floats low[T], high[T];
      for (int t = 0; t < T; t++) {
        low[t] = load<Floats>(y + t * width + g * GROUP);
        high[t] = load<Floats>(y + t * width + g * GROUP + LANES);
      }
      for (int64_t i = 0; i < count; i++) {
        int64_t next = used[i] + NEURONS_AT_ONCE;
        prefetch<E>(memory + offsets[next < U ? next : U - 1], g);
        Floats first, second;
        float scale = Row<E>{memory + offsets[used[i]], H}.group(g, first, second);
        for (int t = 0; t < T; t++) {
          Floats factor = all(a[t * U + used[i]] * scale);
          low[t] += factor * first, high[t] += factor * second;
        }
      }
      for (int t = 0; t < T; t++) {
        std::memcpy(y + t * width + g * GROUP, &low[t], sizeof low[t]);
        std::memcpy(y + t * width + g * GROUP + LANES, &high[t], sizeof high[t]);
      }
    }
  }
}

template <typename E, int T>
void accumulate(const uint8_t *memory, const int64_t *offsets, int64_t U, int64_t H, const float *a, float *y,
                int threads) {
  int64_t G = groups_of(H);
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    int64_t part = 0, parts = 1;
#ifdef _OPENMP
    part = omp_get_thread_num(), parts = omp_get_num_threads();
#endif
    accumulate_groups<E, T>(memory, offsets, U, H, a, y, G * part / parts, G * (part + 1) / parts);
  }
}

// Calls `run` with an encoding, and with a constant that is at least the number of tokens: loops unroll by it.
// Returns what `run` does, or 2 if there is no such encoding or the tokens are too many.
template <typename F> int with_constants(int64_t encoding, int64_t tokens, F run) {
  auto encoded = [&](auto T) {
    switch (encoding) {
      case 0: return run(F32(), T);
      case 1: return run(BF16(), T);
      case 2: return run(F16(), T);
      case 3: return run(I8(), T);
      case 4: return run(I4(), T);
    }
    return 2;
  };
  if (tokens == 1) return encoded(std::integral_constant<int, 1>());
  if (tokens == 2) return encoded(std::integral_constant<int, 2>());
  if (tokens <= 4) return encoded(std::integral_constant<int, 4>());
  return tokens <= 8 ? encoded(std::integral_constant<int, 8>()) : 2;
}

}  // namespace

// Both return 0, or 1 if there was no memory and nothing is computed, or 2 for wrong arguments.

// out (S, tokens, U) = x (tokens, H) times the S rows that begin at each of `offsets`.
extern "C" int ripple_project(int64_t encoding, const uint8_t *memory, const int64_t *offsets, int64_t U,
                              int64_t S, int64_t row_bytes, int64_t H, int64_t tokens, const float *x,
                              float *out, int threads) {
  return with_constants(encoding, tokens, [&](auto encoded, auto T) {
    using E = decltype(encoded);
    Zeros spread_x(T * groups_of(H) * GROUP);
    if (!spread_x.at) return 1;
    spread<E>(tokens, H, [&](int64_t to, int64_t from) { spread_x.at[to] = x[from]; });
    project<E, T>(memory, offsets, U, S, row_bytes, H, spread_x.at, out, tokens, threads);
    return 0;
  });
}

// y (tokens, H) += a (tokens, U) times the rows that begin `skipped` bytes behind each of `offsets`.
extern "C" int ripple_accumulate(int64_t encoding, const uint8_t *memory, const int64_t *offsets, int64_t U,
                                 int64_t skipped, int64_t H, int64_t tokens, const float *a, float *y,
                                 int threads) {
  return with_constants(encoding, tokens, [&](auto encoded, auto T) {
    using E = decltype(encoded);
    Zeros spread_y(T * groups_of(H) * GROUP), every_a(T * U);
    if (!spread_y.at || !every_a.at) return 1;
    spread<E>(tokens, H, [&](int64_t to, int64_t from) { spread_y.at[to] = y[from]; });
    std::memcpy(every_a.at, a, tokens * U * sizeof(float));
    accumulate<E, T>(memory + skipped, offsets, U, H, every_a.at, spread_y.at, threads);
    spread<E>(tokens, H, [&](int64_t from, int64_t to) { y[to] = spread_y.at[from]; });
    return 0;
  });
}
