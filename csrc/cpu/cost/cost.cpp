// Cost matrices and their gradients:
//
//     prepare:   z = x - centre, |z|^2  (cosine: z = x / |x|, |x|)
//     costs:     C = cost(|zx|^2, |zy|^2, zx zy^T), a tile at a time
//     weights:   V = W * gradient_weight(C), its row and column sums; W may be a plan, made a row
//                at a time
//     gradient:  grad += zx * row_sum - V zy, and likewise by V^T zx  (cosine: its tangent part /
//     |x|)
//
// Costs and products are bound by arithmetic where there are many coordinates (tile.cpp), all the
// rest are bandwidth-bound passes over C or over the points, whose loops vectorise along rows.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>
#include <vector>

#include "core/costs.h"
#include "cost_kernels.h"
#include "cpu/cost/points.h"
#include "cpu/parallel.h"
#include "cpu/simd/rows_product.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"

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

// The mean of some points of positive weight of one cloud: any centre is right, a near one keeps
// digits. Accumulated in double.
template <typename T>
std::vector<T> centre(const CloudGroup<T>& cloud, int64_t p) {
  constexpr int64_t kSample = 32;  // points
  const int64_t d = cloud.d, step = groups_of(cloud.n, kSample);
  std::vector<double> sum(d);
  int64_t count = 0, skipped = 0;  // points of positive weight since the last that was taken
  for (int64_t i = 0; i < cloud.n; ++i) {
    if (cloud.weight && !(cloud.weight[p * cloud.n + i] > T(0))) continue;
    if (skipped-- > 0) continue;
    skipped = step - 1;
    add_row(d, cloud.x + (p * cloud.n + i) * d, sum.data());
    ++count;
  }
  std::vector<T> mean(d);
  for (int64_t k = 0; k < d; ++k) mean[k] = static_cast<T>(sum[k] / std::max<int64_t>(1, count));
  return mean;
}

// z = x - shift, returns |z|^2.
template <typename T>
OTLOSS_SIMD T shift_row(int64_t d, const T* x, const T* shift, T* z) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) {
    const T value = x[k] - shift[k];
    z[k] = value;
    sum += value * value;
  }
  return sum;
}

// z = x * scale, returns |z|^2.
template <typename T>
OTLOSS_SIMD T scale_row(int64_t d, const T* x, T scale, T* z) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t k = 0; k < d; ++k) {
    const T value = x[k] * scale;
    z[k] = value;
    sum += value * value;
  }
  return sum;
}

// z = x / |x|, or 0; returns |x|.
template <typename T>
T unit_row(int64_t d, const T* x, T* z) {
  T norm2 = scale_row(d, x, T(1), z);
  const T by = magnification(norm2);
  if (by > T(1)) norm2 = scale_row(d, x, by, z);
  if (norm2 > T(0)) scale_row(d, z, T(1) / std::sqrt(norm2), z);
  return norm_of(norm2, by);
}

// ------------------------------------------------------------------------------------- costs

// A block of rows of one of several matrices.
struct RowBlock {
  size_t matrix;
  int64_t first, rows;
};

// Calls function for all `rows` of each matrix, at most `most` at a time. Where all together are
// enough `work`, counted in multiply-adds, several threads take a block each when they are free.
void for_each_block(const std::vector<int64_t>& rows, int64_t most, int64_t work,
                    FunctionRef<void(const RowBlock& block)> function) {
  constexpr int64_t kWorthThreads = 1 << 22;
  const int64_t threads = work < kWorthThreads ? 1 : thread_count();
  std::vector<RowBlock> blocks;
  for (size_t k = 0; k < rows.size(); ++k) {
    const int64_t count = groups_of(rows[k], std::min(most, groups_of(rows[k], threads)));
    const int64_t size = groups_of(groups_of(rows[k], count), kTileRows) * kTileRows;
    for (int64_t first = 0; first < rows[k]; first += size)
      blocks.push_back({k, first, std::min(size, rows[k] - first)});
  }
  std::atomic<size_t> next{0};
  parallel_tasks(threads, [&](int64_t) {
    for (size_t i = next++; i < blocks.size() && !interrupted(); i = next++) function(blocks[i]);
  });
}

// Of one problem of each group. A cloud is packed once for all its matrices.
template <typename T>
void costs_of_problem(const std::vector<CostGroup<T>>& groups, int64_t p, CostKind kind) {
  std::vector<PackedCloud<T>> packed;
  std::vector<size_t> to;     // of each group, in `packed`
  std::vector<int64_t> rows;  // of each group
  int64_t work = 0;
  for (const CostGroup<T>& group : groups) {
    const T* z = group.zy + p * group.m * group.d;
    size_t k = 0;
    while (k < packed.size() && packed[k].z != z) ++k;
    if (k == packed.size())
      packed.emplace_back(CloudRows<T>{group.m, group.d, z, group.hy + p * group.m});
    to.push_back(k);
    rows.push_back(group.n);
    work += group.n * group.m * group.d;
  }
  // By products, half of a symmetric matrix and its reflection is less work than all.
  const auto half = [](const CostGroup<T>& group) {
    return group.symmetric && group.d > kDirectDims;
  };
  for_each_block(rows, kProductRows, work, [&](const RowBlock& block) {
    const CostGroup<T>& group = groups[block.matrix];
    const int64_t n = group.n, m = group.m, d = group.d;
    const CloudRows<T> from{n, d, group.zx + p * n * d, group.hx + p * n};
    const int64_t begin = half(group) ? block.first / kStrip<T> * kStrip<T> : 0;
    T* C = group.C + (p * n + block.first) * group.stride;
    cost_rows(kind, CostRows<T>{block.first, block.rows, begin, m, group.symmetric, &from,
                                &packed[to[block.matrix]], C + begin, group.stride, half(group)});
    // Between rows stand zeros: a sweep reads on. The memory may end with the last row.
    for (int64_t i = block.first; i + 1 < n && i < block.first + block.rows; ++i, C += group.stride)
      std::fill(C + m, C + group.stride, T(0));
  });
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
      const T* C = group.C + (p * n + i) * group.C_stride;
      T* V = group.V + (p * n + i) * m;
      const T* W = row(i, V);
      dispatch_cost(
          kind, [&](auto cost) { row_sum[i] = weight_row(cost, m, W, C, V, columns.part(part)); });
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
  const bool unit = traits_of(kind).unit_norm;
  for (int64_t p = 0; p < clouds.front().batch; ++p) {
    // That of the last cloud, a target that may stay: what is computed of it alone stays as well.
    const std::vector<T> shift = unit ? std::vector<T>() : centre(clouds.back(), p);
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
        cloud.norm[row] = unit ? unit_row(d, x, z) : shift_row(d, x, shift.data(), z);
      });
    }
  }
}

template <typename T>
void cost_matrices(const std::vector<CostGroup<T>>& groups, CostKind kind) {
  parallel_problems(groups.front().batch, kEndless,
                    [&](int64_t p, bool) { costs_of_problem(groups, p, kind); });
}

template <typename T>
void cost_weights(const CostWeightGroup<T>& group, CostKind kind) {
  const int64_t n = group.n, m = group.m;
  parallel_problems(group.batch, n * m, [&](int64_t p, bool split) {
    weigh_rows<T>(group, p, kind, split, group.symmetrise,
                  [&](int64_t i, T* /*V*/) { return group.W + (p * n + i) * m; });
  });
}

// The plan's row is made in the place of V and weighted while it is in the cache.
template <typename T>
void plan_weights(const PlanWeightGroup<T>& group, CostKind kind, const Eps& eps) {
  const int64_t n = group.n, m = group.m;
  parallel_problems(group.batch, n * m, [&](int64_t p, bool split) {
    const T k = factor<T>(eps.of(p));
    const T *f = group.f + p * n, *g = group.g + p * m;
    std::vector<T> F(n), G(m);
    for (int64_t i = 0; i < n; ++i) F[i] = k * f[i];
    absorb_weights(m, k, g, group.b + p * m, G.data());
    // With one potential the plan is symmetric already.
    const bool symmetric = group.symmetrise && std::equal(f, f + n, g);
    const T scale = group.coefficient * group.grad[p] * (symmetric ? T(2) : T(1));
    weigh_rows<T>(group, p, kind, split, group.symmetrise && !symmetric, [&](int64_t i, T* V) {
      const int64_t row = p * n + i;
      plan_rows(PlanRows<T>{1, m, k, scale, group.C + row * group.C_stride, group.C_stride,
                            group.a + row, &F[i], G.data(), V});
      return V;
    });
  });
}

// (grad +=) z sum - product; for unit vectors d(1 - <x, y> / |x| |y|)/dx = (<xhat, yhat> xhat -
// yhat) / |x|, which is 0 for a point of zero norm.
template <bool kAdd, typename T>
OTLOSS_SIMD void gradient_row(bool unit, int64_t d, const T* z, T norm, T sum, const T* product,
                              T* grad) {
  T along = 0;
  if (unit) {
#pragma omp simd reduction(+ : along)
    for (int64_t k = 0; k < d; ++k) along += z[k] * product[k];
  }
  const T factor = unit ? along : sum, scale = unit ? T(1) / norm : T(1);
#pragma omp simd
  for (int64_t k = 0; k < d; ++k) {
    const T before = kAdd ? grad[k] : T(0);
    grad[k] = before + (factor * z[k] - product[k]) * scale;
  }
}

template <typename T>
void cost_gradient(const CostGradientGroup<T>& group, CostKind kind) {
  const int64_t d = group.d;
  const bool unit = traits_of(kind).unit_norm;
  for_each_row(group.batch * group.n, d, [&](int64_t i) {
    T* grad = group.grad + i * d;
    if (group.side.failed(i))
      std::fill_n(grad, d, group.side.v[i]);
    else if (!unit || group.norm[i] > T(0))
      gradient_row<true>(unit, d, group.z + i * d, group.norm[i], group.sum[i], group.Vy + i * d,
                         grad);
  });
}

// Of one problem of each cloud. The products of all pairs are added up where the gradient will be,
// a block of rows at a time, which is finished while it is in the cache.
template <typename T>
void gradients_of_problem(const std::vector<CloudGradientGroup<T>>& clouds, int64_t p, bool unit) {
  // Rows that are as well read where they are: few, and not a multiple of 2 KiB apart, where all
  // would share two sets of the L1 cache.
  constexpr int64_t kNear = 256, kApart = 2048 / sizeof(T);
  struct Cloud {
    const T* z;
    T even;
    BlockBuffer<T> strips;  // empty where z is read where it is
  };
  std::vector<Cloud> others;  // each once
  const auto cloud_at = [&](const T* z) {
    return std::find_if(others.begin(), others.end(), [z](const Cloud& c) { return c.z == z; });
  };
  std::vector<int64_t> rows;
  int64_t work = 0, longest = 1;  // of inner indices
  for (const CloudGradientGroup<T>& cloud : clouds) {
    const int64_t d = cloud.d;
    rows.push_back(cloud.n);
    for (const GradientTerm<T>& term : cloud.terms) {
      const T* z = term.z + p * term.m * d;
      work += cloud.n * term.m * d, longest = std::max(longest, term.m);
      if (cloud_at(z) != others.end()) continue;
      const bool near = term.m <= kNear && d % kBlock<T> == 0 && d % kApart != 0;
      others.push_back({z, evenness(unit, term.m, term.norm + p * term.m),
                        BlockBuffer<T>(near ? 0 : strips_of<T>(d) * term.m * kStrip<T>)});
      if (!near) pack(Packing<T>{d, term.m, z, d, true, others.back().strips.data()});
    }
  }
  for_each_block(rows, product_rows(longest), work, [&](const RowBlock& block) {
    const CloudGradientGroup<T>& cloud = clouds[block.matrix];
    const int64_t n = cloud.n, d = cloud.d, begin = p * n + block.first;
    T* grad = cloud.grad + begin * d;
    for (const GradientTerm<T>& term : cloud.terms) {
      const T* z = term.z + p * term.m * d;
      const Cloud& other = *cloud_at(z);
      const bool packed = !other.strips.empty();
      const int64_t V_row = term.transposed ? 1 : term.m, V_inner = term.transposed ? n : 1;
      multiply_rows(RowsProduct<T>{block.rows, term.m, d,
                                   term.V + p * n * term.m + block.first * V_row, V_row, V_inner,
                                   term.sum + begin, other.even, packed ? other.strips.data() : z,
                                   packed, grad, &term != cloud.terms.data()});
    }
    for (int64_t i = begin; i < begin + block.rows; ++i, grad += d) {
      T sum = 0;
      const T* failed = nullptr;
      for (const GradientTerm<T>& term : cloud.terms) {
        sum += term.sum[i];
        if (term.side.failed(i)) failed = term.side.v + i;
      }
      if (failed)
        std::fill_n(grad, d, *failed);
      else if (unit && !(cloud.norm[i] > T(0)))
        std::fill_n(grad, d, T(0));
      else
        gradient_row<false>(unit, d, cloud.z + i * d, cloud.norm[i], sum, grad, grad);
    }
  });
}

template <typename T>
void cloud_gradients(const std::vector<CloudGradientGroup<T>>& clouds, CostKind kind) {
  const bool unit = traits_of(kind).unit_norm;
  parallel_problems(clouds.front().batch, kEndless,
                    [&](int64_t p, bool) { gradients_of_problem(clouds, p, unit); });
}

#define OTLOSS_INSTANTIATE(T)                                                  \
  template void prepare_clouds(const std::vector<CloudGroup<T>>&, CostKind);   \
  template void cost_matrices(const std::vector<CostGroup<T>>&, CostKind);     \
  template void cost_weights(const CostWeightGroup<T>&, CostKind);             \
  template void plan_weights(const PlanWeightGroup<T>&, CostKind, const Eps&); \
  template void cost_gradient(const CostGradientGroup<T>&, CostKind);          \
  template void cloud_gradients(const std::vector<CloudGradientGroup<T>>&, CostKind);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
