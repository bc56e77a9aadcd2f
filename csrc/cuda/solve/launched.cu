// Launches the solve of costs that are stored in global memory, or made from points. In turn, until
// all problems of a call are solved:
//
//     SweepKernel     the sums that each problem waits for      solve_sweeps.cu, ../pass/sweeps.cuh
//     ControlKernel   the next step of each solve
//
// Kernel boundaries take the place of barriers between blocks, and a sweep has all registers to
// itself; at these sizes a sweep takes far longer than a launch. A pass takes two turns, more where
// sums have to be made again. A problem that is solved asks for nothing.
#include <algorithm>
#include <limits>

#include "cuda/solve/launched_costs.cuh"
#include "cuda/solve/solver.cuh"

namespace otloss::cuda {
namespace {

template <typename T>
struct LaunchedSolve : LaunchedArguments<T> {
  struct State {
    SolverState<T> solver;
    LaunchedState<T> launched;
  };

  OTLOSS_DEVICE const Pack<SolveGroup<T>>& groups() const { return this->solve.groups; }

  template <class Block>
  OTLOSS_DEVICE bool advance(Block& block, ControlTeam<Block>& team, State& state,
                             const SolveGroup<T>& p, int64_t batch, bool first) const {
    using Costs = LaunchedCosts<T, Block>;
    Costs costs(block, *this, team, state.solver, state.launched);
    Solver<T, Block, Costs> solver(block, this->solve, costs, team, state.solver);
    return launched_turn(costs, solver, state.solver, team, p, batch, first);
  }
};

// Of stored costs the largest of each row, of columns that count; infinite if one is not finite. A
// warp for each row.
template <typename T>
struct LargestKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;

  Pack<SolveGroup<T>> groups;
  int64_t blocks, length;
  T* largest;  // (problems, length) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    with_problem(block, groups, blocks, [&](const auto& p, int64_t batch, int64_t number) {
      const int64_t i = number * kWarps + block.thread() / kWarp;
      if (i >= p.n) return;
      const T *const C = p.C + (batch * p.n + i) * p.m, *const b = p.b + batch * p.m;
      const int lane = block.thread() % kWarp, m = static_cast<int>(p.m);
      T most = join_over<Max>(lane, kWarp, m, T(0), [&](int j) {
        const T c = fabs(C[j]);
        return !(b[j] > T(0))                       ? T(0)
               : c <= std::numeric_limits<T>::max() ? c
                                                    : std::numeric_limits<T>::infinity();
      });
      most = warp_join<Max>(block, most);
      if (lane == 0) largest[block.x() / blocks * length + i] = most;
    });
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
    with_problem(block, groups, kBlocks, [&](const auto& p, int64_t batch, int64_t number) {
      const int at = static_cast<int>(number) * kThreads + block.thread();
      const int i = at / kSample, j = at % kSample;
      if (p.symmetric || i >= sample_size(p.n) || j >= sample_size(p.m)) return;
      const PackedPair<T>& pair = points[&p - groups.items];
      const int64_t row = sample(i, p.n), column = sample(j, p.m);
      T& out = samples[block.x() / kBlocks * kSample * kSample + at];
      if (p.C != nullptr)
        out = p.C[(batch * p.n + row) * p.m + column];
      else
        dispatch_cost(pair.kind, [&](auto cost) {
          const auto x = pair.x.cloud(batch, pair.d, p.n), y = pair.y.cloud(batch, pair.d, p.m);
          out = pair_cost<decltype(cost)>(pair.d, x.z + row, x.stride, y.z + column, y.stride);
        });
    });
  }
};

}  // namespace

template <typename T>
void solve_launched(const Context& context, const Pack<SolveGroup<T>>& pack,
                    const SolveOptions& options, const SolvePlan& plan, Packer<T>& packer) {
  const Shape shape = shape_of<T>(pack);
  const int64_t problems = shape.problems;
  LaunchedSolve<T> work{};
  work.solve = solve_arguments(context, pack, options, plan, problems);
  for (int i = 0; i < pack.count; ++i) {
    const SolveGroup<T>& p = pack.items[i];
    work.points[i] = packer(p.batch, p.n, p.m, p.points, p.C);
  }
  T* const samples = context.scratch<T>(problems * kSample * kSample);
  work.samples = samples;
  work.vectors = context.scratch<T>(problems * kLaunchedVectors * plan.vector_length);
  if (pack.items[0].C != nullptr) {
    work.largest = context.scratch<T>(problems * plan.vector_length);
    LargestKernel<T> largest{pack, ceil_div(shape.n, LargestKernel<T>::kWarps), plan.vector_length,
                             work.largest};
    launch(context, largest, Grid{problems * largest.blocks});
  }
  if (options.n_iters < 0) {
    SampleKernel<T> sampled{pack, {}, samples};
    std::copy(work.points, work.points + pack.count, sampled.points);
    launch(context, sampled, Grid{problems * SampleKernel<T>::kBlocks});
  }
  work.orders = Sweeps<T>::of_plan(context, shape, plan);
  // Each pass may make the sums of both sides three times; and one for the value.
  const int64_t most = 6 * (options.n_iters < 0 ? options.max_iters : options.n_iters) + 1;
  run_controls(context, work, problems, most, [&](Queue& queue) {
    queue_solve_sweep(queue, work.orders, work.points[0], plan.tiles);
  });
}

template void solve_launched(const Context&, const Pack<SolveGroup<float>>&, const SolveOptions&,
                             const SolvePlan&, Packer<float>&);
template void solve_launched(const Context&, const Pack<SolveGroup<double>>&, const SolveOptions&,
                             const SolvePlan&, Packer<double>&);

}  // namespace otloss::cuda
