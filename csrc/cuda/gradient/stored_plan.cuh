// The plan of an implicit gradient as a matrix: made, multiplied and turned into the gradient of
// the cost.
#pragma once

#include "cuda/gradient/implicit_system.cuh"

namespace otloss::cuda {

// P, or the gradient of the cost, P (s + t C + alpha + beta), where P may stand. A warp: a row.
template <typename T>
struct PlanEntriesKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;

  ImplicitArguments<T> arguments;
  int64_t blocks;  // of a problem
  bool solved;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t problem = block.x() / blocks;
    int64_t batch = problem;
    const ImplicitGroup<T>& p = arguments.pack.items[group_of(arguments.pack, &batch)];
    const int64_t i = block.x() % blocks * kWarps + block.thread() / kWarp;
    if (i >= p.n || (solved && p.grad_C == nullptr)) return;
    const ImplicitVectors v = arguments.vectors_of(problem);
    const int64_t row = (batch * p.n + i) * p.m;
    const T *const C = p.C + row, *const b = p.b + batch * p.m;
    T* const P = p.P + row;
    const double to_base2 = kLog2E / arguments.eps;
    const T k = static_cast<T>(to_base2), a = p.a[batch * p.n + i];
    const T F = static_cast<T>(to_base2 * v.f[i]);
    const double scale = static_cast<double>(p.coefficient * p.grad[batch]);
    const bool transport = arguments.objective == Objective::kTransport;
    const T t = static_cast<T>(transport ? -scale / arguments.eps : 0.0);
    const T shift = static_cast<T>(scale) + static_cast<T>(v.w[i]);
    for (int64_t j = block.thread() % kWarp; j < p.m; j += kWarp) {
      if (solved) {
        const T plan = P[j], sum = shift + t * C[j] + static_cast<T>(v.beta[j]);
        p.grad_C[row + j] = plan != T(0) ? plan * sum : T(0);
      } else {
        const T G = k * static_cast<T>(v.g[j]) + log2_weight(b[j]);
        // A potential that is NaN makes the plan NaN, which its exponential alone would not.
        P[j] = a > T(0) && b[j] > T(0) ? plan_entry(a, F + G - k * C[j]) + T(0) * F : T(0);
      }
    }
  }
};

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
    const int64_t matrix = batch * p.n * p.m;
    const T* const P = p.P + matrix;
    const T* const C = order.what == RowSum::kCost ? p.C + matrix : nullptr;
    const int n = static_cast<int>(p.n), m = static_cast<int>(p.m), thread = block.thread();
    const double* const x = order.x;
    const auto term = [&](int64_t at, int other) {
      const T plan = P[at];
      const double entry = static_cast<double>(plan) * (x ? x[other] : 1.0);
      return C && plan != T(0) ? entry * static_cast<double>(C[at]) : entry;
    };
    if (order.side == 0) {
      const int64_t i = number * kWarps + thread / kWarp;
      if (i >= p.n) return;
      const double sum =
          join_over<Sum>(thread % kWarp, kWarp, m, 0.0, [&](int j) { return term(i * m + j, j); });
      const double total = warp_join<Sum>(block, sum, kWarp);
      if (thread % kWarp == 0) order.out[i] = total;
      return;
    }
    const int parts = arguments.cuts[1].parts;
    const int64_t part = number % parts, j = number / parts * kThreads + thread;
    const int share = static_cast<int>(ceil_div(n, parts)), first = static_cast<int>(part) * share;
    if (j >= p.m) return;
    order.out[part * arguments.length + j] =
        join_over<Sum>(first, 1, first + share < n ? first + share : n, 0.0,
                       [&](int i) { return term(static_cast<int64_t>(i) * m + j, i); });
  }
};

// Enough parts of the rows to give each multiprocessor two blocks.
template <typename T>
void plan_products(const Shape& shape, const Limits& device, SolvePlan* plan) {
  using Kernel = PlanProductKernel<T>;
  const int64_t blocks = shape.problems * ceil_div(shape.m, Kernel::kThreads);
  const int64_t most = ceil_div(shape.n, kWarp),
                wanted = ceil_div(2 * device.multiprocessors, blocks);
  plan->cuts[0] = {Kernel::kWarps, 1};
  plan->cuts[1] = {Kernel::kThreads, static_cast<int>(std::min(most, wanted))};
  plan->vector_length = packed_stride(std::max(shape.n, shape.m));
  plan->teams = shape.problems, plan->team_size = 1;
}

}  // namespace otloss::cuda
