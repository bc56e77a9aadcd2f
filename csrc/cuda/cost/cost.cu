// Cost matrices and their gradients on a GPU: everything around the matrix products, see the list
// of steps in csrc/cpu/cost/cost.cpp.
//
//     CentreKernel     mean of the points of positive weight       thread: a coordinate of some
//     rows PrepareKernel    z = x - centre or x / |x|, norms             warp: a point
//     EpilogueKernel   C = cost(|zx|^2, |zy|^2, <zx, zy>)           warp: part of a row of C
//     WeightKernel     V = W * gradient_weight(C), row sums         warp: a row of C
//     ColumnKernel     column sums of V                             thread: a column of some rows
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

template <typename T>
struct CentreKernel {
  static constexpr int kThreads = kBlockThreads;

  Pack<CloudGroup<T>> clouds;
  T* centre;  // (B, d) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
    const int64_t d = clouds.items[0].d, k = block.x() * kWarp + lane;
    double* scratch = block.template shared<double>();  // (2, kBlockWarps, kWarp)
    for (int64_t batch = block.y(); batch < clouds.items[0].batch; batch += kGridY) {
      double sum = 0, count = 0;
      for (int c = 0; c < clouds.count; ++c) {
        const CloudGroup<T>& cloud = clouds.items[c];
        for (int64_t i = warp; i < cloud.n; i += kBlockWarps) {
          const int64_t row = batch * cloud.n + i;
          if (cloud.weight && !(cloud.weight[row] > T(0))) continue;
          if (k < d) sum += static_cast<double>(cloud.x[row * d + k]);
          count += 1;
        }
      }
      scratch[warp * kWarp + lane] = sum;
      scratch[(kBlockWarps + warp) * kWarp + lane] = count;
      block.sync();
      if (warp == 0 && k < d) {
        for (int w = 1; w < kBlockWarps; ++w) {
          sum += scratch[w * kWarp + lane];
          count += scratch[(kBlockWarps + w) * kWarp + lane];
        }
        centre[batch * d + k] = static_cast<T>(sum / (count > 1 ? count : 1));
      }
      block.sync();
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
      T norm2[1] = {T(0)};
      for (int64_t k = lane; k < cloud.d; k += kWarp) {
        const T value = counts ? x[k] - (centre ? centre[batch * cloud.d + k] : T(0)) : T(0);
        z[k] = value;
        norm2[0] += value * value;
      }
      warp_sum(block, norm2);
      const T norm = centre ? norm2[0] : sqrt(norm2[0]);
      if (!centre && norm > T(0))
        for (int64_t k = lane; k < cloud.d; k += kWarp) z[k] *= T(1) / norm;
      if (lane == 0) cloud.norm[row] = norm;
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

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
    const int64_t j = block.x() * kWarp + lane;
    T* scratch = block.template shared<T>();  // (kBlockWarps, kWarp)
    for (int64_t batch = block.y(); batch < group.batch; batch += kGridY) {
      T sum = T(0);
      if (j < group.m)
        for (int64_t i = warp; i < group.n; i += kBlockWarps)
          sum += group.V[(batch * group.n + i) * group.m + j];
      scratch[warp * kWarp + lane] = sum;
      block.sync();
      if (warp == 0 && j < group.m) {
        for (int w = 1; w < kBlockWarps; ++w) sum += scratch[w * kWarp + lane];
        group.col_sum[batch * group.m + j] = sum;
      }
      block.sync();
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
      Grid grid;
      grid.x = ceil_div(d, kWarp);
      grid.y = std::min(batch, kGridY);
      grid.shared = 2 * kBlockThreads * sizeof(double);
      launch(context, CentreKernel<T>{pack, centre}, grid);
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
  grid.x = ceil_div(group.m, kWarp);
  grid.y = std::min(group.batch, kGridY);
  grid.shared = kBlockThreads * sizeof(T);
  launch(context, ColumnKernel<T>{group}, grid);
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
