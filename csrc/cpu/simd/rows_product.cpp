// A block of rows of V by a chunk of the inner index is multiplied while it is in the L2 cache, two
// strips of z by a chunk while they are in the L1 cache.
//
// Most entries of a plan may be too small to count: a row's product is rounded by 2^-24 of the sum
// of |V z| in float32. Entries whose products all together are shorter than that are left out. A
// tile of rows where few are left is multiplied by lists of these, row by row. The sum of |V z| is
// at least the row's times the shortest z, and what is left out at most its sum times the longest.
//
// Floor of a list: a load of z for each multiply-add, one of 512 bits per clock, and a broadcast
// for every four: 5 clocks (Zen 4) where a tile takes 4.
#include "cpu/simd/rows_product.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <utility>
#include <vector>

#include "cpu/simd/blocks.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/vector_types.h"

namespace otloss::cpu {
namespace {

// Inner indices of a chunk for lists: a pass of strips by them takes 28 KiB.
constexpr int64_t kListChunk = 112;
constexpr int64_t kPass = 2;        // strips
constexpr double kFewEntries = .5;  // of a tile: at .55 to .6 lists take as long

// Columns whose products with an entry take as long as looking whether it is to be listed.
double columns_of_listing() { return simd_level() == SimdLevel::kAvx512 ? 4 : 40; }

// Where the entries of a chunk of a tile that count are listed, row after row; the lists of a row
// are written on to whole blocks.
template <typename T>
struct TileLists {
  int32_t end[kTileRows];                                 // of the rows' entries
  int32_t index[kTileRows * kListChunk + kBlock<float>];  // in the chunk
  T weight[kTileRows * kListChunk + kBlock<float>];
};

template <typename T>
OTLOSS_INLINE bool counts(T entry, T limit) {
  return !(std::abs(entry) <= limit);  // NaN does
}

template <typename T>
OTLOSS_SIMD int64_t count_entries(int64_t inner, T limit, const T* V) {
  int32_t count = 0;
#pragma omp simd reduction(+ : count)
  for (int64_t k = 0; k < inner; ++k) count += static_cast<int32_t>(counts(V[k], limit));
  return count;
}

template <typename T>
OTLOSS_SIMD void mark_entries(int64_t inner, T limit, const T* V, uint8_t* marks) {
#pragma omp simd
  for (int64_t k = 0; k < inner; ++k) marks[k] = static_cast<uint8_t>(counts(V[k], limit));
}

// Lists the entries of a chunk of a row that count; returns how many. Without a branch.
template <typename T>
int64_t list_by_entry(int64_t inner, T limit, const T* V, int32_t* index, T* weight) {
  uint8_t marks[kListChunk];
  mark_entries(inner, limit, V, marks);
  int64_t count = 0;
  for (int64_t k = 0; k < inner; ++k) {
    index[count] = static_cast<int32_t>(k);
    weight[count] = V[k];
    count += marks[k];
  }
  return count;
}

#if defined(OTLOSS_LEVELS)
OTLOSS_AVX512 int64_t list_by_blocks(int64_t inner, float limit, const float* V, int32_t* index,
                                     float* weight) {
  int64_t count = 0;
  __m512i k = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  for (; inner > 0; inner -= 16, V += 16, k = _mm512_add_epi32(k, _mm512_set1_epi32(16))) {
    const __mmask16 there = static_cast<__mmask16>((1U << std::min<int64_t>(16, inner)) - 1);
    const __m512 entries = _mm512_maskz_loadu_ps(there, V);
    const __mmask16 kept =
        _mm512_mask_cmp_ps_mask(there, _mm512_abs_ps(entries), _mm512_set1_ps(limit), _CMP_NLE_UQ);
    _mm512_storeu_ps(weight + count, _mm512_maskz_compress_ps(kept, entries));
    _mm512_storeu_si512(index + count, _mm512_maskz_compress_epi32(kept, k));
    count += __builtin_popcount(kept);
  }
  return count;
}
OTLOSS_AVX512 int64_t list_by_blocks(int64_t inner, double limit, const double* V, int32_t* index,
                                     double* weight) {
  int64_t count = 0;
  __m256i k = _mm256_set_epi32(7, 6, 5, 4, 3, 2, 1, 0);
  for (; inner > 0; inner -= 8, V += 8, k = _mm256_add_epi32(k, _mm256_set1_epi32(8))) {
    const __mmask8 there = static_cast<__mmask8>((1U << std::min<int64_t>(8, inner)) - 1);
    const __m512d entries = _mm512_maskz_loadu_pd(there, V);
    const __mmask8 kept =
        _mm512_mask_cmp_pd_mask(there, _mm512_abs_pd(entries), _mm512_set1_pd(limit), _CMP_NLE_UQ);
    _mm512_storeu_pd(weight + count, _mm512_maskz_compress_pd(kept, entries));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(index + count),
                        _mm256_maskz_compress_epi32(kept, k));
    count += __builtin_popcount(kept);
  }
  return count;
}
#endif

// The size up to which entries of a row do not count. Infinite and NaN ones do.
template <typename T>
T limit_of_row(T sum, T evenness, int64_t inner) {
  const T limit = std::abs(sum) * (evenness * std::numeric_limits<T>::epsilon() / T(2 * inner));
  return std::min(limit, std::numeric_limits<T>::max());
}

template <typename T>
int64_t list_row(int64_t inner, T limit, const T* V, int32_t* index, T* weight) {
#if defined(OTLOSS_LEVELS)
  if (simd_level() == SimdLevel::kAvx512) return list_by_blocks(inner, limit, V, index, weight);
#endif
  return list_by_entry(inner, limit, V, index, weight);
}

// A tile of rows of V, a chunk for lists at a time.
template <typename T>
class TileOfRows {
 public:
  TileOfRows(const RowsProduct<T>& p, int64_t first) : p_(p), first_(first) {
    for (int64_t r = 0; r < rows_; ++r)
      limit_[r] = limit_of_row(p.sum[first + r], p.evenness, p.inner);
  }

  // Whether so few entries count that they should be listed, by a sample of rows.
  bool few() {
    constexpr int64_t kEvery = 4;
    const int64_t chunk = p_.V_inner == 1 ? p_.inner : kListChunk;
    int64_t count = 0;
    for (int64_t k = 0; k < p_.inner; k += chunk) {
      const int64_t inner = std::min(chunk, p_.inner - k);
      read(k, inner);
      for (int64_t r = 0; r < rows_; r += kEvery)
        count += count_entries(inner, limit_[r], V_ + r * stride_);
    }
    const int64_t of = groups_of(rows_, kEvery) * p_.inner;
    const double most = kFewEntries - columns_of_listing() / static_cast<double>(p_.columns);
    return static_cast<double>(count) <= most * static_cast<double>(of);
  }

  // Inner indices [k, k + inner).
  void list(int64_t k, int64_t inner, TileLists<T>& lists) {
    read(k, inner);
    int32_t end = 0;
    for (int64_t r = 0; r < rows_; ++r) {
      end += static_cast<int32_t>(
          list_row(inner, limit_[r], V_ + r * stride_, lists.index + end, lists.weight + end));
      lists.end[r] = end;
    }
  }

 private:
  void read(int64_t k, int64_t inner) {
    V_ = p_.V + first_ * p_.V_row + k * p_.V_inner, stride_ = p_.V_row;
    if (p_.V_inner == 1) return;
    transpose(inner, rows_, V_, p_.V_inner, columns_, kListChunk);
    V_ = columns_, stride_ = kListChunk;
  }

  const RowsProduct<T>& p_;
  const int64_t first_, rows_ = std::min(kTileRows, p_.rows - first_);
  T limit_[kTileRows];
  const T* V_;  // (rows, stride) a chunk
  int64_t stride_;
  alignas(64) T columns_[kTileRows * kListChunk];  // of V^T
};

// Where a strip of a row of z starts.
template <typename T>
const T* z_at(const RowsProduct<T>& p, int64_t k, int64_t strip) {
  return p.packed ? p.z + (strip * p.inner + k) * kStrip<T>
                  : p.z + k * p.columns + strip * kStrip<T>;
}

// out (+)= x y with the rows of x as lists.
template <typename T>
struct ListsProduct {
  int64_t rows;
  int64_t strips;  // at most kPass, whole ones
  const TileLists<T>* x;
  const T* y;      // (kListChunk, kPass * kStrip)
  T* out;          // (rows, columns)
  int64_t stride;  // distance of rows of `out`
  bool add;        // to what is in `out`
};

template <int kBytes, int kVectors, typename T>
OTLOSS_INLINE void add_lists(const ListsProduct<T>& p, int64_t column) {
  constexpr int kLanes = kBytes / sizeof(T);
  int32_t e = 0;
  for (int64_t r = 0; r < p.rows; ++r) {
    T* const out = p.out + r * p.stride + column;
    Vector<T, kBytes> sum[kVectors] = {};
    for (int v = 0; v < kVectors && p.add; ++v) sum[v] = in_memory<kBytes>(out + v * kLanes).vector;
    for (; e < p.x->end[r]; ++e) {
      const T* y = p.y + p.x->index[e] * (kPass * kStrip<T>)+column;
      const Vector<T, kBytes> weight = p.x->weight[e] - Vector<T, kBytes>{};
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v)
        sum[v] += weight * in_memory<kBytes>(y + v * kLanes).vector;
    }
    for (int v = 0; v < kVectors; ++v) in_memory<kBytes>(out + v * kLanes).vector = sum[v];
  }
}

// By as many vectors as there are registers for, at most 8.
struct AddLists {
  template <int kBytes, typename T>
  static OTLOSS_INLINE void run(const ListsProduct<T>& p) {
    constexpr int kStrip1 = 128 / kBytes, kVectors = std::min<int>(8, kPass * kStrip1);
    constexpr int64_t kColumns = kVectors * kBytes / sizeof(T);
    int64_t column = 0;
    for (; column + kColumns <= p.strips * kStrip<T>; column += kColumns)
      add_lists<kBytes, kVectors>(p, column);
    for (; column < p.strips * kStrip<T>; column += kStrip<T>)
      add_lists<kBytes, kStrip1>(p, column);
  }
};

// Sums of the last columns, which may be less than a vector, pass through a tile of their own.
template <typename T>
void add_last_columns(TileProduct<T> tile, int64_t columns) {
  alignas(64) T sum[kTileRows * kStrip<T>];
  T* const out = std::exchange(tile.sum, sum);
  const int64_t stride = std::exchange(tile.stride, kStrip<T>);
  for (int64_t r = 0; r < tile.rows && tile.add; ++r)
    std::copy_n(out + r * stride, columns, sum + r * kStrip<T>);
  add_products(tile);
  for (int64_t r = 0; r < tile.rows; ++r)
    std::copy_n(sum + r * kStrip<T>, columns, out + r * stride);
}

// By tiles of rows of V, from `row` on and from inner index k and strip s on.
template <typename T>
TileProduct<T> tile_at(const RowsProduct<T>& p, int64_t row, int64_t k, int64_t inner, int64_t s) {
  return {std::min(kTileRows, p.rows - row),
          std::min(kStrip<T>, p.columns - s * kStrip<T>),
          inner,
          p.V + row * p.V_row + k * p.V_inner,
          p.V_row,
          p.V_inner,
          z_at(p, k, s),
          p.packed ? kStrip<T> : p.columns,
          p.out + row * p.columns + s * kStrip<T>,
          p.columns,
          p.add || k > 0};
}

template <typename T>
void add_strip(TileProduct<T> tile) {
  const int64_t columns = tile.columns;
  tile.columns = padded<T>(columns);
  if (columns == tile.columns)
    add_products(tile);
  else
    add_last_columns(tile, columns);
}

// Whole strips by lists; the last one, where it is not, as it is.
template <typename T>
void multiply_lists(const RowsProduct<T>& p, const std::vector<int64_t>& rows) {
  const int64_t chunk = groups_of(p.inner, groups_of(p.inner, kListChunk));
  const int64_t whole = p.columns / kStrip<T>;
  BlockBuffer<TileLists<T>> lists(rows.size());
  alignas(64) T y[kListChunk * kPass * kStrip<T>];
  for (int64_t k = 0; k < p.inner; k += chunk) {
    const int64_t inner = std::min(chunk, p.inner - k);
    for (size_t t = 0; t < rows.size(); ++t) TileOfRows<T>(p, rows[t]).list(k, inner, lists[t]);
    for (int64_t s = 0; s < whole; s += kPass) {
      const int64_t strips = std::min(kPass, whole - s);
      for (int64_t j = 0; j < inner; ++j)
        for (int64_t t = 0; t < strips; ++t)
          std::memcpy(y + (j * kPass + t) * kStrip<T>, z_at(p, k + j, s + t),
                      sizeof(T) * kStrip<T>);
      for (size_t t = 0; t < rows.size(); ++t)
        run_at_level<AddLists>(ListsProduct<T>{
            std::min(kTileRows, p.rows - rows[t]), strips, &lists[t], y,
            p.out + rows[t] * p.columns + s * kStrip<T>, p.columns, p.add || k > 0});
    }
    for (size_t t = 0; t < rows.size() && whole < strips_of<T>(p.columns); ++t)
      add_strip(tile_at(p, rows[t], k, inner, whole));
  }
}

template <typename T>
void multiply_tiles(const RowsProduct<T>& p, const std::vector<int64_t>& rows) {
  for (int64_t k = 0; k < p.inner; k += kTileChunk)
    for (int64_t s = 0; s < strips_of<T>(p.columns); ++s)
      for (const int64_t row : rows)
        add_strip(tile_at(p, row, k, std::min(kTileChunk, p.inner - k), s));
}

}  // namespace

template <typename T>
T evenness(bool unit, int64_t m, const T* norm) {
  T shortest = std::numeric_limits<T>::infinity(), longest = 0;
  for (int64_t j = 0; j < m; ++j) {
    if (norm[j] == T(0)) continue;
    const T square = unit ? norm[j] / norm[j] : norm[j];
    if (std::isnan(square)) return square;  // then all entries count
    shortest = std::min(shortest, square);
    longest = std::max(longest, square);
  }
  return longest > T(0) ? std::sqrt(shortest / longest) : T(1);
}

template <typename T>
void multiply_rows(const RowsProduct<T>& p) {
  const int64_t most = product_rows(p.inner) / kTileRows * kTileRows;
  for (int64_t i = 0; i < p.rows; i += most) {
    std::vector<int64_t> few, many;  // tiles, by their first rows
    for (int64_t row = i; row < std::min(p.rows, i + most); row += kTileRows)
      (TileOfRows<T>(p, row).few() ? few : many).push_back(row);
    if (!few.empty()) multiply_lists(p, few);
    multiply_tiles(p, many);
  }
}

#define OTLOSS_INSTANTIATE(T)                   \
  template T evenness(bool, int64_t, const T*); \
  template void multiply_rows(const RowsProduct<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
