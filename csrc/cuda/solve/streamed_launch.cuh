// Launches the solve of costs that are made from points, see made_costs.cuh. A file for each type,
// and one for tensor cores, includes this: together they take minutes to compile.
#pragma once

#include "cuda/solve/streamed.h"

#include <algorithm>

#include "cuda/solve/made_costs.cuh"
#include "cuda/solve/solver.cuh"

namespace otloss::cuda {

template <typename T, bool kTensor>
struct StreamedKernel {
  static constexpr int kThreads = kSolveThreads;

  MadeArguments<T> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Costs = MadeCosts<T, Block, kTensor>;
    typename Costs::Team team(block, arguments.solve.team);
    SolverState<T>& state = *team.template at<SolverState<T>>(arguments.solve.shared.state);
    MadeState<T>& made = *reinterpret_cast<MadeState<T>*>(&state + 1);
    static_assert(sizeof(state) + sizeof(made) <= kSolverBytes, "raise kSolverBytes");
    Costs costs(block, arguments, team, state, made);
    if (block.thread() == 0) costs.begin();
    block.sync();
    Solver<T, Block, Costs>(block, arguments.solve, costs, team, state).run();
  }
};

template <typename T, bool kTensor>
void launch_streamed(const Context& context, const MadeArguments<T>& arguments, const Grid& grid) {
  launch(context, StreamedKernel<T, kTensor>{arguments}, grid);
}
extern template void launch_streamed<float, true>(const Context&, const MadeArguments<float>&,
                                                  const Grid&);

template <typename T>
void solve_streamed(const Context& context, const std::vector<SolveGroup<T>>& groups,
                    const SolveOptions& options) {
  if (groups.empty()) return;
  const Limits device = limits(context.device);
  const int64_t d = groups[0].points.d;
  const TileKind tiles = tiles_of(context, groups[0].points);
  Packer<T> packer(context, tiles);
  for_each_pack(groups, [&](const Pack<SolveGroup<T>>& pack) {
    const Shape shape = shape_of<T>(pack);
    if (shape.problems == 0) return;
    const SolvePlan plan = choose_streamed_plan(shape, d, device, forced_regime(), tiles);
    MadeArguments<T> arguments{};
    arguments.solve = solve_arguments(context, pack, options, shape, plan);
    arguments.tiles = tiles;
    std::copy(plan.parts, plan.parts + 2, arguments.parts);
    for (int i = 0; i < pack.count; ++i) {
      const SolveGroup<T>& p = pack.items[i];
      arguments.points[i] = packer(p.batch, p.n, p.m, p.points);
    }
    arguments.vectors =
        context.scratch<T>(plan.teams * made_vectors(plan.parts) * plan.vector_length);
    const int64_t counters = plan.teams * 2 * plan.team_size * kCounterLine;
    arguments.group_counters = context.scratch<unsigned>(counters);
    clear(context, arguments.group_counters, counters * static_cast<int64_t>(sizeof(unsigned)));
    const Grid grid = team_grid(plan, plan.shared.bytes);
    if constexpr (sizeof(T) == 4)
      if (tiles != TileKind::kFma) return launch_streamed<T, true>(context, arguments, grid);
    launch_streamed<T, false>(context, arguments, grid);
  });
}

}  // namespace otloss::cuda
