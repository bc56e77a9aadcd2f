// Launches the solve of costs that are made from points. In turn, until all problems of a call are
// solved:
//
//     SweepKernel     the sums that each problem waits for      ../pass/sweeps.cuh
//     ControlKernel   the next step of each solve
//
// Kernel boundaries take the place of barriers between blocks, and a sweep has all registers to
// itself; at the sizes where costs are not stored a sweep takes far longer than a launch. A pass
// takes two turns, more where sums have to be made again. A problem that is solved asks for
// nothing.
//
// A file for each type includes this.
#pragma once

#include "cuda/solve/streamed.h"

#include <algorithm>

#include "cuda/solve/made_costs.cuh"
#include "cuda/solve/solver.cuh"

namespace otloss::cuda {

template <typename T>
struct StreamedSolve : MadeArguments<T> {
  struct State {
    SolverState<T> solver;
    MadeState<T> made;
  };
  template <class Block>
  using Team = typename MadeCosts<T, Block>::Team;

  OTLOSS_DEVICE const Pack<SolveGroup<T>>& groups() const { return this->solve.groups; }
  OTLOSS_DEVICE const TeamArguments<T>& team() const { return this->solve.team; }

  template <class Block>
  OTLOSS_DEVICE bool advance(Block& block, Team<Block>& team, State& state, const SolveGroup<T>& p,
                             int64_t batch, bool first) const {
    using Costs = MadeCosts<T, Block>;
    Costs costs(block, *this, team, state.solver, state.made);
    Solver<T, Block, Costs> solver(block, this->solve, costs, team, state.solver);
    if (first || this->orders.of[team.index()].what != RowSum::kCost) {
      if (block.thread() == 0) state.solver.group = &p;  // another address in every launch
      block.sync();
      if (!first && !costs.complete()) return false;
      if (first ? solver.open(p, batch) : solver.turn()) return costs.ask(0, RowSum::kPlan), false;
      solver.write_potentials();
      if (solver.is_transport()) {
        solver.publish_result();
        return costs.ask(0, RowSum::kCost), false;
      }
    }
    solver.write_status();
    return true;
  }
};

// The costs that tell how varied all are; a thread for each.
template <typename T>
struct SampleKernel {
  static constexpr int kThreads = 256, kBlocks = kSample * kSample / kThreads;  // of a problem

  Pack<SolveGroup<T>> groups;
  PackedPair<T> points[kMaxGroups];
  T* samples;  // (problems, kSample, kSample) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    int64_t batch = block.x() / kBlocks;
    const int group = group_of(groups, &batch);
    const SolveGroup<T>& p = groups.items[group];
    const int at = static_cast<int>(block.x() % kBlocks) * kThreads + block.thread();
    const int i = at / kSample, j = at % kSample;
    if (p.symmetric || i >= sample_size(p.n) || j >= sample_size(p.m)) return;
    const PackedPair<T>& pair = points[group];
    samples[block.x() / kBlocks * kSample * kSample + at] =
        pair_cost(pair.kind, pair.d, false, packed_cloud(pair.x, batch, pair.d, p.n),
                  sample(i, p.n), packed_cloud(pair.y, batch, pair.d, p.m), sample(j, p.m));
  }
};

template <typename T>
void solve_pack(const Context& context, const Pack<SolveGroup<T>>& pack,
                const SolveOptions& options, const Shape& shape, const SolvePlan& plan,
                Packer<T>& packer) {
  const int64_t problems = shape.problems;
  const PointPair<T>& points = pack.items[0].points;
  StreamedSolve<T> work{};
  work.solve = solve_arguments(context, pack, options, shape, plan);
  for (int i = 0; i < pack.count; ++i) {
    const SolveGroup<T>& p = pack.items[i];
    work.points[i] = packer(p.batch, p.n, p.m, p.points);
  }
  T* const samples = context.scratch<T>(problems * kSample * kSample);
  work.samples = samples;
  work.vectors = context.scratch<T>(problems * kMadeVectors * plan.vector_length);
  if (options.n_iters < 0) {
    SampleKernel<T> sampled{pack, {}, samples};
    std::copy(work.points, work.points + pack.count, sampled.points);
    Grid grid;
    grid.x = problems * SampleKernel<T>::kBlocks;
    launch(context, sampled, grid);
  }
  SweepArguments<RowSums<T>> sweep;
  const Grid grid = plan_sweeps(context, shape, plan, &work.orders, &sweep);
  // Each pass may make the sums of both sides three times; and one for the value.
  const int64_t most = 6 * (options.n_iters < 0 ? options.max_iters : options.n_iters) + 1;
  run_controls(context, work, problems, most, [&](Queue& queue) {
    if constexpr (sizeof(T) == 4)
      if (plan.tiles != TileKind::kFma)
        return queue_tensor_sweep(queue, sweep, points.kind, plan.tiles, grid);
    queue_sweep<SolveSums>(queue, sweep, points.kind, points.d, grid);
  });
}

template <typename T>
void solve_streamed(const Context& context, const std::vector<SolveGroup<T>>& groups,
                    const SolveOptions& options) {
  if (groups.empty()) return;
  const Limits device = limits(context.device);
  const TileKind tiles = tiles_of(context, groups[0].points);
  Packer<T> packer(context, tiles);
  for_each_pack(groups, [&](const Pack<SolveGroup<T>>& pack) {
    const Shape shape = shape_of<T>(pack);
    if (shape.problems == 0) return;
    const SolvePlan plan =
        choose_streamed_plan(shape, groups[0].points.d, device, forced_regime(), tiles);
    solve_pack(context, pack, options, shape, plan, packer);
  });
}

}  // namespace otloss::cuda
