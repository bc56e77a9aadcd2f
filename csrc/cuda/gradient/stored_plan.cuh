// Of the implicit gradient where costs are stored: products with the plan, whose entries are made
// from them every time, and the gradient of the cost.
#pragma once

#include "cuda/gradient/implicit_state.cuh"
#include "cuda/gradient/point_weights.cuh"

namespace otloss::cuda {

// The sums that problems ask for. Of rows: a warp for each; of columns: a thread for each, over a
// part of the rows.
template <typename T>
struct PlanProductKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;

  Pack<ImplicitGroup<T>> groups;
  SweepArguments<RowSums<T, double>> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t problem = block.x() / arguments.blocks, number = block.x() % arguments.blocks;
    const RowSums<T, double>& order = arguments.orders[problem];
    if (order.what == RowSum::kNone) return;
    int64_t batch = problem;
    const ImplicitGroup<T>& p = groups.items[group_of(groups, &batch)];
    const T *const C = p.C + batch * p.n * p.m, *const F = order.tiles.F, *const G = order.tiles.G;
    const T k = order.tiles.k;
    const int n = static_cast<int>(p.n), m = static_cast<int>(p.m), thread = block.thread();
    const double* const x = order.x;
    const bool of_costs = order.what == RowSum::kCost;
    const auto term = [&](T own, int64_t at, int other) {
      const T c = C[at], plan = plan_of(own, G[other], k * c);
      const T entry = of_costs && plan != T(0) ? plan * c : plan;
      return static_cast<double>(entry) * (x ? x[other] : 1.0);
    };
    if (order.side == 0) {
      const int64_t i = number * kWarps + thread / kWarp;
      if (i >= n) return;
      const T own = F[i];
      const double sum = join_over<Sum>(thread % kWarp, kWarp, m, 0.0,
                                        [&](int j) { return term(own, i * m + j, j); });
      const double total = warp_join<Sum>(block, sum, kWarp);
      if (thread % kWarp == 0) order.out[i] = total;
      return;
    }
    const int parts = arguments.cuts[1].parts;
    const int64_t part = number % parts, j = number / parts * kThreads + thread;
    const int share = static_cast<int>(ceil_div(n, parts)), first = static_cast<int>(part) * share;
    if (j >= m) return;
    const T own = F[j];
    order.out[part * arguments.length + j] =
        join_over<Sum>(first, 1, first + share < n ? first + share : n, 0.0,
                       [&](int i) { return term(own, static_cast<int64_t>(i) * m + j, i); });
  }
};

// Enough parts of the rows to give each multiprocessor two blocks.
template <typename T>
void plan_products(const Shape& shape, const Limits& device, SolvePlan* plan) {
  using Kernel = PlanProductKernel<T>;
  const int64_t blocks = shape.problems * ceil_div(shape.m, Kernel::kThreads);
  const int64_t wanted = ceil_div(2 * device.multiprocessors, blocks);
  plan->cuts[0] = {Kernel::kWarps, 1};
  plan->cuts[1] = {Kernel::kThreads, static_cast<int>(std::min(ceil_div(shape.n, kWarp), wanted))};
  plan->vector_length = packed_stride(std::max(shape.n, shape.m));
  plan->teams = shape.problems, plan->team_size = 1;
}

// The gradient of the cost, P (s + t C + alpha + beta). A warp: a row.
template <typename T>
struct CostGradientKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;

  ImplicitArguments<T> arguments;
  int64_t blocks;  // of a problem

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t problem = block.x() / blocks;
    int64_t batch = problem;
    const int group = group_of(arguments.pack, &batch);
    const ImplicitGroup<T>& p = arguments.pack.items[group];
    const int64_t i = block.x() % blocks * kWarps + block.thread() / kWarp;
    if (i >= p.n || p.grad_C == nullptr) return;
    const ImplicitVectors v = arguments.vectors_of(problem);
    const int64_t row = (batch * p.n + i) * p.m;
    const T F = arguments.plans[group].F[batch * packed_stride(p.n) + i];
    const T* const G = arguments.plans[group].G + batch * packed_stride(p.m);
    const double scale = static_cast<double>(p.coefficient * p.grad[batch]);
    const bool transport = arguments.objective == Objective::kTransport;
    const T k = static_cast<T>(kLog2E / arguments.eps);
    const T t = static_cast<T>(transport ? -scale / arguments.eps : 0.0);
    const T shift = static_cast<T>(scale) + static_cast<T>(v.w[i]);
    for (int64_t j = block.thread() % kWarp; j < p.m; j += kWarp) {
      // A potential that is NaN makes the plan NaN, which its exponential alone would not.
      const T c = p.C[row + j], nothing = T(0) * (F + G[j]), P = plan_of(F, G[j], k * c) + nothing;
      p.grad_C[row + j] = P != T(0) ? P * (shift + t * c + static_cast<T>(v.beta[j])) : T(0);
    }
  }
};

}  // namespace otloss::cuda
