// Cost matrices and their gradients on a GPU: everything around the matrix products, see the list
// of steps in csrc/cpu/cost/cost.cpp.
//
//     CentreKernel     sums of the points of positive weight       thread: a coordinate of some
//     rows JoinPartsKernel  their mean; column sums of V                thread: a value
//     PrepareKernel    z = x - centre or x / |x|, norms             warp: a point
//     EpilogueKernel   C = cost(|zx|^2, |zy|^2, <zx, zy>)           warp: part of a row of C
//     WeightKernel     V = W * gradient_weight(C), row sums         warp: a row of C
//     ColumnKernel     column sums of V                            thread: a column of some rows
//     GradientKernel   grad += z sum - V y                          warp: a point
//
// All are bound by memory: neighbouring lanes take neighbouring addresses, and each matrix is read
// or written once (the transpose, where V is symmetrised, comes through L2). Sums have a fixed
// order.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/costs.h"
#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"

namespace otloss::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarp;

// Of sums that are a chain over rows, a block takes a part of them; a second launch adds the parts
// up.
constexpr int64_t kSumParts = 64;

// The rows of a part: [first, last).
struct PartRows {
  int64_t first, last;

  OTLOSS_HOST_DEVICE PartRows(int64_t n, int64_t part) {
    const int64_t share = ceil_div(n, kSumParts);
    first = part * share < n ? part * share : n;
    last = first + share < n ? first + share : n;
  }
};

template <typename T>
struct CentreKernel {
  static constexpr int kThreads = kBlockThreads;

  Pack<CloudGroup<T>> clouds;
  double* parts;  // (B, kSumParts, d + 1) out: sums of coordinates, number of points

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
    const int64_t d = clouds.items[0].d, k = block.x() * kWarp + lane;
    double* const scratch = block.template shared<double>();  // (kBlockWarps, kWarp)
    for (int64_t batch = block.y(); batch < clouds.items[0].batch; batch += kGridY) {
      double sum = 0;
      for (int c = 0; c < clouds.count; ++c) {
        const CloudGroup<T>& cloud = clouds.items[c];
        const PartRows rows(cloud.n, block.z());
        for (int64_t i = rows.first + warp; i < rows.last; i += kBlockWarps) {
          const int64_t row = batch * cloud.n + i;
          if (cloud.weight && !(cloud.weight[row] > T(0))) continue;
          sum += k < d ? static_cast<double>(cloud.x[row * d + k]) : 1.0;
        }
      }
      scratch[warp * kWarp + lane] = sum;
      block.sync();
      if (warp == 0 && k <= d) {
        for (int w = 1; w < kBlockWarps; ++w) sum += scratch[w * kWarp + lane];
        parts[(batch * kSumParts + block.z()) * (d + 1) + k] = sum;
      }
      block.sync();
    }
  }
};

// Adds parts up: the mean over the last column of sums, or the sums. A thread per value.
template <typename T, typename S>
struct JoinPartsKernel {
  static constexpr int kThreads = kBlockThreads;

  int64_t batch, width;  // values of a part
  bool mean;             // over the last value, which is not wanted
  const S* parts;        // (B, kSumParts, width)
  T* out;                // (B, width), or (B, width - 1)

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t count = mean ? width - 1 : width, k = block.x() * kThreads + block.thread();
    if (k >= count) return;
    for (int64_t b = block.y(); b < batch; b += kGridY) {
      S sum = S(0), points = S(0);
      for (int64_t part = 0; part < kSumParts; ++part) {
        const S* const values = parts + (b * kSumParts + part) * width;
        sum += values[k];
        if (mean) points += values[count];
      }
      out[b * count + k] = static_cast<T>(mean ? sum / (points > S(1) ? points : S(1)) : sum);
    }
  }
};

template <typename T>
struct PrepareKernel {
  static constexpr int kThreads = kBlockThreads;

  Pack<CloudGroup<T>> clouds;
  const T* centre;  // (B, d), or null: unit norm instead

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const CloudGroup<T>& cloud = clouds.items[block.z()];
    const int lane = block.thread() % kWarp;
    const int64_t i = block.x() * kBlockWarps + block.thread() / kWarp;
    if (i >= cloud.n) return;
    for (int64_t batch = block.y(); batch < cloud.batch; batch += kGridY) {
      const int64_t row = batch * cloud.n + i;
      const T* x = cloud.x + row * cloud.d;
      T* z = cloud.z + row * cloud.d;
      // Of padding nothing is kept, whatever is there.
      const bool counts = !cloud.weight || cloud.weight[row] > T(0);
      T norm2[1], by = 1;
      const auto prepare = [&] {
        norm2[0] = 0;
        for (int64_t k = lane; k < cloud.d; k += kWarp) {
          const T value = counts ? x[k] - (centre ? centre[batch * cloud.d + k] : T(0)) : T(0);
          z[k] = value * by;
          norm2[0] += z[k] * z[k];
        }
        warp_sum(block, norm2);
      };
      prepare();
      if (!centre) by = magnification(norm2[0]);
      if (by > T(1)) prepare();
      if (!centre && norm2[0] > T(0))
        for (int64_t k = lane; k < cloud.d; k += kWarp) z[k] *= T(1) / sqrt(norm2[0]);
      if (lane == 0) cloud.norm[row] = centre ? norm2[0] : norm_of(norm2[0], by);
    }
  }
};

template <typename T, class Cost>
struct EpilogueKernel {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int64_t kColumns = 256;  // of a warp

  CostGroup<T> group;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int lane = block.thread() % kWarp;
    const int64_t i = block.x() * kBlockWarps + block.thread() / kWarp;
    if (i >= group.n) return;
    const int64_t first = block.z() * kColumns;
    const int64_t last = first + kColumns < group.m ? first + kColumns : group.m;
    for (int64_t batch = block.y(); batch < group.batch; batch += kGridY) {
      const int64_t row = batch * group.n + i;
      for (int64_t j = first + lane; j < last; j += kWarp) {
        T& c = group.C[row * group.m + j];
        // Up to kDirectDims there is nothing in C yet.
        c = entry(row, batch * group.m + j, group.d > kDirectDims ? c : T(0));
        // A point is at distance 0 from itself; one of zero norm has no direction and costs 1.
        if (group.symmetric && i == j && !(Cost::kUnitNorm && !(group.hx[row] > T(0)))) c = T(0);
      }
    }
  }

 private:
  // `xy`: the inner product, if there are more than kDirectDims coordinates.
  OTLOSS_DEVICE T entry(int64_t i, int64_t j, T xy) const {
    const T *x = group.zx + i * group.d, *y = group.zy + j * group.d;
    if constexpr (Cost::kUnitNorm) {
      if (group.d > kDirectDims) return Cost::from_product(T(0), T(0), xy);
      T sum = T(0);
      for (int64_t k = 0; k < group.d; ++k) sum += x[k] * y[k];
      return Cost::from_product(T(0), T(0), sum);
    } else {
      if (group.d > kDirectDims) {
        const T squares = group.hx[i] + group.hy[j], d2 = squares - T(2) * xy;
        if (!(d2 <= cancellation_limit<T>() * squares))
          return Cost::from_product(group.hx[i], group.hy[j], xy);
      }
      T sum = T(0);
      for (int64_t k = 0; k < group.d; ++k) sum += (x[k] - y[k]) * (x[k] - y[k]);
      return Cost::from_difference(sum);
    }
  }
};

template <typename T, class Cost>
struct WeightKernel {
  static constexpr int kThreads = kBlockThreads;

  CostWeightGroup<T> group;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int lane = block.thread() % kWarp;
    const int64_t i = block.x() * kBlockWarps + block.thread() / kWarp;
    if (i >= group.n) return;
    for (int64_t batch = block.y(); batch < group.batch; batch += kGridY) {
      const int64_t matrix = batch * group.n * group.m, row = matrix + i * group.m;
      T sum[1] = {T(0)};
      for (int64_t j = lane; j < group.m; j += kWarp) {
        T value = Cost::gradient_weight(group.W[row + j], group.C[row + j]);
        if (group.symmetrise) {
          const int64_t mirror = matrix + j * group.m + i;
          value += Cost::gradient_weight(group.W[mirror], group.C[mirror]);
        }
        group.V[row + j] = value;
        sum[0] += value;
      }
      warp_sum(block, sum);
      if (lane != 0) continue;
      group.row_sum[batch * group.n + i] = sum[0];
      if (group.symmetrise) group.col_sum[batch * group.n + i] = sum[0];
    }
  }
};

template <typename T>
struct ColumnKernel {
  static constexpr int kThreads = kBlockThreads;

  CostWeightGroup<T> group;
  T* parts;  // (B, kSumParts, m) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t j = block.x() * kThreads + block.thread();
    if (j >= group.m) return;
    const PartRows rows(group.n, block.z());
    for (int64_t batch = block.y(); batch < group.batch; batch += kGridY) {
      const T* const V = group.V + batch * group.n * group.m + j;
      T sum = T(0);
      for (int64_t i = rows.first; i < rows.last; ++i) sum += V[i * group.m];
      parts[(batch * kSumParts + block.z()) * group.m + j] = sum;
    }
  }
};

template <typename T>
struct GradientKernel {
  static constexpr int kThreads = kBlockThreads;

  CostGradientGroup<T> group;
  bool unit_norm;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int lane = block.thread() % kWarp;
    const int64_t d = group.d, i = block.x() * kBlockWarps + block.thread() / kWarp;
    if (i >= group.batch * group.n) return;
    const T *z = group.z + i * d, *Vy = group.Vy + i * d;
    T* grad = group.grad + i * d;
    if (group.side.failed(i)) {
      for (int64_t k = lane; k < d; k += kWarp) grad[k] = group.side.v[i];
      return;
    }
    if (!unit_norm) {
      for (int64_t k = lane; k < d; k += kWarp) grad[k] += z[k] * group.sum[i] - Vy[k];
      return;
    }
    // d(1 - <x, y> / |x| |y|)/dx = (<xhat, yhat> xhat - yhat) / |x|; 0 for a point of zero norm.
    const T norm = group.norm[i];
    if (!(norm > T(0))) return;
    T along[1] = {T(0)};
    for (int64_t k = lane; k < d; k += kWarp) along[0] += z[k] * Vy[k];
    warp_sum(block, along);
    for (int64_t k = lane; k < d; k += kWarp) grad[k] += (along[0] * z[k] - Vy[k]) / norm;
  }
};

}  // namespace

template <typename T>
void prepare_clouds(const Context& context, const std::vector<CloudGroup<T>>& clouds,
                    CostKind kind) {
  const int64_t batch = clouds.front().batch, d = clouds.front().d;
  // One centre for all clouds, so they must travel together.
  if (clouds.size() > static_cast<size_t>(kMaxGroups))
    throw std::runtime_error("otloss: at most " + std::to_string(kMaxGroups) +
                             " clouds on a GPU, got " + std::to_string(clouds.size()));
  for_each_pack(clouds, [&](const Pack<CloudGroup<T>>& pack) {
    T* centre = nullptr;
    if (!traits_of(kind).unit_norm) {
      centre = context.scratch<T>(std::max<int64_t>(1, batch * d));
      double* const parts = context.scratch<double>(batch * kSumParts * (d + 1));
      Grid grid;
      grid.x = ceil_div(d + 1, kWarp);
      grid.y = std::min(batch, kGridY);
      grid.z = kSumParts;
      grid.shared = kBlockThreads * sizeof(double);
      launch(context, CentreKernel<T>{pack, parts}, grid);
      grid.x = ceil_div(d, kBlockThreads), grid.z = 1, grid.shared = 0;
      launch(context, JoinPartsKernel<T, double>{batch, d + 1, true, parts, centre}, grid);
    }
    Grid grid;
    for (int c = 0; c < pack.count; ++c)
      grid.x = std::max(grid.x, ceil_div(pack.items[c].n, kBlockWarps));
    grid.y = std::min(batch, kGridY);
    grid.z = pack.count;
    launch(context, PrepareKernel<T>{pack, centre}, grid);
  });
}

template <typename T>
void cost_matrices(const Context& context, const std::vector<CostGroup<T>>& groups, CostKind kind) {
  dispatch_cost(kind, [&](auto cost) {
    using Kernel = EpilogueKernel<T, decltype(cost)>;
    for (const CostGroup<T>& group : groups) {
      Grid grid;
      grid.x = ceil_div(group.n, kBlockWarps);
      grid.y = std::min(group.batch, kGridY);
      grid.z = ceil_div(group.m, Kernel::kColumns);
      launch(context, Kernel{group}, grid);
    }
  });
}

template <typename T>
void cost_weights(const Context& context, const CostWeightGroup<T>& group, CostKind kind) {
  dispatch_cost(kind, [&](auto cost) {
    Grid grid;
    grid.x = ceil_div(group.n, kBlockWarps);
    grid.y = std::min(group.batch, kGridY);
    launch(context, WeightKernel<T, decltype(cost)>{group}, grid);
  });
  if (group.symmetrise) return;
  Grid grid;
  T* const parts = context.scratch<T>(group.batch * kSumParts * group.m);
  grid.x = ceil_div(group.m, kBlockThreads);
  grid.y = std::min(group.batch, kGridY);
  grid.z = kSumParts;
  launch(context, ColumnKernel<T>{group, parts}, grid);
  grid.z = 1;
  launch(context, JoinPartsKernel<T, T>{group.batch, group.m, false, parts, group.col_sum}, grid);
}

template <typename T>
void plan_weights(const Context& context, const PlanWeightGroup<T>& group, CostKind kind,
                  double eps) {
  T* W = context.scratch<T>(group.batch * group.n * group.m);
  const EnvelopeGroup<T> plan{{group.batch, group.n, group.m, group.a, group.b, group.f, group.g,
                               group.grad, group.coefficient},
                              group.C,
                              W,
                              nullptr,
                              nullptr};
  envelope_backward(context, std::vector{plan}, eps, Objective::kRegularized);
  CostWeightGroup<T> weights = group;
  weights.W = W;
  cost_weights(context, weights, kind);
}

template <typename T>
void cost_gradient(const Context& context, const CostGradientGroup<T>& group, CostKind kind) {
  Grid grid;
  grid.x = ceil_div(group.batch * group.n, kBlockWarps);
  launch(context, GradientKernel<T>{group, traits_of(kind).unit_norm}, grid);
}

#define OTLOSS_INSTANTIATE(T)                                                                \
  template void prepare_clouds(const Context&, const std::vector<CloudGroup<T>>&, CostKind); \
  template void cost_matrices(const Context&, const std::vector<CostGroup<T>>&, CostKind);   \
  template void cost_weights(const Context&, const CostWeightGroup<T>&, CostKind);           \
  template void plan_weights(const Context&, const PlanWeightGroup<T>&, CostKind, double);   \
  template void cost_gradient(const Context&, const CostGradientGroup<T>&, CostKind);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss::cuda
