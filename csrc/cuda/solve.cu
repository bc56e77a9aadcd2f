// Launches the solve: the cost model that picks a regime, shared memory and workspace layout.
#include "solve.cuh"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "plan.h"

namespace otloss::cuda {
namespace {

// Calls function(kernel) with the instance that a plan asks for. float64 has one, whose two-sweep
// pass serves any number of columns.
template <typename T, typename F>
void dispatch_kernel(const SolvePlan& plan, F&& function) {
  if constexpr (sizeof(T) == 4)
    if (plan.columns_per_thread == kManyColumns) return function(SolveKernel<T, kManyColumns>{});
  function(SolveKernel<T, kFewColumns>{});
}

template <typename T>
Shape shape_of(const Pack<SolveGroup<T>>& pack) {
  Shape shape;
  shape.element = sizeof(T);
  shape.most_entries = kEntries<T>;
  for (int i = 0; i < pack.count; ++i) {
    const SolveGroup<T>& p = pack.items[i];
    shape.problems += p.batch;
    shape.n = std::max(shape.n, p.n);
    shape.m = std::max(shape.m, p.m);
    shape.entries = std::max(shape.entries, p.n * p.m);
  }
  return shape;
}

// loss_k = sum_p coefficient_p value_pk; a thread per k.
template <typename T>
struct CombineKernel {
  static constexpr int kThreads = 128;

  int64_t batch;
  int count;  // of coefficients
  bool add;   // to what is in loss
  T coefficients[kMaxGroups];
  const T* values;  // (count, B)
  T* loss;          // (B,)

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t k = block.x() * kThreads + block.thread();
    if (k >= batch) return;
    T sum = add ? loss[k] : T(0);
    for (int p = 0; p < count; ++p) sum += coefficients[p] * values[p * batch + k];
    loss[k] = sum;
  }
};

}  // namespace

template <typename T>
void solve(const Context& context, const std::vector<SolveGroup<T>>& groups,
           const SolveOptions& options) {
  for_each_pack(groups, [&](const Pack<SolveGroup<T>>& pack) {
    const Shape shape = shape_of(pack);
    if (shape.problems == 0) return;
    const auto fits = [&](const SolvePlan& plan) {
      bool result = false;
      dispatch_kernel<T>(plan, [&](auto kernel) {
        result = cluster_fits<decltype(kernel)>(context, plan.team_size,
                                                static_cast<size_t>(plan.shared.bytes));
      });
      return result;
    };
    const SolvePlan plan = choose_plan(shape, limits(context.device), forced_regime(), fits);
    const int64_t length = plan.vector_length;
    SolveArguments<T> arguments{};
    arguments.groups = pack;
    arguments.options = options;
    arguments.shared = plan.shared;
    arguments.barrier = plan.barrier;
    arguments.team_size = plan.team_size;
    arguments.teams = plan.teams;
    arguments.problems = shape.problems;
    arguments.vector_length = length;
    if (plan.shared.vectors < 0)
      arguments.vectors = context.scratch<T>(plan.teams * (kVectors + 1) * length);
    arguments.column_parts = context.scratch<T>(plan.teams * 3 * plan.team_size * length);
    arguments.team_parts = context.scratch<double>(plan.teams * 2 * plan.team_size * kTeamValues);
    arguments.counters = context.scratch<unsigned>(plan.teams * kCounterStride);
    if (plan.barrier == Barrier::kGrid)
      clear(context, arguments.counters, plan.teams * kCounterStride * sizeof(unsigned));
    Grid grid;
    grid.x = plan.teams * plan.team_size;
    grid.shared = static_cast<size_t>(plan.shared.bytes);
    grid.cluster = plan.barrier == Barrier::kCluster ? plan.team_size : 1;
    grid.cooperative = plan.barrier == Barrier::kGrid;
    dispatch_kernel<T>(plan, [&](auto kernel) {
      kernel.arguments = arguments;
      launch(context, kernel, grid);
    });
  });
}

template <typename T>
void combine_values(const Context& context, const std::vector<double>& coefficients,
                    const T* values, int64_t batch, T* loss) {
  for (size_t first = 0; first < coefficients.size(); first += kMaxGroups) {
    CombineKernel<T> kernel{batch, 0, first > 0, {}, values + first * batch, loss};
    for (size_t p = first; p < coefficients.size() && kernel.count < kMaxGroups; ++p)
      kernel.coefficients[kernel.count++] = static_cast<T>(coefficients[p]);
    Grid grid;
    grid.x = ceil_div(batch, CombineKernel<T>::kThreads);
    launch(context, kernel, grid);
  }
}

template void combine_values(const Context&, const std::vector<double>&, const float*, int64_t,
                             float*);
template void combine_values(const Context&, const std::vector<double>&, const double*, int64_t,
                             double*);
template void solve(const Context&, const std::vector<SolveGroup<float>>&, const SolveOptions&);
template void solve(const Context&, const std::vector<SolveGroup<double>>&, const SolveOptions&);

}  // namespace otloss::cuda
