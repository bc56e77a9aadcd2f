// Cost rows from points: a (kTileRows x kStrip) tile of sums stays in registers while the
// coordinates are added to it, kTileRows * kStrip multiply-adds per kTileRows + kStrip loads. Then
// the cost's formula, on the tile. What leaves is a few rows of C, used at once and overwritten.
//
// Floor: d multiply-adds per entry, 2 x 16 floats per clock with AVX-512, so about d / 32 clocks an
// entry; from about d = 32 on this exceeds the 0.18 ns that the rest of an iteration takes.
#include "points.h"

#include <algorithm>
#include <cmath>

#include "math.h"
#include "parallel.h"
#include "products.h"

namespace otloss::cpu {
namespace {

constexpr int64_t kTileRows = 4;
static_assert(kMostRows % kTileRows == 0, "rows are made in whole tiles");

template <typename T>
struct Tile {
  alignas(64) T sum[kTileRows][kStrip<T>];
};

// sum[r][j] = sum_k x_rk y_kj (or the squared differences), y (d, kStrip).
template <bool kDifference, typename T>
OTLOSS_INLINE void tile_sums(int64_t d, const T* const* x, const T* y, Tile<T>& tile) {
  T s0[kStrip<T>] = {}, s1[kStrip<T>] = {}, s2[kStrip<T>] = {}, s3[kStrip<T>] = {};
  static_assert(kTileRows == 4, "four rows are unrolled");
  for (int64_t k = 0; k < d; ++k, y += kStrip<T>) {
    const T x0 = x[0][k], x1 = x[1][k], x2 = x[2][k], x3 = x[3][k];
#pragma omp simd
    for (int64_t j = 0; j < kStrip<T>; ++j) {
      const T v = y[j];
      s0[j] += kDifference ? (x0 - v) * (x0 - v) : x0 * v;
      s1[j] += kDifference ? (x1 - v) * (x1 - v) : x1 * v;
      s2[j] += kDifference ? (x2 - v) * (x2 - v) : x2 * v;
      s3[j] += kDifference ? (x3 - v) * (x3 - v) : x3 * v;
    }
  }
  std::copy(s0, s0 + kStrip<T>, tile.sum[0]);
  std::copy(s1, s1 + kStrip<T>, tile.sum[1]);
  std::copy(s2, s2 + kStrip<T>, tile.sum[2]);
  std::copy(s3, s3 + kStrip<T>, tile.sum[3]);
}

template <typename Cost, typename T>
OTLOSS_INLINE void costs_from_differences(T* sum) {
  if constexpr (!Cost::kUnitNorm)
    for (int64_t j = 0; j < kStrip<T>; ++j) sum[j] = Cost::from_difference(sum[j]);
}

// Rows first_row ... of one strip of columns.
template <typename Cost, typename T>
OTLOSS_INLINE void cost_tile(const CostRows<T>& p, int64_t first_row, int64_t first) {
  const int64_t d = p.to->d, rows = std::min(kTileRows, p.rows - first_row);
  const int64_t width = std::min(kStrip<T>, p.end - first);
  const bool difference = !Cost::kUnitNorm && d <= kDirectDims;
  const T* x[kTileRows];
  for (int64_t r = 0; r < kTileRows; ++r) x[r] = p.z + (first_row + std::min(r, rows - 1)) * d;
  const T* y = p.to->strips.data() + first * d;
  Tile<T> tile;
  if (difference)
    tile_sums<true>(d, x, y, tile);
  else
    tile_sums<false>(d, x, y, tile);
  for (int64_t r = 0; r < rows; ++r) {
    T* sum = tile.sum[r];
    if (difference)
      costs_from_differences<Cost>(sum);
    else
      costs_from_products<Cost>(ProductRow<T>{kStrip<T>, width, d, p.h[first_row + r],
                                              p.to->h.data() + first, x[r], p.to->z + first * d,
                                              p.diagonal + first_row + r - first, sum});
    T* C = p.C + (first_row + r) * p.stride + (first - p.begin);
    if (width == kStrip<T>)
      std::copy(sum, sum + kStrip<T>, C);
    else
      std::copy(sum, sum + width, C);
  }
}

template <typename Cost, typename T>
OTLOSS_INLINE void cost_rows_body(const CostRows<T>& p) {
  for (int64_t first = p.begin; first < p.end; first += kStrip<T>)
    for (int64_t r = 0; r < p.rows; r += kTileRows) cost_tile<Cost>(p, r, first);
  // A point is at distance 0 from itself; a point of zero norm has no direction and costs 1.
  for (int64_t r = 0; r < p.rows; ++r) {
    const int64_t j = p.diagonal + r;
    if (j >= p.begin && j < p.end && (!Cost::kUnitNorm || p.h[r] > T(0)))
      p.C[r * p.stride + j - p.begin] = 0;
  }
}

// Few coordinates: each coordinate of a row keeps a strip of partial sums, added up at the end.
template <typename T>
OTLOSS_INLINE void apply_lanes(const ApplyRows<T>& p) {
  const int64_t d = p.to->d, m = p.to->m;
  for (int64_t r = 0; r < p.rows; ++r) {
    alignas(64) T lanes[kLaneDims + 1][kStrip<T>] = {};
    for (int64_t first = 0; first < m; first += kStrip<T>) {
      const T* y = p.to->strips.data() + first * d;
      alignas(64) T v[kStrip<T>];
      const T* row = p.V + r * p.stride + first;
      if (first + kStrip<T> <= m) {
        std::copy(row, row + kStrip<T>, v);
      } else {
        std::fill(v, v + kStrip<T>, T(0));
        std::copy(row, row + (m - first), v);
      }
      for (int64_t j = 0; j < kStrip<T>; ++j) lanes[d][j] += v[j];
      for (int64_t k = 0; k < d; ++k)
        for (int64_t j = 0; j < kStrip<T>; ++j) lanes[k][j] += v[j] * y[k * kStrip<T> + j];
    }
    for (int64_t k = 0; k <= d; ++k) {
      T total = 0;
      for (int64_t j = 0; j < kStrip<T>; ++j) total += lanes[k][j];
      (k < d ? p.product[r * p.to->padded_d + k] : p.sum[r]) = total;
    }
  }
}

// out[r][:] += sum_j V_rj y_j[:] for a tile of rows and a strip of coordinates, in registers.
template <typename T>
OTLOSS_INLINE void product_tile(int64_t count, const T* const* V, const T* y, int64_t y_stride,
                                T* const* out) {
  static_assert(kTileRows == 4, "four rows are unrolled");
  T s0[kStrip<T>] = {}, s1[kStrip<T>] = {}, s2[kStrip<T>] = {}, s3[kStrip<T>] = {};
  for (int64_t j = 0; j < count; ++j, y += y_stride) {
    const T v0 = V[0][j], v1 = V[1][j], v2 = V[2][j], v3 = V[3][j];
#pragma omp simd
    for (int64_t k = 0; k < kStrip<T>; ++k) {
      const T value = y[k];
      s0[k] += v0 * value;
      s1[k] += v1 * value;
      s2[k] += v2 * value;
      s3[k] += v3 * value;
    }
  }
  const T* sums[kTileRows] = {s0, s1, s2, s3};
  for (int64_t r = 0; r < kTileRows; ++r)
    if (out[r])
      for (int64_t k = 0; k < kStrip<T>; ++k) out[r][k] += sums[r][k];
}

// Many coordinates, in chunks of columns that stay in the cache for all rows.
template <typename T>
OTLOSS_INLINE void apply_products(const ApplyRows<T>& p) {
  constexpr int64_t kChunk = 512;
  const int64_t m = p.to->m, width = p.to->padded_d;
  std::fill(p.product, p.product + p.rows * width, T(0));
  for (int64_t r = 0; r < p.rows; ++r) {
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < m; ++j) total += p.V[r * p.stride + j];
    p.sum[r] = total;
  }
  for (int64_t k = 0; k < width; k += kStrip<T>)
    for (int64_t j = 0; j < m; j += kChunk)
      for (int64_t i = 0; i < p.rows; i += kTileRows) {
        const T* V[kTileRows];
        T* out[kTileRows];
        for (int64_t r = 0; r < kTileRows; ++r) {
          const int64_t row = std::min(i + r, p.rows - 1);
          V[r] = p.V + row * p.stride + j;
          out[r] = i + r < p.rows ? p.product + row * width + k : nullptr;
        }
        product_tile(std::min(kChunk, m - j), V, p.to->rows.data() + j * width + k, width, out);
      }
}

template <typename T>
OTLOSS_INLINE void apply_rows_body(const ApplyRows<T>& p) {
  if (p.to->d <= kLaneDims)
    apply_lanes(p);
  else
    apply_products(p);
}

template <typename Cost, typename T>
OTLOSS_INLINE void weight_rows_body(int64_t count, const T* C, T* W) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) W[j] = Cost::gradient_weight(W[j], C[j]);
}

#define OTLOSS_PER_COST(Cost, T)                                                      \
  OTLOSS_SIMD void cost_rows(Cost, const CostRows<T>& p) { cost_rows_body<Cost>(p); } \
  OTLOSS_SIMD void weight_rows(Cost, int64_t count, const T* C, T* W) {               \
    weight_rows_body<Cost>(count, C, W);                                              \
  }
OTLOSS_PER_COST(SqEuclidean, float)
OTLOSS_PER_COST(SqEuclidean, double)
OTLOSS_PER_COST(Euclidean, float)
OTLOSS_PER_COST(Euclidean, double)
OTLOSS_PER_COST(Cosine, float)
OTLOSS_PER_COST(Cosine, double)
#undef OTLOSS_PER_COST

}  // namespace

template <typename T>
PackedCloud<T>::PackedCloud(int64_t m, int64_t d, const T* z, const T* norm)
    : m(m), d(d), z(z), norm(norm), padded_d((d + kStrip<T> - 1) / kStrip<T> * kStrip<T>) {
  if (d > kLaneDims) {
    rows.assign(m * padded_d, T(0));
    for (int64_t j = 0; j < m; ++j) std::copy(z + j * d, z + (j + 1) * d, &rows[j * padded_d]);
  }
  const int64_t count = (m + kStrip<T> - 1) / kStrip<T>;
  strips.resize(count * d * kStrip<T>);
  h.assign(count * kStrip<T>, T(0));
  std::copy(norm, norm + m, h.begin());
  for (int64_t j = 0; j < m; ++j) {
    T* strip = strips.data() + j / kStrip<T> * d * kStrip<T> + j % kStrip<T>;
    for (int64_t k = 0; k < d; ++k) strip[k * kStrip<T>] = z[j * d + k];
  }
}
template struct PackedCloud<float>;
template struct PackedCloud<double>;

void cost_rows(CostKind kind, const CostRows<float>& args) {
  dispatch_cost(kind, [&](auto cost) { cost_rows(cost, args); });
}
void cost_rows(CostKind kind, const CostRows<double>& args) {
  dispatch_cost(kind, [&](auto cost) { cost_rows(cost, args); });
}
void weight_rows(CostKind kind, int64_t count, const float* C, float* W) {
  dispatch_cost(kind, [&](auto cost) { weight_rows(cost, count, C, W); });
}
void weight_rows(CostKind kind, int64_t count, const double* C, double* W) {
  dispatch_cost(kind, [&](auto cost) { weight_rows(cost, count, C, W); });
}

OTLOSS_SIMD void apply_rows(const ApplyRows<float>& p) { apply_rows_body(p); }
OTLOSS_SIMD void apply_rows(const ApplyRows<double>& p) { apply_rows_body(p); }

}  // namespace otloss::cpu
