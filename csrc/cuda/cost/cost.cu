// Cost matrices and their gradients on a GPU: everything around the matrix products and sums of
// torch, see the list of steps in csrc/cpu/cost/cost.cpp.
//
//     CentreKernel     a mean of the points of positive weight      block: some coordinates
//     PrepareKernel    z = x - centre or x / |x|, norms             warp: a point
//     EpilogueKernel   C = cost(|zx|^2, |zy|^2, <zx, zy>)           warp: part of a row of C
//     WeightKernel     V = W * gradient_weight(C)                   thread: an entry
//     GradientKernel   grad += z sum - V y                          warp: a point
//
// All are bound by memory: neighbouring lanes take neighbouring addresses, and each matrix is read
// or written once. Sums have a fixed order.
#include <algorithm>
#include <stdexcept>
#include <string>

#include "core/costs.h"
#include "cost_kernels.h"
#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"
#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {
namespace {

constexpr int kBlockThreads = 256;
constexpr int kBlockWarps = kBlockThreads / kWarp;

// One centre for all clouds. That costs keep their digits takes no more than that it is among the
// points: the mean of some of each cloud, evenly.
template <typename T>
struct CentreKernel {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int64_t kPoints = 128;

  Pack<CloudGroup<T>> clouds;
  T* centre;  // (B, d) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
    const int64_t d = clouds.items[0].d, parts = ceil_div(d, kWarp);
    const int64_t batch = block.x() / parts, k = block.x() % parts * kWarp + lane;
    double sum = 0, points = 0;
    for (int c = 0; c < clouds.count; ++c) {
      const CloudGroup<T>& cloud = clouds.items[c];
      const int count = static_cast<int>(cloud.n < kPoints ? cloud.n : kPoints);
      const auto row = [&](int s) { return batch * cloud.n + s * cloud.n / count; };
      const auto counts = [&](int s) { return !cloud.weight || cloud.weight[row(s)] > T(0); };
      sum += join_over<Sum>(warp, kBlockWarps, count, 0.0, [&](int s) {
        const double x = static_cast<double>(k < d ? cloud.x[row(s) * d + k] : T(0));
        return counts(s) ? x : 0.0;
      });
      points += join_over<Sum>(warp, kBlockWarps, count, 0.0,
                               [&](int s) { return counts(s) ? 1.0 : 0.0; });
    }
    double* const sums = block.template shared<double>();  // (kBlockWarps, 2, kWarp)
    sums[2 * warp * kWarp + lane] = sum, sums[(2 * warp + 1) * kWarp + lane] = points;
    block.sync();
    if (warp != 0 || k >= d) return;
    for (int w = 1; w < kBlockWarps; ++w)
      sum += sums[2 * w * kWarp + lane], points += sums[(2 * w + 1) * kWarp + lane];
    centre[batch * d + k] = static_cast<T>(sum / (points > 1 ? points : 1));
  }
};

template <typename T>
struct PrepareKernel {
  static constexpr int kThreads = kBlockThreads;

  Pack<CloudGroup<T>> clouds;
  const T* centre;  // (B, d), or null: unit norm instead
  int64_t blocks;   // of a cloud

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    with_problem(block, clouds, blocks, [&](const auto& cloud, int64_t batch, int64_t number) {
      const int lane = block.thread() % kWarp;
      const int64_t i = number * kBlockWarps + block.thread() / kWarp;
      if (i >= cloud.n) return;
      const int64_t row = batch * cloud.n + i;
      const T* x = cloud.x + row * cloud.d;
      T* z = cloud.z + row * cloud.d;
      // Of padding nothing is kept, whatever is there.
      const bool counts = !cloud.weight || cloud.weight[row] > T(0);
      T norm2, by = 1;
      const auto prepare = [&] {
        norm2 = 0;
        for (int64_t k = lane; k < cloud.d; k += kWarp) {
          const T value = counts ? x[k] - (centre ? centre[batch * cloud.d + k] : T(0)) : T(0);
          z[k] = value * by;
          norm2 += z[k] * z[k];
        }
        norm2 = warp_join<Sum>(block, norm2);
      };
      prepare();
      if (!centre) by = magnification(norm2);
      if (by > T(1)) prepare();
      if (!centre && norm2 > T(0))
        for (int64_t k = lane; k < cloud.d; k += kWarp) z[k] *= T(1) / sqrt(norm2);
      if (lane == 0) cloud.norm[row] = centre ? norm2 : norm_of(norm2, by);
    });
  }
};

template <typename T, class Cost>
struct EpilogueKernel {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int64_t kColumns = 256;  // of a warp

  Pack<CostGroup<T>> groups;
  int64_t rows, blocks;  // blocks of rows, and all, of a problem

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    with_problem(block, groups, blocks, [&](const auto& group, int64_t batch, int64_t number) {
      const int64_t i = number % rows * kBlockWarps + block.thread() / kWarp;
      if (i >= group.n) return;
      const int64_t row = batch * group.n + i, first = number / rows * kColumns;
      const int64_t last = first + kColumns < group.m ? first + kColumns : group.m;
      for (int64_t j = first + block.thread() % kWarp; j < last; j += kWarp) {
        T& c = group.C[row * group.m + j];
        // Up to kDirectDims there is nothing in C yet.
        c = entry(group, row, batch * group.m + j, group.d > kDirectDims ? c : T(0));
        if (costs_nothing<Cost>(group.symmetric, i, j, group.hx[row])) c = T(0);
      }
    });
  }

 private:
  // `xy`: the inner product, if there are more than kDirectDims coordinates.
  OTLOSS_DEVICE static T entry(const CostGroup<T>& group, int64_t i, int64_t j, T xy) {
    const T squares = group.hx[i] + group.hy[j], d2 = squares - T(2) * xy;
    const bool good = Cost::kUnitNorm || !(d2 <= cancellation_limit<T>() * squares);
    if (group.d > kDirectDims && good) return Cost::from_product(group.hx[i], group.hy[j], xy);
    return pair_cost<Cost>(group.d, group.zx + i * group.d, 1, group.zy + j * group.d, 1);
  }
};

template <typename T, class Cost>
struct WeightKernel {
  static constexpr int kThreads = kBlockThreads;

  int64_t count;
  CostWeightGroup<T> group;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t e = block.x() * kThreads + block.thread();
    if (e < count) group.V[e] = Cost::gradient_weight(group.W[e], group.C[e]);
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
    T along = T(0);
    for (int64_t k = lane; k < d; k += kWarp) along += z[k] * Vy[k];
    along = warp_join<Sum>(block, along);
    for (int64_t k = lane; k < d; k += kWarp) grad[k] += (along * z[k] - Vy[k]) / norm;
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
      launch(context, CentreKernel<T>{pack, centre},
             Grid{batch * ceil_div(d, kWarp), 2 * kBlockThreads * sizeof(double)});
    }
    int64_t points = 0;
    for (const CloudGroup<T>& cloud : clouds) points = std::max(points, cloud.n);
    const int64_t blocks = ceil_div(points, kBlockWarps);
    launch(context, PrepareKernel<T>{pack, centre, blocks}, Grid{problems_of(pack) * blocks});
  });
}

template <typename T>
void cost_matrices(const Context& context, const std::vector<CostGroup<T>>& groups, CostKind kind) {
  for_each_pack(groups, [&](const Pack<CostGroup<T>>& pack) {
    dispatch_cost(kind, [&](auto cost) {
      using Kernel = EpilogueKernel<T, decltype(cost)>;
      const Shape shape = shape_of<T>(pack);
      const int64_t rows = ceil_div(shape.n, kBlockWarps);
      const int64_t blocks = rows * ceil_div(shape.m, Kernel::kColumns);
      launch(context, Kernel{pack, rows, blocks}, Grid{shape.problems * blocks});
    });
  });
}

template <typename T>
void cost_weights(const Context& context, const CostWeightGroup<T>& group, CostKind kind) {
  const int64_t count = group.batch * group.n * group.m;
  dispatch_cost(kind, [&](auto cost) {
    launch(context, WeightKernel<T, decltype(cost)>{count, group},
           Grid{ceil_div(count, kBlockThreads)});
  });
}

template <typename T>
void cost_gradient(const Context& context, const CostGradientGroup<T>& group, CostKind kind) {
  launch(context, GradientKernel<T>{group, traits_of(kind).unit_norm},
         Grid{ceil_div(group.batch * group.n, kBlockWarps)});
}

#define OTLOSS_INSTANTIATE(T)                                                                \
  template void prepare_clouds(const Context&, const std::vector<CloudGroup<T>>&, CostKind); \
  template void cost_matrices(const Context&, const std::vector<CostGroup<T>>&, CostKind);   \
  template void cost_weights(const Context&, const CostWeightGroup<T>&, CostKind);           \
  template void cost_gradient(const Context&, const CostGradientGroup<T>&, CostKind);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss::cuda
