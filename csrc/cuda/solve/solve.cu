// Launches the solve of stored costs. The cost model and the layout of shared memory: plan.cpp.
#include <stdexcept>
#include <string>

#include "cuda/pass/pack.cuh"
#include "cuda/solve/describe.h"
#include "cuda/solve/solver.cuh"
#include "cuda/solve/stored_costs.cuh"
#include "cuda/solve/streamed.h"

namespace otloss::cuda {
namespace {

template <typename T, int kBlockThreads>
struct SolveKernel {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kResidentBlocks = kThreads < kSolveThreads ? kSmallBlocks : 1;

  SolveArguments<T> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Costs = StoredCosts<T, Block, kThreads>;
    typename Costs::Team team(block, arguments.team);
    SolverState<T>& state = *team.template at<SolverState<T>>(arguments.shared.state);
    Solver<T, Block, Costs>(block, arguments, Costs(block, arguments, team, state), team, state)
        .run();
  }
};

// The loss from the terms of its problems; a thread per entry.
template <typename T>
struct CombineKernel {
  static constexpr int kThreads = 128;

  int64_t count;  // of terms
  int64_t batch;
  const double* status;  // (count, B, kStatusFields)
  T* loss;               // (B,)

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t k = block.x() * kThreads + block.thread();
    if (k >= batch) return;
    double sum = 0, size = 0;
    for (int64_t p = 0; p < count; ++p) {
      const double term = status[(p * batch + k) * kStatusFields + kStatusTerm];
      sum += term, size += fabs(term);
    }
    loss[k] = static_cast<T>(
        clamped_loss(sum, size, static_cast<double>(std::numeric_limits<T>::epsilon())));
  }
};

template <typename T>
SolvePlan stored_plan(const Context& context, Shape shape) {
  shape.small = true;
  return choose_plan(shape, limits(context.device), forced_regime(), [&](const SolvePlan& plan) {
    return clusters_that_fit<SolveKernel<T, kSolveThreads>>(context, plan.team_size,
                                                            static_cast<size_t>(plan.shared.bytes));
  });
}

}  // namespace

template <typename T>
void solve(const Context& context, const std::vector<SolveGroup<T>>& groups,
           const SolveOptions& options) {
  if (!groups.empty() && groups.front().C == nullptr)
    return solve_streamed(context, groups, options);
  for_each_pack(groups, [&](const Pack<SolveGroup<T>>& pack) {
    const Shape shape = shape_of<T>(pack);
    if (shape.problems == 0) return;
    const SolvePlan plan = stored_plan<T>(context, shape);
    SolveArguments<T> arguments = solve_arguments(context, pack, options, shape, plan);
    fill_sweep(context, shape, plan, &arguments.team);
    arguments.guarded = context.scratch<T>(plan.teams * 2 * plan.team_size * plan.vector_length);
    const Grid grid = team_grid(plan, plan.shared.bytes);
    if (plan.small)
      launch(context, SolveKernel<T, kSmallThreads>{arguments}, grid);
    else
      launch(context, SolveKernel<T, kSolveThreads>{arguments}, grid);
  });
}

template <typename T>
std::string describe_plan(const Context& context, int64_t problems, int64_t n, int64_t m,
                          int64_t d) {
  SolveGroup<T> group{};
  group.batch = problems, group.n = n, group.m = m, group.points.d = d;
  const Shape shape = shape_of<T>(Pack<SolveGroup<T>>{1, {group}});
  const SolvePlan plan =
      d > 0 ? choose_streamed_plan(shape, d, limits(context.device), forced_regime(),
                                   tiles_of(context, group.points))
            : stored_plan<T>(context, shape);
  return plan.describe();
}

template <typename T>
void combine_terms(const Context& context, int64_t count, int64_t batch, const double* status,
                   T* loss) {
  Grid grid;
  grid.x = ceil_div(batch, CombineKernel<T>::kThreads);
  launch(context, CombineKernel<T>{count, batch, status, loss}, grid);
}

template void combine_terms(const Context&, int64_t, int64_t, const double*, float*);
template void combine_terms(const Context&, int64_t, int64_t, const double*, double*);
template std::string describe_plan<float>(const Context&, int64_t, int64_t, int64_t, int64_t);
template std::string describe_plan<double>(const Context&, int64_t, int64_t, int64_t, int64_t);
template void solve(const Context&, const std::vector<SolveGroup<float>>&, const SolveOptions&);
template void solve(const Context&, const std::vector<SolveGroup<double>>&, const SolveOptions&);

}  // namespace otloss::cuda
