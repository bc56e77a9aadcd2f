// Cost matrices and their gradients:
//
//     prepare:   z = x - centre, |z|^2  (cosine: z = x / |x|, |x|)
//     costs:     C = cost(|zx|^2, |zy|^2, zx zy^T), a tile at a time
//     weights:   V = W * gradient_weight(C), its row and column sums; W may be a plan, made a row
//                at a time
//     product:   V zy, V^T zx
//     gradient:  grad += zx * row_sum - V zy  (cosine: its tangent part / |x|)
//
// Costs and products are bound by arithmetic where there are many coordinates (tile.cpp), all the
// rest are bandwidth-bound passes over C or over the points, whose loops vectorise along rows.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/costs.h"
#include "cpu/cost/points.h"
#include "cpu/parallel.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

// Elements of a row-wise pass that are worth a thread of their own.
constexpr int64_t kGrain = 1 << 15;

// Calls function(row) for all rows of a matrix with `width` columns.
void for_each_row(int64_t rows, int64_t width, FunctionRef<void(int64_t row)> function) {
  const int64_t grain = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, width));
  parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

// ------------------------------------------------------------------------------------- clouds

template <typename T>
OTLOSS_SIMD void add_row(int64_t d, const T* x, double* sum) {
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) sum[k] += static_cast<double>(x[k]);
}

// The mean, over all clouds, of the points of positive weight: any centre is right, a near one
// keeps digits. Accumulated in double.
template <typename T>
std::vector<T> centre(const std::vector<CloudGroup<T>>& clouds, int64_t p) {
  const int64_t d = clouds.front().d;
  std::vector<double> sum(d);
  int64_t count = 0;
  for (const CloudGroup<T>& cloud : clouds)
    for (int64_t i = 0; i < cloud.n; ++i) {
      if (cloud.weight && !(cloud.weight[p * cloud.n + i] > T(0))) continue;
      add_row(d, cloud.x + (p * cloud.n + i) * d, sum.data());
      ++count;
    }
  std::vector<T> mean(d);
  for (int64_t k = 0; k < d; ++k) mean[k] = static_cast<T>(sum[k] / std::max<int64_t>(1, count));
  return mean;
}

// z = (x - shift) * scale, returns |z|^2.
template <typename T>
OTLOSS_SIMD T prepare_row(int64_t d, const T* x, const T* shift, T scale, T* z) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) {
    const T value = (x[k] - shift[k]) * scale;
    z[k] = value;
    sum += value * value;
  }
  return sum;
}

// ------------------------------------------------------------------------------------- costs

// Coordinates from which on half of a symmetric matrix and its reflection is less work than all.
constexpr int64_t kReflectDims = 128;

// Copies the part above the diagonal to the part below.
template <typename T>
void reflect(int64_t n, T* C) {
  constexpr int64_t kTile = 32;
  for_each_row(strips_of<T>(n), n * kTile, [&](int64_t tile) {
    const int64_t i0 = tile * kTile;
    for (int64_t j0 = 0; j0 <= i0; j0 += kTile)
      for (int64_t i = i0; i < std::min(n, i0 + kTile); ++i)
        for (int64_t j = j0; j < std::min(i, j0 + kTile); ++j) C[i * n + j] = C[j * n + i];
  });
}

template <typename T>
void cost_matrix(const CostGroup<T>& group, int64_t p, CostKind kind) {
  const int64_t n = group.n, m = group.m, d = group.d;
  const PackedCloud<T> to(m, d, group.zy + p * m * d, group.hy + p * m);
  const PackedCloud<T> other(group.symmetric ? 0 : n, d, group.zx + p * n * d, group.hx + p * n);
  const PackedCloud<T>& from = group.symmetric ? to : other;
  const bool half = group.symmetric && d >= kReflectDims;
  const int64_t step = d <= kDirectDims ? rows_at_once(d) : product_rows<T>(n, thread_count());
  T* C = group.C + p * n * m;
  for_each_row(groups_of(n, step), step * m * d, [&](int64_t block) {
    if (interrupted()) return;
    const int64_t first = block * step, begin = half ? first / kStrip<T> * kStrip<T> : 0;
    cost_rows(kind, CostRows<T>{first, std::min(step, n - first), begin, m, group.symmetric, &from,
                                &to, C + first * m + begin, m});
  });
  if (half) reflect(n, C);
}

// ------------------------------------------------------------------------------------ gradient

template <typename Cost, typename T>
OTLOSS_SIMD T weight_row(Cost, int64_t m, const T* W, const T* C, T* V, T* col_sum) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < m; ++j) {
    const T value = Cost::gradient_weight(W[j], C[j]);
    V[j] = value;
    col_sum[j] += value;
    sum += value;
  }
  return sum;
}

// V <- V + V^T in tiles; both sums become their sum.
template <typename T>
void symmetrise(int64_t n, T* V, T* row_sum, T* col_sum) {
  constexpr int64_t kTile = 32;
  for (int64_t i0 = 0; i0 < n; i0 += kTile)
    for (int64_t j0 = i0; j0 < n; j0 += kTile)
      for (int64_t i = i0; i < std::min(n, i0 + kTile); ++i)
        for (int64_t j = std::max(i, j0); j < std::min(n, j0 + kTile); ++j)
          V[i * n + j] = V[j * n + i] = V[i * n + j] + V[j * n + i];
  for (int64_t i = 0; i < n; ++i) row_sum[i] = col_sum[i] = row_sum[i] + col_sum[i];
}

// V and its sums for problem p; row(i, V) is the i-th row of W, which may be made in V.
template <typename T>
void weigh_rows(const CostWeightGroup<T>& group, int64_t p, CostKind kind, bool split,
                bool symmetrised, FunctionRef<const T*(int64_t i, T* V)> row) {
  const int64_t n = group.n, m = group.m;
  const RowParts parts(n, m, split);
  PartSums<T> columns(parts, m);
  T* row_sum = group.row_sum + p * n;
  parts.for_each([&](int64_t part, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t at = (p * n + i) * m;
      T* V = group.V + at;
      const T* W = row(i, V);
      dispatch_cost(kind, [&](auto cost) {
        row_sum[i] = weight_row(cost, m, W, group.C + at, V, columns.part(part));
      });
    }
  });
  T* col_sum = group.col_sum + p * m;
  std::copy_n(columns.total(), m, col_sum);
  if (symmetrised) symmetrise(n, group.V + p * n * m, row_sum, col_sum);
}

}  // namespace

template <typename T>
void prepare_clouds(const std::vector<CloudGroup<T>>& clouds, CostKind kind) {
  const int64_t d = clouds.front().d;
  const std::vector<T> zero(d);
  for (int64_t p = 0; p < clouds.front().batch; ++p) {
    const bool unit = traits_of(kind).unit_norm;
    const std::vector<T> shift = unit ? zero : centre(clouds, p);
    for (const CloudGroup<T>& cloud : clouds) {
      for_each_row(cloud.n, d, [&](int64_t i) {
        const int64_t row = p * cloud.n + i;
        const T* x = cloud.x + row * d;
        T* z = cloud.z + row * d;
        if (cloud.weight && !(cloud.weight[row] > T(0))) {  // whatever is there, NaN included
          std::fill(z, z + d, T(0));
          cloud.norm[row] = 0;
          return;
        }
        const T norm2 = prepare_row(d, x, shift.data(), T(1), z);
        cloud.norm[row] = unit ? std::sqrt(norm2) : norm2;
        if (unit && norm2 > T(0)) prepare_row(d, x, shift.data(), T(1) / std::sqrt(norm2), z);
      });
    }
  }
}

template <typename T>
void cost_matrices(const CostGroup<T>& group, CostKind kind) {
  parallel_problems(group.batch, [&](int64_t p, bool) { cost_matrix(group, p, kind); });
}

template <typename T>
void cost_weights(const CostWeightGroup<T>& group, CostKind kind) {
  const int64_t n = group.n, m = group.m;
  parallel_problems(group.batch, [&](int64_t p, bool split) {
    weigh_rows<T>(group, p, kind, split, group.symmetrise,
                  [&](int64_t i, T* /*V*/) { return group.W + (p * n + i) * m; });
  });
}

// The plan's row is made in the place of V and weighted while it is in the cache.
template <typename T>
void plan_weights(const PlanWeightGroup<T>& group, CostKind kind, double eps) {
  const int64_t n = group.n, m = group.m;
  const T k = factor<T>(eps);
  parallel_problems(group.batch, [&](int64_t p, bool split) {
    const T *f = group.f + p * n, *g = group.g + p * m;
    std::vector<T> F(n), G(m);
    for (int64_t i = 0; i < n; ++i) F[i] = k * f[i];
    absorb_weights(m, k, g, group.b + p * m, G.data());
    // With one potential the plan is symmetric already.
    const bool symmetric = group.symmetrise && std::equal(f, f + n, g);
    const T scale = group.coefficient * group.grad[p] * (symmetric ? T(2) : T(1));
    weigh_rows<T>(group, p, kind, split, group.symmetrise && !symmetric, [&](int64_t i, T* V) {
      const int64_t row = p * n + i;
      plan_rows(PlanRows<T>{1, m, k, scale, group.C + row * m, group.a + row, &F[i], G.data(), V});
      return V;
    });
  });
}

template <typename T>
void multiply(const ProductGroup<T>& group) {
  const int64_t n = group.n, m = group.m, d = group.d;
  parallel_problems(group.batch, [&](int64_t p, bool) {
    BlockVector<T> z(strips_of<T>(d) * m * kStrip<T>);
    pack(Packing<T>{d, m, group.z + p * m * d, d, true, z.data()});
    const int64_t step = product_rows<T>(n, thread_count());
    for_each_row(groups_of(n, step), step * m * d, [&](int64_t block) {
      if (interrupted()) return;
      const int64_t first = block * step, row = p * n + first;
      const T* V = group.V + p * n * m + first * (group.transposed ? 1 : m);
      multiply_rows(RowsProduct<T>{std::min(step, n - first), m, d, V, group.transposed ? n : m,
                                   group.transposed, z.data(), group.out + row * d});
    });
  });
}

template <typename T>
void cost_gradient(const CostGradientGroup<T>& group, CostKind kind) {
  const int64_t d = group.d;
  const bool unit = traits_of(kind).unit_norm;
  for_each_row(group.batch * group.n, d, [&](int64_t i) {
    const T *z = group.z + i * d, *Vy = group.Vy + i * d;
    T* grad = group.grad + i * d;
    if (group.failed(i)) {
      std::fill_n(grad, d, group.v[i]);
      return;
    }
    if (!unit) {
      const T sum = group.sum[i];
      for (int64_t k = 0; k < d; ++k) grad[k] += z[k] * sum - Vy[k];
      return;
    }
    // d(1 - <x, y> / |x| |y|)/dx = (<xhat, yhat> xhat - yhat) / |x|; 0 for a point of zero norm.
    const T norm = group.norm[i];
    if (!(norm > T(0))) return;
    T along = 0;
    for (int64_t k = 0; k < d; ++k) along += z[k] * Vy[k];
    for (int64_t k = 0; k < d; ++k) grad[k] += (along * z[k] - Vy[k]) / norm;
  });
}

#define OTLOSS_INSTANTIATE(T)                                                \
  template void prepare_clouds(const std::vector<CloudGroup<T>>&, CostKind); \
  template void cost_matrices(const CostGroup<T>&, CostKind);                \
  template void cost_weights(const CostWeightGroup<T>&, CostKind);           \
  template void plan_weights(const PlanWeightGroup<T>&, CostKind, double);   \
  template void multiply(const ProductGroup<T>&);                            \
  template void cost_gradient(const CostGradientGroup<T>&, CostKind);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
