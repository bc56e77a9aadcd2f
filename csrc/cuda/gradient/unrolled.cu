// The exact derivative of L Sinkhorn iterations, in the notation of csrc/cpu/gradient/unrolled.cpp:
//     e_ij = exp((f_i + g_j / q - C_ij) / eps),  R_ij = z_i e_ij w_j,
//     u_i = sum_j e_ij g_bar_j,   f_bar_i -= a_i u_i,   a_bar_i -= eps u_i,
//     v_j = sum_i R_ij f_bar_i,   g_bar'_j = -q v_j,    b_bar_j -= eps v_j / b_j,
//     C_bar_ij = sum over iterations of a_i e_ij g_bar_j + R_ij f_bar_i.
//
// R_ij has an exponential of its own, of E_i + H_j - k C_ij: factors z and w can be beyond any
// number where e is 0. The recursion keeps its vectors, L (n + 2 m) values, and two launches do
// all, whatever L:
//
//     AdjointKernel     the recursion: a team of blocks for each problem, which passes over C once
//                       per iteration (pass.cuh) and meets twice, for v and for the next g_bar
//     accumulate.cu     C_bar, a plain sum over the iterations
//
// The recursion's vectors are cut by rows and columns: all are in global memory, and a block only
// sees others' v (in parts) and g_bar.
//
// Without cost matrices e, and then R, are made from the points, once for the rows and once for the
// columns: sweeps (../pass/sweeps.cuh) with a block for each problem between them;
// point_sums_launch.cuh makes the sums of the points.
#include "cuda/gradient/point_sums.h"
#include "cuda/gradient/unrolled_adjoint.cuh"
#include "cuda/pass/sweeps.cuh"

namespace otloss::cuda {
namespace {

template <typename T>
struct AdjointKernel {
  static constexpr int kThreads = kSolveThreads;

  AdjointArguments<T> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Team = TeamSweep<T, Block>;
    Team team(block, arguments.blocks);
    team.for_problems(arguments.pack, [&](const AdjointGroup<T>& p, int64_t batch) {
      const T* const tile = load(team, p.C + (batch * p.n + team.first_row()) * p.m);
      recur(team, Adjoint<T, Block, Team>(arguments, team, p, batch, tile), p.L);
    });
  }

 private:
  // The costs of the block's rows to where passes read them.
  template <class Team>
  OTLOSS_DEVICE const T* load(Team& team, const T* C) const {
    if (!arguments.blocks.resident) return C;
    T* const tile = team.template at<T>(SweepShape(sizeof(T)).end);
    const int64_t m = team.share().m;
    team.for_entries([&](int i, int j) { tile[i * m + j] = C[i * m + j]; });
    team.block_sync();
    return tile;
  }

  template <class Team, class Recursion>
  OTLOSS_DEVICE void recur(Team& team, Recursion recursion, int64_t L) const {
    const auto sum = [&](const auto& work, auto&& set) {
      team.pass(work);
      team.sync();
      team.join(set);
    };
    recursion.begin();
    if (recursion.is_transport()) {
      T* const G = arguments.G + team.index() * arguments.blocks.columns;
      team.for_columns([&](int j) { team.store(G + j, recursion.plan_G(j)); });
      team.sync();
      sum(recursion.cost_work(G), [&](int j, T v) { recursion.put_costs(j, v); });
      team.block_sync();
      recursion.seed_costs();
    } else {
      recursion.seed_dual();
    }
    recursion.add_outside();
    team.sync();
    for (int64_t l = L - 1; l >= 0; --l) {
      sum(recursion.work(l), [&](int j, T v) { recursion.take(l, j, v); });
      if (l > 0) recursion.make_H(l - 1);
      team.sync();
    }
    recursion.write();
  }
};

// Without cost matrices: between the sweeps.
template <typename T>
struct AdjointWork : AdjointArguments<T> {
  struct State {
    int64_t l;  // iteration, or -1: P C
  };
  template <class Block>
  using Team = TeamShare<T, Block, kControlThreads>;

  IterationsOfPoints<T> made[kMaxGroups];
  Orders<T> orders;
  T* exponents;  // (problems, 2, orders.length) of the rows and the columns of an iteration

  OTLOSS_DEVICE const Pack<AdjointGroup<T>>& groups() const { return this->pack; }
  OTLOSS_DEVICE const TeamArguments<T>& team() const { return this->blocks; }

  template <class Block>
  OTLOSS_DEVICE bool advance(Block& block, Team<Block>& team, State& state,
                             const AdjointGroup<T>& p, int64_t batch, bool first) const;
};

template <typename T, class Block>
class SweptAdjoint : Adjoint<T, Block, typename AdjointWork<T>::template Team<Block>> {
 public:
  using Work = AdjointWork<T>;
  using Team = typename Work::template Team<Block>;
  using Base = Adjoint<T, Block, Team>;

  OTLOSS_DEVICE SweptAdjoint(Block& block, const Work& work, Team& team,
                             typename Work::State& state, const AdjointGroup<T>& p, int64_t batch)
      : Base(work, team, p, batch, nullptr),
        block_(block),
        orders_(work.orders),
        state_(state),
        of_(work.made[&p - work.pack.items]),
        exponents_(work.exponents + team.index() * 2 * work.orders.length),
        scale_(kLog2E / work.eps) {}

  // Asks for the first sums.
  OTLOSS_DEVICE bool open() {
    Base::begin();
    block_.sync();
    if (block_.thread() == 0) orders_.place(team_.index(), of_.points, p_.made.symmetric, scale_);
    if (!this->is_transport()) {
      Base::seed_dual();
      Base::add_outside();
      return iterate(p_.L - 1);
    }
    T *const F = exponents(-1).F, *const G = exponents(-1).G;
    team_.for_rows([&](int i) { F[i] = Base::plan_F(i); });
    team_.for_columns([&](int j) { G[j] = Base::plan_G(j); });
    return ask(-1, 0, RowSum::kCost, nullptr);
  }

  // After those that were asked for. True: done.
  OTLOSS_DEVICE bool advance() {
    Base::resume();
    const bool rows = orders_.of[team_.index()].side == 0;
    if (state_.l < 0) return rows ? row_costs() : column_costs();
    return rows ? row_sums() : column_sums();
  }

 private:
  struct Exponents {
    T *F, *G;
  };
  // Of an iteration, or of the last plan, which stay for the gradient of the points.
  OTLOSS_DEVICE Exponents exponents(int64_t l) const {
    if (l >= 0) return {exponents_, exponents_ + orders_.length};
    return {of_.F + batch_ * packed_stride(p_.n), of_.G + batch_ * packed_stride(p_.m)};
  }

  OTLOSS_DEVICE T sum(int i) const { return static_cast<T>(orders_.sum(team_.index(), i)); }

  OTLOSS_DEVICE bool ask(int64_t l, int side, RowSum what, const T* x) {
    T *const F = exponents(l).F, *const G = exponents(l).G;
    const SweepSide<T> rows = row_side(of_.points, batch_, p_.n, F);
    const SweepSide<T> columns = column_side(of_.points, batch_, p_.m, G);
    rows.pad(block_), columns.pad(block_);
    block_.sync();
    if (block_.thread() != 0) return false;
    state_.l = l;
    set_order(orders_.of[team_.index()], side, what, x, rows, columns);
    return false;
  }

  OTLOSS_DEVICE bool row_costs() {
    team_.for_rows([&](int i) { Base::f_bar()[i] = sum(i); });
    return ask(-1, 1, RowSum::kCost, nullptr);
  }

  OTLOSS_DEVICE bool column_costs() {
    team_.for_columns([&](int j) { Base::put_costs(j, sum(j)); });
    Base::seed_costs();
    Base::add_outside();
    return iterate(p_.L - 1);
  }

  // The row sums of iteration l.
  OTLOSS_DEVICE bool iterate(int64_t l) {
    const IterationWork<Block, T> work = Base::work(l);
    T *const F = exponents(l).F, *const G = exponents(l).G;
    team_.for_rows([&](int i) { F[i] = work.row(i); });
    team_.for_columns([&](int j) { G[j] = work.exponent_of(j); });
    return ask(l, 0, RowSum::kPlan, work.g_bar);
  }

  OTLOSS_DEVICE bool row_sums() {
    const IterationWork<Block, T> work = Base::work(state_.l);
    T *const F = exponents(state_.l).F, *const G = exponents(state_.l).G;
    team_.for_rows([&](int i) {
      work.finish(i, sum(i), true);
      F[i] = work.row_again(i);
    });
    team_.for_columns([&](int j) { G[j] = work.H[j]; });
    return ask(state_.l, 1, RowSum::kPlan, work.R);
  }

  OTLOSS_DEVICE bool column_sums() {
    const int64_t l = state_.l;
    team_.for_columns([&](int j) { Base::take(l, j, sum(j)); });
    if (l > 0) {
      Base::make_H(l - 1);
      return iterate(l - 1);
    }
    Base::write();
    return true;
  }

  using Base::batch_, Base::p_, Base::team_;
  Block& block_;
  const Orders<T>& orders_;
  typename Work::State& state_;
  const IterationsOfPoints<T>& of_;
  T* const exponents_;
  const double scale_;
};

template <typename T>
template <class Block>
OTLOSS_DEVICE bool AdjointWork<T>::advance(Block& block, Team<Block>& team, State& state,
                                           const AdjointGroup<T>& p, int64_t batch,
                                           bool first) const {
  SweptAdjoint<T, Block> adjoint(block, *this, team, state, p, batch);
  return first ? adjoint.open() : adjoint.advance();
}

// Every workspace that the launches share.
template <typename T>
Pack<AdjointGroup<T>> with_workspace(const Context& context, const Pack<UnrolledGroup<T>>& pack) {
  Pack<AdjointGroup<T>> groups{};
  groups.count = pack.count;
  for (int g = 0; g < pack.count; ++g) {
    const UnrolledGroup<T>& p = pack.items[g];
    const int64_t iterations = p.batch * p.L;
    groups.items[g] = {p, p.grad_C || !p.C ? context.scratch<T>(iterations * p.n) : nullptr,
                       context.scratch<T>(iterations * p.m), context.scratch<T>(iterations * p.m),
                       context.scratch<double>(p.batch * 2)};
  }
  return groups;
}

// All but the blocks.
template <typename T>
void fill_arguments(const Context& context, const Pack<AdjointGroup<T>>& pack, double eps,
                    Objective objective, AdjointArguments<T>* arguments) {
  const TeamArguments<T>& blocks = arguments->blocks;
  arguments->pack = pack;
  arguments->eps = eps;
  arguments->objective = objective;
  arguments->f_bar = context.scratch<T>(blocks.teams * blocks.rows);
  arguments->G = context.scratch<T>(blocks.teams * blocks.columns);
  arguments->a_bar = context.scratch<double>(blocks.teams * blocks.rows);
  arguments->b_bar = context.scratch<double>(blocks.teams * blocks.columns);
}

template <typename T>
void stored_backward(const Context& context, const Pack<AdjointGroup<T>>& pack, double eps,
                     Objective objective) {
  AdjointKernel<T> adjoint{};
  const Grid grid = plan_team<AdjointKernel<T>>(context, pack, &adjoint.arguments.blocks);
  fill_arguments(context, pack, eps, objective, &adjoint.arguments);
  launch(context, adjoint, grid);
  accumulate_costs(context, pack, eps, objective);
}

template <typename T>
void made_backward(const Context& context, const Pack<UnrolledGroup<T>>& given,
                   const Pack<AdjointGroup<T>>& pack, double eps, Objective objective,
                   Packer<T>& packer) {
  const Shape shape = shape_of<T>(pack);
  const PointPair<T>& points = pack.items[0].made.points;
  if (shape.problems == 0) return;
  const SolvePlan plan =
      choose_streamed_plan(shape, points.d, limits(context.device), Regime::kAuto);
  AdjointWork<T> work{};
  fill_team(context, shape, plan, &work.blocks);
  work.blocks.rows = work.blocks.columns = plan.vector_length;
  fill_arguments(context, pack, eps, objective, &work);
  SweepArguments<RowSums<T>> sweep;
  const Grid grid = plan_sweeps(context, shape, plan, &work.orders, &sweep);
  work.exponents = context.scratch<T>(shape.problems * 2 * plan.vector_length);
  int64_t most = 0;
  for (int g = 0; g < pack.count; ++g) {
    const AdjointGroup<T>& p = pack.items[g];
    most = std::max(most, 2 * (p.L + 1));
    work.made[g] = {packer(p.batch, p.n, p.m, p.made.points),
                    context.scratch<T>(p.batch * packed_stride(p.n)),
                    context.scratch<T>(p.batch * packed_stride(p.m)),
                    p.R,
                    p.g_bar,
                    p.H};
    if (objective == Objective::kTransport) continue;
    // There is no last plan, but its exponents are loaded with the points.
    const auto bytes = [&](int64_t count) {
      return p.batch * packed_stride(count) * static_cast<int64_t>(sizeof(T));
    };
    clear(context, work.made[g].F, bytes(p.n));
    clear(context, work.made[g].G, bytes(p.m));
  }
  run_controls(context, work, shape.problems, most, [&](Queue& queue) {
    queue_sweep<Products>(queue, sweep, points.kind, points.d, grid);
  });
  unrolled_point_sums(context, given, work.made, eps, objective);
}

}  // namespace

template <typename T>
void unrolled_backward(const Context& context, const std::vector<UnrolledGroup<T>>& groups,
                       double eps, Objective objective) {
  Packer<T> packer(context);
  for_each_pack(groups, [&](const Pack<UnrolledGroup<T>>& given) {
    const Pack<AdjointGroup<T>> pack = with_workspace(context, given);
    if (given.items[0].C != nullptr)
      stored_backward(context, pack, eps, objective);
    else
      made_backward(context, given, pack, eps, objective, packer);
  });
}

template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<float>>&, double,
                                Objective);
template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<double>>&, double,
                                Objective);

}  // namespace otloss::cuda
