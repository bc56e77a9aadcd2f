// Launches the solve of costs that are made from points. In turn, until all problems of a call are
// solved:
//
//     SweepKernel     the sums that each problem waits for      ../pass/sweeps.cuh
//     ControlKernel   the next step of each solve               block: a problem
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

// What is kept of a solve between its turns.
template <typename T>
struct SavedSolve {
  SolverState<T> solver;
  MadeState<T> made;
};

template <typename T>
struct ControlKernel {
  static constexpr int kThreads = kControlThreads;
  static constexpr size_t kShared = SweepShape(sizeof(T)).end + sizeof(SavedSolve<T>);

  MadeArguments<T> arguments;
  SavedSolve<T>* saved;  // (problems,)
  bool first;            // there is nothing saved yet
  Loop loop;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Costs = MadeCosts<T, Block>;
    typename Costs::Team team(block, arguments.solve.team);
    SavedSolve<T>& state = *team.template at<SavedSolve<T>>(SweepShape(sizeof(T)).end);
    const RowSum sums = first ? RowSum::kPlan : arguments.orders[team.index()].what;
    bool done = false;
    if (sums != RowSum::kNone) {
      if (!first) copy_words<kThreads>(block, saved + team.index(), &state);
      block.sync();
      const Costs costs(block, arguments, team, state.solver, state.made);
      Solver<T, Block, Costs> solver(block, arguments.solve, costs, team, state.solver);
      team.for_problems(arguments.solve.groups, [&](const SolveGroup<T>& p, int64_t batch) {
        done = advance(block, solver, costs, state.solver, p, batch, sums);
      });
      copy_words<kThreads>(block, &state, saved + team.index());
    }
    if (block.thread() != 0) return;
    if (done) arguments.orders[team.index()].what = RowSum::kNone;
    block.count_off(loop, done);
  }

 private:
  // True: the problem is solved. Else a sweep is asked for.
  template <class Block, class Solver, class Costs>
  OTLOSS_DEVICE bool advance(Block& block, Solver& solver, Costs costs, SolverState<T>& state,
                             const SolveGroup<T>& p, int64_t batch, RowSum sums) const {
    if (sums != RowSum::kCost) {
      if (block.thread() == 0) state.group = &p;  // another address in every launch
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
  const int64_t problems = shape.problems, length = plan.vector_length;
  const PointPair<T>& points = pack.items[0].points;
  MadeArguments<T> arguments{};
  arguments.solve = solve_arguments(context, pack, options, shape, plan);
  arguments.tiles = plan.tiles;
  arguments.layout = plan.streamed;
  for (int side = 0; side < 2; ++side) arguments.parts[side] = plan.cuts[side].parts;
  for (int i = 0; i < pack.count; ++i) {
    const SolveGroup<T>& p = pack.items[i];
    arguments.points[i] = packer(p.batch, p.n, p.m, p.points);
  }
  RowSums<T>* const orders = context.scratch<RowSums<T>>(problems);
  T* const samples = context.scratch<T>(problems * kSample * kSample);
  arguments.orders = orders, arguments.samples = samples;
  arguments.vectors = context.scratch<T>(problems * made_vectors(arguments.parts) * length);
  SweepArguments<RowSums<T>> sweep;
  const Grid of_sweep = plan_sweeps(shape, plan, orders, &sweep);
  Grid of_samples, of_control;
  of_samples.x = problems * SampleKernel<T>::kBlocks;
  of_control.x = problems;
  of_control.shared = ControlKernel<T>::kShared;
  Loop loop{context.scratch<unsigned>(1), static_cast<unsigned>(problems)};
  clear(context, loop.done, sizeof(unsigned));
  SampleKernel<T> sampled{pack, {}, samples};
  std::copy(arguments.points, arguments.points + pack.count, sampled.points);
  if (options.n_iters < 0) launch(context, sampled, of_samples);
  ControlKernel<T> control{arguments, context.scratch<SavedSolve<T>>(problems), true, loop};
  launch(context, control, of_control);
  control.first = false;
  // Each pass may make the sums of both sides three times; and one for the value.
  const int64_t most = 6 * (options.n_iters < 0 ? options.max_iters : options.n_iters) + 1;
  repeat(context, loop, most, [&](const Loop& turn, Queue& queue) {
    if constexpr (sizeof(T) == 4)
      if (plan.tiles != TileKind::kFma)
        queue_tensor_sweep(queue, sweep, points.kind, plan.tiles, of_sweep);
    if (plan.tiles == TileKind::kFma)
      queue_sweep<SolveSums>(queue, sweep, points.kind, points.d, of_sweep);
    control.loop = turn;
    queue(control, of_control);
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
