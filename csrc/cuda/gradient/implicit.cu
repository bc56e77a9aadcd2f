// The derivative of the solution, in the notation of csrc/cpu/gradient/implicit.cpp: with the
// marginals r, c of the plan P, divided by the dampings,
//     [diag(r)  P     ] (alpha)   (f_bar)
//     [P^T      diag(c)] (beta) = (g_bar),   C_bar_ij += P_ij (alpha_i + beta_j),
// by conjugate gradients on the Schur complement diag(c) - P^T diag(1/r) P, or, for a cloud against
// itself, on diag(r) + P. In turn, until all systems of a call are solved:
//
//     PlanProductKernel or SweepKernel    P x or P^T w of each problem      stored_plan.cuh, or
//                                         made from points                  ../pass/sweeps.cuh
//     SystemKernel                        the vectors of the iteration      block: a problem
//
// P is stored beside a cost matrix (PlanEntriesKernel makes it, and C_bar of it in the end), or its
// entries are made again from points in every product, identical for both sides; what the points
// receive is one more launch, by the potentials and the solution (alpha, beta) that this one leaves.
#include "cuda/gradient/implicit_system.cuh"
#include "cuda/gradient/stored_plan.cuh"

namespace otloss::cuda {
namespace {

template <typename T>
struct SystemKernel {
  static constexpr int kThreads = kControlThreads;
  static constexpr int64_t kState = (sizeof(TeamScratch) + 15) / 16 * 16;
  static constexpr size_t kShared = kState + sizeof(ImplicitState<T>);

  ImplicitArguments<T> arguments;
  ImplicitState<T>* saved;  // (problems,)
  bool first;
  Loop loop;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using System = Implicit<T, Block>;
    typename System::Team team(block, arguments.team);
    RowSums<T, double>& order = arguments.orders[team.index()];
    bool done = false;
    if (first || order.what != RowSum::kNone) {
      ImplicitState<T>& state =
          *reinterpret_cast<ImplicitState<T>*>(block.template shared<unsigned char>() + kState);
      if (!first) copy_words<kThreads>(block, saved + team.index(), &state);
      team.for_problems(arguments.groups, [&](const ImplicitGroup<T>& p, int64_t batch) {
        System system(block, arguments, team, p, batch, state);
        if (first)
          system.open();
        else
          done = system.advance();
      });
      copy_words<kThreads>(block, &state, saved + team.index());
    }
    if (block.thread() != 0) return;
    if (done) order.what = RowSum::kNone;
    block.count_off(loop, done);
  }
};

template <typename T>
void backward(const Context& context, const Pack<ImplicitGroup<T>>& pack, double eps,
              Objective objective, Packer<T>& packer) {
  const Limits device = limits(context.device);
  const Shape shape = shape_of<T>(pack);
  const PointPair<T>& points = pack.items[0].made.points;
  const bool stored = pack.items[0].C != nullptr;
  if (shape.problems == 0) return;
  SolvePlan plan{};
  if (stored)
    plan_products<T>(shape, device, &plan);
  else
    plan = choose_streamed_plan(shape, points.d, device, Regime::kAuto);
  ImplicitArguments<T> arguments{};
  arguments.groups = pack;
  arguments.eps = eps, arguments.objective = objective;
  arguments.layout = plan.streamed;
  for (int side = 0; side < 2; ++side) arguments.parts[side] = plan.cuts[side].parts;
  fill_team(context, shape, plan, &arguments.team);
  const int64_t length = arguments.length = plan.vector_length, problems = shape.problems;
  const int most = std::max(arguments.parts[0], arguments.parts[1]);
  arguments.orders = context.scratch<RowSums<T, double>>(problems);
  arguments.vectors = context.scratch<double>(problems * ImplicitVectors::kCount * length);
  arguments.out = context.scratch<double>(problems * most * length);
  for (int i = 0; i < pack.count; ++i) {
    const ImplicitGroup<T>& p = pack.items[i];
    PlanOfPoints<T>& of = arguments.plans[i];
    of.F = context.scratch<T>(p.batch * packed_stride(p.n));
    of.G = context.scratch<T>(p.batch * packed_stride(p.m));
    if (stored) continue;
    of.points = packer(p.batch, p.n, p.m, p.made.points);
    of.alpha = context.scratch<T>(p.batch * p.n), of.beta = context.scratch<T>(p.batch * p.m);
  }
  SweepArguments<RowSums<T, double>> sweep;
  Grid of_sweep = plan_sweeps(shape, plan, arguments.orders, &sweep), of_system, of_entries;
  of_system.x = problems, of_system.shared = SystemKernel<T>::kShared;
  Loop loop{context.scratch<unsigned>(1), static_cast<unsigned>(problems)};
  clear(context, loop.done, sizeof(unsigned));
  SystemKernel<T> system{arguments, context.scratch<ImplicitState<T>>(problems), true, loop};
  launch(context, system, of_system);
  system.first = false;
  PlanEntriesKernel<T> entries{arguments, ceil_div(shape.n, PlanEntriesKernel<T>::kWarps), false};
  of_entries.x = problems * entries.blocks;
  if (stored) launch(context, entries, of_entries);
  // Beside the iterations: sums, sums of costs, the right-hand side, and the last product.
  const int64_t turns = 2 * (kMaxCgIterations + 4);
  repeat(context, loop, turns, [&](const Loop& turn, Queue& queue) {
    if (stored)
      queue(PlanProductKernel<T>{pack, sweep}, of_sweep);
    else
      queue_sweep<Products>(queue, sweep, points.kind, points.d, of_sweep);
    system.loop = turn;
    queue(system, of_system);
  });
  entries.solved = true;
  if (stored) return launch(context, entries, of_entries);
  implicit_point_sums(context, pack, arguments.plans, eps, objective);
}

}  // namespace

template <typename T>
void implicit_backward(const Context& context, const std::vector<ImplicitGroup<T>>& groups,
                       double eps, Objective objective) {
  // The products take multiply-adds: with tensor cores P_ij would depend on which side is first.
  // The points' sums afterwards need not.
  Packer<T> packer(context,
                   groups.empty() ? TileKind::kFma : tiles_of(context, groups[0].made.points));
  for_each_pack(groups, [&](const Pack<ImplicitGroup<T>>& pack) {
    backward(context, pack, eps, objective, packer);
  });
}

template void implicit_backward(const Context&, const std::vector<ImplicitGroup<float>>&, double,
                                Objective);
template void implicit_backward(const Context&, const std::vector<ImplicitGroup<double>>&, double,
                                Objective);

}  // namespace otloss::cuda
