// Cost rows from points, a tile at a time: sums over the coordinates stay in registers, then comes
// the cost's formula. Few dimensions take differences, more take products (tile.cpp).
//
// Floor: d multiply-adds per entry, 2 x 16 floats per clock with AVX-512, so about d / 32 clocks an
// entry; from about d = 32 on this exceeds the 0.18 ns that the rest of an iteration takes.
#include "cpu/cost/points.h"

#include <algorithm>
#include <cmath>

#include "core/math.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu {
namespace {

// C_j from products with the columns of a strip; `self`: the column of the row's own point, or less
// than 0. Distances of which the expanded form has lost half of the digits are computed again
// directly.
template <typename Cost, typename T>
OTLOSS_INLINE void row_from_products(int64_t columns, int64_t d, T hx, const T* hy, const T* x,
                                     const T* zy, int64_t self, const T* products, T* C) {
  int cancelled = 0;
#pragma omp simd reduction(+ : cancelled)
  for (int64_t j = 0; j < columns; ++j) {
    const T scale = hx + hy[j];
    const T left = scale - T(2) * products[j] - cancellation_limit<T>() * scale;
    cancelled += left <= T(0);
    C[j] = Cost::from_product(hx, hy[j], products[j]);
  }
  if constexpr (!Cost::kUnitNorm) {
    const bool has_self = self >= 0 && self < columns;
    if (cancelled <= (has_self ? 1 : 0)) return;
    for (int64_t j = 0; j < columns; ++j) {
      if (j == self || Cost::squared(C[j]) > cancellation_limit<T>() * (hx + hy[j])) continue;
      const T* y = zy + j * d;
      T exact = 0;
#pragma omp simd reduction(+ : exact)
      for (int64_t k = 0; k < d; ++k) exact += (x[k] - y[k]) * (x[k] - y[k]);
      C[j] = Cost::from_difference(exact);
    }
  }
}

// `count` rows of a strip, from the one of `row` and `column` on, of inner products (count,
// kStrip); the caller sets the costs of a point against itself.
template <typename Cost, typename T>
OTLOSS_SIMD void costs_from_products(Cost, const CostRows<T>& p, int64_t row, int64_t column,
                                     int64_t count, const T* products) {
  const int64_t d = p.to->d, columns = p.end - column;
  for (int64_t i = row; i < row + count; ++i, products += kStrip<T>) {
    const auto costs = [&](int64_t some) OTLOSS_ALWAYS_INLINE {
      row_from_products<Cost>(some, d, p.from->norm[i], p.to->h.data() + column, p.from->z + i * d,
                              p.to->z + column * d, p.symmetric ? i - column : -1, products,
                              p.at(i, column));
    };
    if (columns >= kStrip<T>)  // a constant number takes no loop
      costs(kStrip<T>);
    else
      costs(columns);
  }
}

template <typename Cost, typename T>
OTLOSS_SIMD void costs_from_differences(Cost, int64_t count, T* C) {
  for (int64_t j = 0; j < count; ++j) C[j] = Cost::from_difference(C[j]);
}

template <typename Cost, typename T>
OTLOSS_SIMD void weigh(Cost, int64_t count, const T* C, T* W) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) W[j] = Cost::gradient_weight(W[j], C[j]);
}

// kDifferenceRows rows, or fewer at the end, from `row` on.
template <typename T>
void difference_rows(CostKind kind, const CostRows<T>& p, int64_t row) {
  const int64_t d = p.to->d, rows = std::min(kDifferenceRows, p.first + p.rows - row);
  const T *x = p.from->z + row * d, *y = p.to->strips.data() + p.begin * d;
  const int64_t whole = (p.end - p.begin) / kStrip<T>, rest = p.end - p.begin - whole * kStrip<T>;
  squared_differences(Differences<T>{rows, d, whole, x, y, p.at(row, p.begin), p.stride});
  if (rest > 0) {
    alignas(64) T squares[kDifferenceRows * kStrip<T>];
    squared_differences(
        Differences<T>{rows, d, 1, x, y + whole * d * kStrip<T>, squares, kStrip<T>});
    for (int64_t r = 0; r < rows; ++r)
      std::copy_n(squares + r * kStrip<T>, rest, p.at(row + r, p.end - rest));
  }
  dispatch_cost(kind, [&](auto cost) {
    if constexpr (!decltype(cost)::kUnitNorm)
      for (int64_t r = 0; r < rows; ++r)
        costs_from_differences(cost, p.end - p.begin, p.at(row + r, p.begin));
  });
}

// A tile from products, from `row` on by the strip from `column` on.
template <typename T>
void product_tile(CostKind kind, const CostRows<T>& p, int64_t row, int64_t column) {
  const int64_t d = p.to->d, rows = std::min(kTileRows, p.first + p.rows - row);
  const int64_t columns = padded<T>(std::min(kStrip<T>, p.end - column));
  alignas(64) T sum[kTileRows * kStrip<T>];
  add_products(TileProduct<T>{rows, columns, d, p.from->z + row * d, d, 1,
                              p.to->strips.data() + column * d, kStrip<T>, sum, kStrip<T>, false});
  dispatch_cost(kind, [&](auto cost) { costs_from_products(cost, p, row, column, rows, sum); });
}

// Few coordinates: each coordinate of a row keeps a strip of partial sums, added up at the end.
template <typename T>
OTLOSS_SIMD void apply_lanes(const ApplyRows<T>& p) {
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
      (k < d ? p.product[r * d + k] : p.sum[r]) = total;
    }
  }
}

template <typename T>
OTLOSS_SIMD void apply_products(const ApplyRows<T>& p) {
  const int64_t m = p.to->m;
  for (int64_t r = 0; r < p.rows; ++r) {
    T total = 0;
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < m; ++j) total += p.V[r * p.stride + j];
    p.sum[r] = total;
  }
  multiply_rows(
      RowsProduct<T>{p.rows, m, p.to->d, p.V, p.stride, 1, p.coordinates, true, p.product, false});
}

}  // namespace

template <typename T>
PackedCloud<T>::PackedCloud(const CloudRows<T>& cloud)
    : CloudRows<T>(cloud),
      strips(strips_of<T>(cloud.m) * cloud.d * kStrip<T>),
      h(strips_of<T>(cloud.m) * kStrip<T>) {
  std::copy_n(cloud.norm, cloud.m, h.begin());
  pack(Packing<T>{cloud.m, cloud.d, cloud.z, cloud.d, false, strips.data()});
}

template <typename T>
void cost_rows(CostKind kind, const CostRows<T>& p) {
  const int64_t end = p.first + p.rows;
  const bool unit = traits_of(kind).unit_norm, difference = !unit && p.to->d <= kDirectDims;
  for (int64_t row = p.first; difference && row < end; row += kDifferenceRows)
    difference_rows(kind, p, row);
  for (int64_t column = p.begin; !difference && column < p.end; column += kStrip<T>)
    for (int64_t row = p.first; row < end; row += kTileRows) {
      if (p.half && row >= column + kStrip<T>) break;
      product_tile(kind, p, row, column);
    }
  if (!p.symmetric) return;
  // A point is at distance 0 from itself; a point of zero norm has no direction and costs 1.
  for (int64_t i = std::max(p.first, p.begin); i < std::min(end, p.end); ++i)
    if (!unit || p.from->norm[i] > T(0)) *p.at(i, i) = 0;
}

template <typename T>
void weight_rows(CostKind kind, int64_t count, const T* C, T* W) {
  dispatch_cost(kind, [&](auto cost) { weigh(cost, count, C, W); });
}

template <typename T>
void apply_rows(const ApplyRows<T>& p) {
  if (p.to->d <= kLaneDims)
    apply_lanes(p);
  else
    apply_products(p);
}

#define OTLOSS_INSTANTIATE(T)                                 \
  template struct PackedCloud<T>;                             \
  template void cost_rows(CostKind, const CostRows<T>&);      \
  template void weight_rows(CostKind, int64_t, const T*, T*); \
  template void apply_rows(const ApplyRows<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
