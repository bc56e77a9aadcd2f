// A tile of products: 8 rows by a strip of 128 bytes stay in registers while the inner index runs.
// With AVX-512 that is 8 x 2 vectors, 16 multiply-adds for 2 loads and 8 broadcasts; with fewer or
// shorter registers the tile is done in parts, out of the same strips. One layout for both sides
// lets a cloud be packed once, whichever side of a product it is on.
//
// Floor: two vector multiply-adds per clock, 8 clocks of AVX-512 per tile and inner index in
// float32. Written with the compiler's vector types, because it keeps an array of those in
// registers, which it does not do with loops that it vectorises itself.
#include "cpu/simd/tile.h"

#include <algorithm>
#include <type_traits>

#include "cpu/parallel.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu {
namespace {

// kBytes of T, wherever a T may lie.
template <typename T, int kBytes>
struct VectorOf {
  using type __attribute__((vector_size(kBytes), aligned(sizeof(T)), may_alias)) = T;
};
template <typename T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

template <int kBytes, typename T>
OTLOSS_INLINE const Vector<T, kBytes>& vector_at(const T* p) {
  return *reinterpret_cast<const Vector<T, kBytes>*>(p);
}
template <int kBytes, typename T>
OTLOSS_INLINE Vector<T, kBytes>& vector_at(T* p) {
  return *reinterpret_cast<Vector<T, kBytes>*>(p);
}

// Sums of kRows rows by kVectors vectors.
template <int kBytes, int kRows, int kVectors, typename T>
struct Part {
  static constexpr int kLanes = kBytes / sizeof(T);
  Vector<T, kBytes> sum[kRows][kVectors];

  // Calls function(sum, where it belongs) for each vector.
  template <typename F>
  OTLOSS_INLINE void for_each(T* at, int64_t stride, F&& function) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v)
        function(sum[r][v], vector_at<kBytes>(at + r * stride + v * kLanes));
  }

  // Adds term(x_rk, y_kj) for all k.
  template <typename F>
  OTLOSS_INLINE void add(int64_t inner, const T* x, const T* y, F&& term) {
    for (int64_t k = 0; k < inner; ++k, x += kStrip<T>, y += kStrip<T>) {
      Vector<T, kBytes> column[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) column[v] = vector_at<kBytes>(y + v * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const Vector<T, kBytes> row = x[r] - Vector<T, kBytes>{};
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) term(sum[r][v], row, column[v]);
      }
    }
  }
};

constexpr int kVectors = 2;  // of a part's row

template <int kBytes, int kRows, typename T>
OTLOSS_INLINE void add_tile_body(const TileProduct<T>& t) {
  constexpr int64_t kColumns = kVectors * kBytes / sizeof(T);
  static_assert(kTileRows % kRows == 0 && kStrip<T> % kColumns == 0, "parts make up a tile");
  for (int64_t r = 0; r < kTileRows; r += kRows)
    for (int64_t j = 0; j < kStrip<T>; j += kColumns) {
      T* at = t.sum + r * t.stride + j;
      Part<kBytes, kRows, kVectors, T> part;
      part.for_each(at, t.stride, [](auto& sum, auto& value) OTLOSS_ALWAYS_INLINE { sum = value; });
      part.add(t.inner, t.x + r, t.y + j,
               [](auto& sum, const auto& x, const auto& y) OTLOSS_ALWAYS_INLINE { sum += x * y; });
      part.for_each(at, t.stride, [](auto& sum, auto& value) OTLOSS_ALWAYS_INLINE { value = sum; });
    }
}

template <int kBytes, typename T>
OTLOSS_INLINE void differences_body(const Differences<T>& p) {
  constexpr int64_t kColumns = kVectors * kBytes / sizeof(T);
  for (int64_t s = 0; s < p.strips; ++s)
    for (int64_t j = 0; j < kStrip<T>; j += kColumns) {
      Part<kBytes, kDifferenceRows, kVectors, T> part = {};
      part.add(p.d, p.x, p.y + s * p.d * kStrip<T> + j,
               [](auto& sum, const auto& x, const auto& y)
                   OTLOSS_ALWAYS_INLINE { sum += (x - y) * (x - y); });
      part.for_each(p.squares + s * kStrip<T> + j, p.stride,
                    [](auto& sum, auto& value) OTLOSS_ALWAYS_INLINE { value = sum; });
    }
}

// One function for each instruction-set level, because the shape of a part depends on it: the
// registers hold its sums, the vectors of a row of y, and one of x.
#define OTLOSS_TILES_AT(level, kBytes, kRows, T)                                    \
  level void add_tile(const TileProduct<T>& t) { add_tile_body<kBytes, kRows>(t); } \
  level void differences(const Differences<T>& p) { differences_body<kBytes>(p); }
#if defined(OTLOSS_LEVELS)
#define OTLOSS_TILES(T)                                                \
  OTLOSS_TILES_AT(__attribute__((target("arch=x86-64-v4"))), 64, 8, T) \
  OTLOSS_TILES_AT(__attribute__((target("arch=x86-64-v3"))), 32, 4, T) \
  OTLOSS_TILES_AT(__attribute__((target("default"))), 16, 4, T)
#else
#define OTLOSS_TILES(T) OTLOSS_TILES_AT(, 16, 4, T)
#endif
OTLOSS_TILES(float)
OTLOSS_TILES(double)
#undef OTLOSS_TILES
#undef OTLOSS_TILES_AT

// ------------------------------------------------------------------------------------- packing

// A 4 x 4 block, rows `stride` apart, transposed to rows kStrip apart.
template <typename T>
OTLOSS_INLINE void transpose_block(const T* from, int64_t stride, T* to) {
  constexpr int kBytes = 4 * sizeof(T);
  using V = Vector<T, kBytes>;
  using Index = Vector<std::conditional_t<sizeof(T) == 4, int32_t, int64_t>, kBytes>;
  const V r0 = vector_at<kBytes>(from), r1 = vector_at<kBytes>(from + stride);
  const V r2 = vector_at<kBytes>(from + 2 * stride), r3 = vector_at<kBytes>(from + 3 * stride);
  const V low01 = __builtin_shuffle(r0, r1, Index{0, 4, 1, 5});
  const V low23 = __builtin_shuffle(r2, r3, Index{0, 4, 1, 5});
  const V high01 = __builtin_shuffle(r0, r1, Index{2, 6, 3, 7});
  const V high23 = __builtin_shuffle(r2, r3, Index{2, 6, 3, 7});
  vector_at<kBytes>(to) = __builtin_shuffle(low01, low23, Index{0, 1, 4, 5});
  vector_at<kBytes>(to + kStrip<T>) = __builtin_shuffle(low01, low23, Index{2, 3, 6, 7});
  vector_at<kBytes>(to + 2 * kStrip<T>) = __builtin_shuffle(high01, high23, Index{0, 1, 4, 5});
  vector_at<kBytes>(to + 3 * kStrip<T>) = __builtin_shuffle(high01, high23, Index{2, 3, 6, 7});
}

// `count` rows, at most a strip.
template <typename T>
void pack_strip(int64_t count, int64_t inner, const T* from, int64_t stride, T* strip) {
  constexpr int64_t kSide = 4;
  const int64_t blocks = inner / kSide * kSide;
  int64_t r = 0;
  for (; r + kSide <= count; r += kSide) {
    const T* rows = from + r * stride;
    for (int64_t k = 0; k < blocks; k += kSide)
      transpose_block(rows + k, stride, strip + k * kStrip<T> + r);
    for (int64_t k = blocks; k < inner; ++k)
      for (int64_t s = 0; s < kSide; ++s) strip[k * kStrip<T> + r + s] = rows[s * stride + k];
  }
  for (; r < count; ++r)
    for (int64_t k = 0; k < inner; ++k) strip[k * kStrip<T> + r] = from[r * stride + k];
}

template <typename T>
void pack_strip_transposed(int64_t count, int64_t inner, const T* from, int64_t stride, T* strip) {
  for (int64_t k = 0; k < inner; ++k) std::copy_n(from + k * stride, count, strip + k * kStrip<T>);
}

}  // namespace

template <typename T>
void add_products(const TileProduct<T>& tile) {
  add_tile(tile);
}

template <typename T>
void squared_differences(const Differences<T>& args) {
  differences(args);
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
                     pack_strip(count, p.inner, p.from + first * p.stride, p.stride, strip);
                 }
               });
}

// A block of V, a few strips of rows by a chunk of the inner index, is packed and stays in the L2
// cache while all columns of z pass by; the sums of the block's rows stay there, too.
template <typename T>
void multiply_rows(const RowsProduct<T>& p) {
  constexpr int64_t kChunk = 512;
  const int64_t strips = strips_of<T>(p.columns), width = strips * kStrip<T>;
  const int64_t most = std::min(kProductRows, strips_of<T>(p.rows) * kStrip<T>);
  BlockVector<T> V(most * std::min(kChunk, p.inner)), sums(most * width);
  for (int64_t i = 0; i < p.rows; i += kProductRows) {
    const int64_t rows = std::min(kProductRows, p.rows - i);
    std::fill(sums.begin(), sums.end(), T(0));
    for (int64_t k = 0; k < p.inner; k += kChunk) {
      const int64_t chunk = std::min(kChunk, p.inner - k);
      const T* from = p.V + (p.transposed ? k * p.stride + i : i * p.stride + k);
      pack(Packing<T>{rows, chunk, from, p.stride, p.transposed, V.data()});
      for (int64_t s = 0; s < strips; ++s)
        for (int64_t r = 0; r < rows; r += kTileRows)
          add_tile(TileProduct<T>{
              chunk, V.data() + r / kStrip<T> * chunk * kStrip<T> + r % kStrip<T>,
              p.z + (s * p.inner + k) * kStrip<T>, sums.data() + r * width + s * kStrip<T>, width});
    }
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(sums.data() + r * width, p.columns, p.out + (i + r) * p.columns);
  }
}

#define OTLOSS_INSTANTIATE(T)                               \
  template void add_products(const TileProduct<T>&);        \
  template void squared_differences(const Differences<T>&); \
  template void pack(const Packing<T>&);                    \
  template void multiply_rows(const RowsProduct<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
