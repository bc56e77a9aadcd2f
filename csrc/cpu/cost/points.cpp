// Cost rows from points, a tile at a time: sums over the coordinates stay in registers, then comes
// the cost's formula. Few dimensions take differences, more take products (tile.cpp).
//
// Floor: d multiply-adds per entry, 2 x 16 floats per clock with AVX-512, so about d / 32 clocks an
// entry; from about d = 32 on this exceeds the 0.18 ns that the rest of an iteration takes.
#include "cpu/cost/points.h"

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "core/math.h"
#include "cpu/simd/rows_product.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu {
namespace {

// Distances of which the expanded form has lost half of the digits, computed again directly.
template <typename Cost, typename T>
OTLOSS_SIMD void mend_cancelled(Cost, const CostRows<T>& p, int64_t row, int64_t column,
                                int64_t rows, int64_t columns) {
  const int64_t d = p.to->d;
  for (int64_t i = row; i < row + rows; ++i) {
    const T *x = p.from->z + i * d, hx = p.from->norm[i];
    T* C = p.at(i, column);
    for (int64_t j = 0; j < columns; ++j) {
      const bool self = p.symmetric && i == column + j;
      if (self || Cost::squared(C[j]) > cancellation_limit<T>() * (hx + p.to->h[column + j]))
        continue;
      const T* y = p.to->z + (column + j) * d;
      T exact = 0;
#pragma omp simd reduction(+ : exact)
      for (int64_t k = 0; k < d; ++k) exact += (x[k] - y[k]) * (x[k] - y[k]);
      C[j] = Cost::from_difference(exact);
    }
  }
}

// The costs of a tile, from `row` and `column` on, from its inner products (rows, kStrip); the
// caller sets those of a point against itself. Returns how many distances have lost half of their
// digits; those count too.
template <typename Cost, typename T>
OTLOSS_SIMD int64_t costs_from_products(Cost, const CostRows<T>& p, int64_t row, int64_t column,
                                        int64_t rows, int64_t columns, const T* products) {
  using Count = std::conditional_t<sizeof(T) == 4, int32_t, int64_t>;  // in lanes as wide as T
  alignas(64) Count cancelled[kStrip<T>] = {};
  const T* hy = p.to->h.data() + column;
  const auto costs = [&](int64_t some) OTLOSS_ALWAYS_INLINE {
    for (int64_t i = row; i < row + rows; ++i, products += kStrip<T>) {
      const T hx = p.from->norm[i];
      T* C = p.at(i, column);
#pragma omp simd
      for (int64_t j = 0; j < some; ++j) {
        if constexpr (!Cost::kUnitNorm) {
          const T scale = hx + hy[j];
          const T left = scale - T(2) * products[j] - cancellation_limit<T>() * scale;
          cancelled[j] += left <= T(0);
        }
        C[j] = Cost::from_product(hx, hy[j], products[j]);
      }
    }
  };
  if (columns == kStrip<T>)  // a constant number takes no loop
    costs(kStrip<T>);
  else
    costs(columns);
  int64_t count = 0;
  for (const Count lane : cancelled) count += lane;
  return count;
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

// The part of a tile of half a symmetric matrix that no tile makes below the diagonal: those do up
// to the last one that begins within the block of the row's own point.
template <typename T>
void mirror_tile(const CostRows<T>& p, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  for (int64_t i = row, next; i < row + rows; i = next) {
    const int64_t block_end = (i / kBlock<T> + 1) * kBlock<T>;
    next = std::min(row + rows, block_end);
    const int64_t j = std::max(column, groups_of(block_end, kTileRows) * kTileRows);
    if (j < column + columns)
      transpose(next - i, column + columns - j, p.at(i, j), p.stride, p.at(j, i), p.stride);
  }
}

// A tile from products, from `row` on by the strip from `column` on, which begins on the diagonal
// with one of its two blocks.
template <typename T>
void product_tile(CostKind kind, const CostRows<T>& p, int64_t row, int64_t column) {
  const int64_t d = p.to->d, rows = std::min(kTileRows, p.first + p.rows - row);
  const T* strip = p.to->strips.data() + column * d;
  if (p.half && row >= column + kBlock<T>) column += kBlock<T>, strip += kBlock<T>;
  const int64_t columns = std::min(groups_of(column + 1, kStrip<T>) * kStrip<T>, p.end) - column;
  for (int64_t i = row; i < row + rows; ++i)  // comes to the cache during the product
    for (int64_t j = 0; j < columns; j += kBlock<T>) __builtin_prefetch(p.at(i, column + j), 1);
  alignas(64) T sum[kTileRows * kStrip<T>];
  add_products(TileProduct<T>{rows, padded<T>(columns), d, p.from->z + row * d, d, 1, strip,
                              kStrip<T>, sum, kStrip<T>, false});
  const int64_t itself =  // distances of points to themselves
      p.symmetric ? std::min(row + rows, column + columns) - std::max(row, column) : 0;
  dispatch_cost(kind, [&](auto cost) {
    [[maybe_unused]] const int64_t lost =
        costs_from_products(cost, p, row, column, rows, columns, sum);
    if constexpr (!decltype(cost)::kUnitNorm)
      if (lost > std::max<int64_t>(0, itself)) mend_cancelled(cost, p, row, column, rows, columns);
  });
  if (p.half) mirror_tile(p, row, rows, column, columns);
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
  multiply_rows(RowsProduct<T>{p.rows, m, p.to->d, p.V, p.stride, 1, p.sum, p.even, p.coordinates,
                               true, p.product, false});
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
