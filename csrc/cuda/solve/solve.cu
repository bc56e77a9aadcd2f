// Launches a solve. The cost model and the layout of shared memory: plan.cpp.
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "core/last_update.h"
#include "cuda/multiscale/multiscale.h"
#include "cuda/pass/pack.cuh"
#include "cuda/solve/resident_costs.cuh"
#include "cuda/solve/solver.cuh"

namespace otloss::cuda {
namespace {

template <typename T, int kBlockThreads>
struct SolveKernel {
  static constexpr int kThreads = kBlockThreads;
  static constexpr int kResidentBlocks = kThreads < kSolveThreads ? kSmallBlocks : 1;

  SolveArguments<T> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Costs = ResidentCosts<T, Block, kThreads>;
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
    LossTerms entry;
    for (int64_t p = 0; p < count; ++p)
      entry.add(status[(p * batch + k) * kStatusFields + kStatusTerm]);
    loss[k] = static_cast<T>(entry.clamped(roundoff<T>()));
  }
};

template <typename T>
SolvePlan plan_of(const Context& context, const Pack<SolveGroup<T>>& pack, TileKind tiles) {
  const Shape shape = shape_of<T>(pack);
  const Limits device = limits(context.device);
  const Regime forced = forced_regime();
  if (tiles == TileKind::kStored) return choose_plan(shape, device, forced);
  if (forced != Regime::kAuto && forced != Regime::kStreamed)
    throw std::runtime_error(std::string("otloss: OTLOSS_CUDA_REGIME=") +
                             std::getenv("OTLOSS_CUDA_REGIME") +
                             " stores costs, but method=\"streamed\" was asked for");
  return choose_launched_plan(shape, pack.items[0].points.d, device, tiles);
}

template <typename T>
void solve_resident(const Context& context, const Pack<SolveGroup<T>>& pack,
                    const SolveOptions& options, const SolvePlan& plan) {
  const int64_t problems = shape_of<T>(pack).problems, blocks = problems * plan.team_size;
  SolveArguments<T> arguments = solve_arguments(context, pack, options, plan, problems);
  arguments.parts = context.scratch<T>(2 * blocks * plan.vector_length);
  Grid grid;
  grid.x = blocks;
  grid.shared = static_cast<size_t>(plan.shared.bytes);
  grid.cluster = plan.team_size;
  if constexpr (sizeof(T) == 4)
    if (plan.small) return launch(context, SolveKernel<T, kSmallThreads>{arguments}, grid);
  launch(context, SolveKernel<T, kSolveThreads>{arguments}, grid);
}

}  // namespace

template <typename T>
void solve(const Context& context, const std::vector<SolveGroup<T>>& groups,
           const SolveOptions& options) {
  if (groups.empty()) return;
  if (groups[0].points.multiscale) return multiscale::solve(context, groups, options);
  const TileKind tiles = tiles_of(context, groups[0].points, groups[0].C);
  Packer<T> packer(context, tiles);
  for_each_pack(groups, [&](const Pack<SolveGroup<T>>& pack) {
    if (shape_of<T>(pack).problems == 0) return;
    const SolvePlan plan = plan_of<T>(context, pack, tiles);
    if (plan.is_launched())
      solve_launched(context, pack, options, plan, packer);
    else
      solve_resident(context, pack, options, plan);
  });
  if constexpr (sizeof(T) == 4)
    if (has_last_update(groups, options)) update_in_double(context, groups, options.eps);
}

template <typename T>
std::string describe_plan(const Context& context, int64_t problems, int64_t n, int64_t m,
                          int64_t d) {
  SolveGroup<T> group{};
  group.batch = problems, group.n = n, group.m = m, group.points.d = d;
  const TileKind tiles = d > 0 ? tiles_of(context, group.points) : TileKind::kStored;
  return plan_of<T>(context, Pack<SolveGroup<T>>{1, {group}}, tiles).describe();
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
