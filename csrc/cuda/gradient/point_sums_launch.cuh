// The gradient W of stored costs, or what the gradients of points need, without a matrix: with V =
// gradient_weight of W, V 1 and V y for the points of one side as rows (CostGradientGroup does the
// rest). W is made tile by tile by a functor (point_weights.cuh), from the costs.
//
// Launches:
//     AbsorbKernel   k f + log2 a for the envelope                   thread: a point
//     CostKernel     W                                               warp: rows and columns
//     SideSumKernel  V 1 and V y of some rows and columns            see there; one for each cost
//     TensorSideSumKernel  the same by tensor cores                  tensor_side_sums.cuh
//     JoinKernel     those of all columns                            thread: an entry
//
// A file for each type includes this: together they take minutes to compile.
#pragma once

#include "cuda/gradient/point_sums.h"

#include <algorithm>
#include <type_traits>

#include "core/penalty.h"
#include "cuda/gradient/point_weights.cuh"
#include "cuda/gradient/side_sums.cuh"

namespace otloss::cuda {

// Potentials of both sides of all groups in base 2, with the logarithms of the weights.
template <typename T>
struct AbsorbKernel {
  static constexpr int kThreads = 256;

  Pack<PointGradientGroup<T>> groups;
  T* F[kMaxGroups];  // (B, packed_stride(n)) out
  T* G[kMaxGroups];  // (B, packed_stride(m)) out
  T k;               // log2(e) / eps

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t group = block.z() / 2;
    const PointGradientGroup<T>& p = groups.items[group];
    const bool rows = block.z() % 2 == 0;
    const int64_t count = rows ? p.n : p.m, stride = packed_stride(count);
    const int64_t i = block.x() * kThreads + block.thread();
    if (i >= stride) return;
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY) {
      T value = static_cast<T>(kLog2Zero);
      if (i < count)
        value = k * (rows ? p.f : p.g)[batch * count + i] +
                log2_weight((rows ? p.a : p.b)[batch * count + i]);
      (rows ? F : G)[group][batch * stride + i] = value;
    }
  }
};

// The kernel, for up to n rows in each of the items.
template <typename T, class Weights>
void launch_sums(const Context& context, SideSums<T, Weights> sums, int64_t n, Grid grid) {
  const PackedPair<T>& points = sums.items.items[0].points;
  const int64_t d = points.d;
  dispatch_tiles(points.kind, d, [&](auto tiles) {
    using Kernel = SideSumKernel<T, Weights, decltype(tiles)>;
    constexpr int64_t kElement = sizeof(T), kStages = 2, kPlan = Kernel::kPlan * kElement;
    // A tile of all coordinates if it fits: the rest of the memory caches y.
    sums.stages = kArgumentBytes + kPlan;
    sums.room =
        std::min(kStages * (d + kTileExtra) * Kernel::kTile * kElement,
                 static_cast<int64_t>(limits(context.device).shared_per_block) - sums.stages);
    grid.x = ceil_div(n, Kernel::kRows) * sums.splits;
    grid.shared = static_cast<size_t>(sums.stages + sums.room);
    launch(context, Kernel{sums}, grid);
  });
}

template <class Weights>
void launch_tensor_sums(const Context& context, SideSums<float, Weights> sums, int64_t n,
                        Grid grid) {
  const PackedPair<float>& points = sums.items.items[0].points;
  const int64_t bytes = static_cast<int64_t>(limits(context.device).shared_per_block);
  sums.stages = kArgumentBytes;
  sums.room = tensor_room<SideSumShape>(points.d, planes_of(points.tiles), bytes - kArgumentBytes);
  grid.x = ceil_div(n, SideSumShape::kRows) * sums.splits;
  grid.shared = static_cast<size_t>(sums.stages + sums.room);
  dispatch_tensor_tiles(points.kind, points.tiles, [&](auto tiles) {
    launch(context, TensorSideSumKernel<Weights, decltype(tiles)>{sums}, grid);
  });
}

template <typename T, class Weights>
void launch_costs(const Context& context, const SideSums<T, Weights>& sums, int64_t n, Grid grid) {
  grid.x = ceil_div(n, kSideRows) * sums.splits;
  grid.shared = kArgumentBytes;
  launch(context, CostKernel<T, Weights>{sums}, grid);
}

template <typename T, class Weights>
constexpr bool kTensorSums = std::is_same_v<T, float> && Weights::kTensor;

// Sets the sums of all items, their `partial` left open.
template <typename T, class Weights>
void sum_sides(const Context& context, const std::vector<SideItem<T, Weights>>& sides, T k) {
  const Limits device = limits(context.device);
  for_each_pack(sides, [&](const Pack<SideItem<T, Weights>>& pack) {
    const PackedPair<T>& points = pack.items[0].points;
    const bool stored = points.C != nullptr;
    const bool tensor = kTensorSums<T, Weights> && !stored && points.tiles != TileKind::kFma;
    const int64_t rows = tensor ? SideSumShape::kRows : kSideRows;
    int64_t n = 1, m = 1, batch = 1, blocks = 0;
    for (int i = 0; i < pack.count; ++i) {
      const SideItem<T, Weights>& p = pack.items[i];
      n = std::max(n, p.n), m = std::max(m, p.m), batch = std::max(batch, p.batch);
      blocks += ceil_div(p.n, rows) * p.batch;
    }
    // Columns are split until a few rounds of blocks fill the device.
    constexpr int64_t kRounds = 4;
    const int64_t wanted =
        std::max<int64_t>(1, kRounds * device.multiprocessors / std::max<int64_t>(1, blocks));
    SideSums<T, Weights> sums{pack, k, 1, 0, 0};
    sums.splits = std::min(wanted, ceil_div(m, SideSums<T, Weights>::share(1, 1)));
    Grid grid;
    grid.y = std::min(batch, kGridY);
    grid.z = pack.count;
    if constexpr (Weights::kStored)
      if (stored) return launch_costs(context, sums, n, grid);
    for (int i = 0; i < pack.count; ++i) {
      SideItem<T, Weights>& p = sums.items.items[i];
      p.partial = context.scratch<T>(p.batch * sums.splits * p.n * (points.d + 1));
    }
    if constexpr (kTensorSums<T, Weights>)
      if (tensor) launch_tensor_sums(context, sums, n, grid);
    if (!tensor) launch_sums(context, sums, n, grid);
    grid.x = ceil_div(n * (points.d + 1), JoinKernel<T, Weights>::kThreads);
    launch(context, JoinKernel<T, Weights>{sums.items, sums.splits}, grid);
  });
}

template <typename T>
PackedPair<T> exchanged(const PackedPair<T>& pair) {
  PackedPair<T> other = pair;
  std::swap(other.x, other.y);
  return other;
}

// t / s of the derivative P (s + t C) of <P, C>.
template <typename T>
T of_cost(Objective objective, double eps) {
  return static_cast<T>(objective == Objective::kTransport ? -1 / eps : 0.0);
}

// The envelope's, their exponents made.
template <typename T>
std::vector<SideItem<T, ScaledPlan<T>>> absorbed_sides(
    const Context& context, const std::vector<PointGradientGroup<T>>& groups, T k) {
  std::vector<SideItem<T, ScaledPlan<T>>> sides;
  if (groups.empty()) return sides;
  Packer<T> packer(context, tiles_of(context, groups[0].points));
  for_each_pack(groups, [&](const Pack<PointGradientGroup<T>>& pack) {
    AbsorbKernel<T> absorb{pack, {}, {}, k};
    int64_t points = 1, batch = 1;
    for (int i = 0; i < pack.count; ++i) {
      const PointGradientGroup<T>& p = pack.items[i];
      const int64_t n_stride = packed_stride(p.n), m_stride = packed_stride(p.m);
      points = std::max(points, std::max(n_stride, m_stride));
      batch = std::max(batch, p.batch);
      T* const F = absorb.F[i] = context.scratch<T>(p.batch * n_stride);
      T* const G = absorb.G[i] = context.scratch<T>(p.batch * m_stride);
      sides.push_back({p.batch, p.n, p.m, p.symmetric, packer(p.batch, p.n, p.m, p.points),
                       p.points.zy, F, G, ScaledPlan<T>{p.grad, p.coefficient},
                       PointSums<T>{p.sum, p.product}, nullptr, nullptr});
    }
    Grid grid;
    grid.x = ceil_div(points, AbsorbKernel<T>::kThreads);
    grid.y = std::min(batch, kGridY);
    grid.z = 2 * pack.count;
    launch(context, absorb, grid);
  });
  return sides;
}

template <typename T>
void point_gradient_sums(const Context& context, const std::vector<PointGradientGroup<T>>& groups,
                         double eps) {
  const T k = static_cast<T>(kLog2E / eps);
  sum_sides(context, absorbed_sides(context, groups, k), k);
}

// The sides of a group that want something; of_x, of_y: with the rows' points as rows, and the
// columns'.
template <typename T, class Weights, class Group>
void add_sides(const Group& p, const PackedPair<T>& points, const T* F, const T* G,
               const Weights& of_x, const Weights& of_y, std::vector<SideItem<T, Weights>>* sides) {
  const MadeCost<T>& made = p.made;
  if (made.x.sum || p.grad_C)
    sides->push_back({p.batch, p.n, p.m, made.symmetric, points, made.points.zy, F, G, of_x, made.x,
                      nullptr, p.grad_C});
  if (made.y.sum)
    sides->push_back({p.batch, p.m, p.n, made.symmetric, exchanged(points), made.points.zx, G, F,
                      of_y, made.y, nullptr, nullptr});
}

template <typename T>
void implicit_sums(const Context& context, const Pack<ImplicitGroup<T>>& pack,
                   const PlanOfPoints<T> (&plans)[kMaxGroups], double eps, Objective objective) {
  std::vector<SideItem<T, SolvedPlan<T>>> sides;
  for (int i = 0; i < pack.count; ++i) {
    const ImplicitGroup<T>& p = pack.items[i];
    const PlanOfPoints<T>& plan = plans[i];
    const T of_C = of_cost<T>(objective, eps), both = p.made.symmetric ? T(2) : T(1);
    const SolvedPlan<T> of_x{plan.alpha, plan.beta, p.grad, p.coefficient, of_C, both, p.n, p.m};
    const SolvedPlan<T> of_y{plan.beta, plan.alpha, p.grad, p.coefficient, of_C, both, p.m, p.n};
    add_sides<T>(p, plan.points, plan.F, plan.G, of_x, of_y, &sides);
  }
  sum_sides(context, sides, static_cast<T>(kLog2E / eps));
}

template <typename T>
void unrolled_sums(const Context& context, const Pack<UnrolledGroup<T>>& pack,
                   const IterationsOfPoints<T> (&iterations)[kMaxGroups], double eps,
                   Objective objective) {
  std::vector<SideItem<T, Iterations<T>>> sides;
  const double k = kLog2E / eps;
  for (int i = 0; i < pack.count; ++i) {
    const UnrolledGroup<T>& p = pack.items[i];
    const IterationsOfPoints<T>& all = iterations[i];
    const Penalty x{1 / p.penalties.rho_x}, y{1 / p.penalties.rho_y};
    IterationSide<T> rows{}, columns{};
    rows.plan = all.F, rows.trace = p.trace, rows.weight = p.a, rows.R = all.R;
    rows.count = p.n, rows.stride = packed_stride(p.n);
    rows.to_base = static_cast<T>(k), rows.to_other = static_cast<T>(k / x.damping(eps));
    columns.plan = all.G, columns.trace = p.trace + p.n, columns.weight = p.b;
    columns.g_bar = all.g_bar, columns.H = all.H;
    columns.count = p.m, columns.stride = packed_stride(p.m);
    columns.to_base = static_cast<T>(k / y.damping(eps));
    Iterations<T> of_x{rows,
                       columns,
                       p.L,
                       p.n + p.m,
                       p.grad,
                       p.coefficient,
                       of_cost<T>(objective, eps),
                       objective == Objective::kTransport,
                       p.made.symmetric};
    Iterations<T> of_y = of_x;
    std::swap(of_y.rows, of_y.columns);
    add_sides<T>(p, all.points, all.F, all.G, of_x, of_y, &sides);
  }
  sum_sides(context, sides, static_cast<T>(k));
}

}  // namespace otloss::cuda
