// A tile of products: 12 rows by a strip of 128 bytes stay in registers while the inner index runs.
// With AVX-512 that is 12 x 2 vectors, 24 multiply-adds for 2 loads and 12 broadcasts; with fewer
// or shorter registers the tile is done in parts, out of the same strips. Rows are broadcast from
// where they are: only the other side is packed.
//
// Floor: two vector multiply-adds per clock (Zen 4: one), 12 clocks of AVX-512 per tile and inner
// index in float32. Written with the compiler's vector types, because it keeps an array of those in
// registers, which it does not do with loops that it vectorises itself.
#include "cpu/simd/tile.h"

#include <algorithm>

#include "cpu/parallel.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/vector_types.h"

namespace otloss::cpu {
namespace {

// Sums of kRows rows by kVectors vectors.
template <int kBytes, int kRows, int kVectors, typename T>
struct Part {
  static constexpr int kLanes = kBytes / sizeof(T);
  Vector<T, kBytes> sum[kRows][kVectors];

  // Calls function(sum, where it belongs) for each vector.
  template <typename F>
  OTLOSS_INLINE void for_each(T* at, int64_t stride, F&& function) {
#pragma GCC unroll 12
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) function(sum[r][v], at + r * stride + v * kLanes);
  }

  // Adds term(x_rk, y_kj) for all k. Rows of y come from the L2 cache, in steps that are asked for
  // beforehand.
  template <typename F>
  OTLOSS_INLINE void add(int64_t inner, const T* x, int64_t x_row, int64_t x_inner, const T* y,
                         int64_t y_inner, F&& term) {
    constexpr int64_t kAhead = 8;
    for (int64_t k = 0; k < inner; ++k, x += x_inner, y += y_inner) {
      Vector<T, kBytes> column[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) column[v] = in_memory<kBytes>(y + v * kLanes).vector;
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) __builtin_prefetch(y + kAhead * y_inner + v * kLanes);
#pragma GCC unroll 12
      for (int r = 0; r < kRows; ++r) {
        const Vector<T, kBytes> row = x[r * x_row] - Vector<T, kBytes>{};
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) term(sum[r][v], row, column[v]);
      }
    }
  }
};

constexpr int kVectors = 2;  // of a part's row

template <int kBytes, int kRows, int kPartVectors, typename T>
OTLOSS_INLINE void add_part(const TileProduct<T>& t, int64_t r, int64_t j) {
  Part<kBytes, kRows, kPartVectors, T> part = {};
  T* at = t.sum + r * t.stride + j;
  if (t.add)
    part.for_each(at, t.stride, [](auto& sum, const T* from) OTLOSS_ALWAYS_INLINE {
      sum = in_memory<kBytes>(from).vector;
    });
  else  // what is written at the end comes to the cache meanwhile
    part.for_each(at, t.stride,
                  [](auto&, const T* to) OTLOSS_ALWAYS_INLINE { __builtin_prefetch(to, 1); });
  part.add(t.inner, t.x + r * t.x_row, t.x_row, t.x_inner, t.y + j, t.y_inner,
           [](auto& sum, const auto& x, const auto& y) OTLOSS_ALWAYS_INLINE { sum += x * y; });
  part.for_each(at, t.stride, [](const auto& sum, T* to) OTLOSS_ALWAYS_INLINE {
    in_memory<kBytes>(to).vector = sum;
  });
}

// Rows from r on, kRows at a time; returns the first that is left.
template <int kBytes, int kRows, typename T>
OTLOSS_INLINE int64_t add_rows(const TileProduct<T>& t, int64_t r) {
  constexpr int64_t kLanes = kBytes / sizeof(T);
  for (; r + kRows <= t.rows; r += kRows) {
    int64_t j = 0;
    for (; j + kLanes < t.columns; j += kVectors * kLanes)
      add_part<kBytes, kRows, kVectors>(t, r, j);
    if (j < t.columns) add_part<kBytes, kRows, 1>(t, r, j);
  }
  return r;
}

template <int kBytes, int kRows, typename T>
OTLOSS_INLINE void add_tile_body(const TileProduct<T>& t) {
  int64_t r = add_rows<kBytes, kRows>(t, 0);
  r = add_rows<kBytes, 4>(t, r);
  add_rows<kBytes, 1>(t, r);
}

template <int kBytes, int kRows, typename T>
OTLOSS_INLINE void difference_rows(const Differences<T>& p, int64_t r) {
  constexpr int64_t kColumns = kVectors * kBytes / sizeof(T);
  for (int64_t s = 0; s < p.strips; ++s)
    for (int64_t j = 0; j < kStrip<T>; j += kColumns) {
      Part<kBytes, kRows, kVectors, T> part = {};
      part.add(p.d, p.x + r * p.d, p.d, 1, p.y + s * p.d * kStrip<T> + j, kStrip<T>,
               [](auto& sum, const auto& x, const auto& y)
                   OTLOSS_ALWAYS_INLINE { sum += (x - y) * (x - y); });
      part.for_each(p.squares + r * p.stride + s * kStrip<T> + j, p.stride,
                    [](const auto& sum, T* to)
                        OTLOSS_ALWAYS_INLINE { in_memory<kBytes>(to).vector = sum; });
    }
}

template <int kBytes, typename T>
OTLOSS_INLINE void differences_body(const Differences<T>& p) {
  if (p.rows == kDifferenceRows) return difference_rows<kBytes, kDifferenceRows>(p, 0);
  for (int64_t r = 0; r < p.rows; ++r) difference_rows<kBytes, 1>(p, r);
}

// The registers (32 of AVX-512, else 16) hold a part's sums, the vectors of a row of y, and one of
// x.
struct AddTile {
  template <int kBytes, typename T>
  static OTLOSS_INLINE void run(const TileProduct<T>& t) {
    add_tile_body<kBytes, kBytes == 64 ? 12 : 6>(t);
  }
};

struct AddDifferences {
  template <int kBytes, typename T>
  static OTLOSS_INLINE void run(const Differences<T>& p) {
    differences_body<kBytes>(p);
  }
};

template <typename T>
void add_tile(const TileProduct<T>& tile) {
  run_at_level<AddTile>(tile);
}

// ------------------------------------------------------------------------------------- packing

// A 4 x 4 block, rows `stride` apart, transposed to rows `to_stride` apart.
template <typename T>
OTLOSS_INLINE void transpose_block(const T* from, int64_t stride, T* to, int64_t to_stride) {
  constexpr int kBytes = 4 * sizeof(T);
  using V = Vector<T, kBytes>;
  const V r0 = in_memory<kBytes>(from).vector, r1 = in_memory<kBytes>(from + stride).vector;
  const V r2 = in_memory<kBytes>(from + 2 * stride).vector,
          r3 = in_memory<kBytes>(from + 3 * stride).vector;
  const V low01 = __builtin_shufflevector(r0, r1, 0, 4, 1, 5);
  const V low23 = __builtin_shufflevector(r2, r3, 0, 4, 1, 5);
  const V high01 = __builtin_shufflevector(r0, r1, 2, 6, 3, 7);
  const V high23 = __builtin_shufflevector(r2, r3, 2, 6, 3, 7);
  in_memory<kBytes>(to).vector = __builtin_shufflevector(low01, low23, 0, 1, 4, 5);
  in_memory<kBytes>(to + to_stride).vector = __builtin_shufflevector(low01, low23, 2, 3, 6, 7);
  in_memory<kBytes>(to + 2 * to_stride).vector =
      __builtin_shufflevector(high01, high23, 0, 1, 4, 5);
  in_memory<kBytes>(to + 3 * to_stride).vector =
      __builtin_shufflevector(high01, high23, 2, 3, 6, 7);
}

template <typename T>
OTLOSS_INLINE void transpose_body(int64_t rows, int64_t columns, const T* from, int64_t stride,
                                  T* to, int64_t to_stride) {
  constexpr int64_t kSide = 4, kLine = 64 / sizeof(T), kAhead = 4 * kLine;
  const int64_t whole = rows / kSide * kSide;
  for (int64_t begin = 0; begin < columns; begin += kLine) {
    const int64_t end = std::min(columns, begin + kLine);
    const int64_t blocks = begin + (end - begin) / kSide * kSide;
    for (int64_t r = 0; r < whole; r += kSide) {
      const T* some = from + r * stride;
      for (int64_t s = 0; s < kSide; ++s) __builtin_prefetch(some + s * stride + begin + kAhead);
      for (int64_t k = begin; k < blocks; k += kSide)
        transpose_block(some + k, stride, to + k * to_stride + r, to_stride);
      for (int64_t k = blocks; k < end; ++k)
        for (int64_t s = 0; s < kSide; ++s) to[k * to_stride + r + s] = some[s * stride + k];
    }
    for (int64_t r = whole; r < rows; ++r)
      for (int64_t k = begin; k < end; ++k) to[k * to_stride + r] = from[r * stride + k];
  }
}

// With the shuffles of each level: those of doubles take several times as long in SSE2.
struct Transpose {
  template <int kBytes, typename T>
  static OTLOSS_INLINE void run(int64_t rows, int64_t columns, const T* from, int64_t stride, T* to,
                                int64_t to_stride) {
    transpose_body(rows, columns, from, stride, to, to_stride);
  }
};

// `count` rows, at most a strip.
template <typename T>
void pack_strip_transposed(int64_t count, int64_t inner, const T* from, int64_t stride, T* strip) {
  constexpr int kBytes = 16;  // of every machine's vectors: a call of memmove takes as long again
  for (int64_t k = 0; k < inner; ++k, from += stride, strip += kStrip<T>)
    if (count == kStrip<T>)
#pragma GCC unroll 8
      for (int64_t j = 0; j < kStrip<T>; j += kBytes / sizeof(T))
        in_memory<kBytes>(strip + j).vector = in_memory<kBytes>(from + j).vector;
    else
      std::copy_n(from, count, strip);
}

}  // namespace

template <typename T>
void add_products(const TileProduct<T>& tile) {
  add_tile(tile);
}

template <typename T>
void squared_differences(const Differences<T>& args) {
  run_at_level<AddDifferences>(args);
}

template <typename T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t stride, T* to,
               int64_t to_stride) {
  run_at_level<Transpose>(rows, columns, from, stride, to, to_stride);
}

template <typename T>
void pack(const Packing<T>& p) {
  constexpr int64_t kGrain = 1 << 15;  // entries that are worth a thread
  const int64_t size = p.inner * kStrip<T>;
  parallel_for(0, strips_of<T>(p.count), std::max<int64_t>(1, kGrain / std::max<int64_t>(1, size)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t s = begin; s < end; ++s) {
                   const int64_t first = s * kStrip<T>;
                   const int64_t count = std::min(kStrip<T>, p.count - first);
                   T* strip = p.strips + s * size;
                   if (count < kStrip<T>) std::fill(strip, strip + size, T(0));
                   if (p.transposed)
                     pack_strip_transposed(count, p.inner, p.from + first, p.stride, strip);
                   else
                     transpose(count, p.inner, p.from + first * p.stride, p.stride, strip,
                               kStrip<T>);
                 }
               });
}

#define OTLOSS_INSTANTIATE(T)                                                \
  template void transpose(int64_t, int64_t, const T*, int64_t, T*, int64_t); \
  template void add_products(const TileProduct<T>&);                         \
  template void squared_differences(const Differences<T>&);                  \
  template void pack(const Packing<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
