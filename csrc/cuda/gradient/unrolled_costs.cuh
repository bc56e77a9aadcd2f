// The passes of the adjoint of iterations over costs that are stored, or made from points: row sums
// to Work::finish, column sums of what it makes of them to set(j, sum).
#pragma once

#include "cuda/gradient/plan_works.cuh"
#include "cuda/gradient/point_sums.h"
#include "cuda/gradient/unrolled.h"
#include "cuda/pass/made_sums.cuh"
#include "cuda/pass/pack.cuh"

namespace otloss::cuda {

template <typename T>
struct AdjointArguments {
  Pack<AdjointGroup<T>> groups;
  TeamArguments<T> team;
  double eps;
  Objective objective;
  T* f_bar;       // (teams, rows) of the last iteration
  T* G;           // (teams, columns) k g + log2 b of the last iteration
  double* a_bar;  // (teams, rows)
  double* b_bar;  // (teams, columns)
};

template <typename T>
struct AdjointKernel {
  static constexpr int kThreads = kSolveThreads;

  AdjointArguments<T> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const;
};

// Without cost matrices.
template <typename T>
struct MadeAdjointKernel {
  static constexpr int kThreads = kSolveThreads;

  AdjointArguments<T> arguments;
  MadeLayout layout;
  IterationsOfPoints<T> made[kMaxGroups];
  T* rows;     // (teams, 3, rows)
  T* columns;  // (teams, 3, columns)

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const;
};

// One iteration back: row sums u, and v as column sums.
template <class Block, typename T>
struct IterationWork {
  static constexpr bool kHasRow = true, kApart = true, kGuarded = false;
  struct Column {
    T G, H, g_bar;
  };
  TeamMemory<Block> memory;
  const T* tile;   // (rows, m)
  const T* a;      // (rows,)
  const T* f;      // (rows,)
  const T* b;      // (m,)
  const T* g;      // (m,)
  const T* g_bar;  // (m,) times q
  const T* H;      // (m,)
  const T* f_bar;  // (rows,) from outside, or null
  double* a_bar;   // (rows,) accumulated
  T* R;            // (rows,) out, or null
  T k, to_E, to_G, damping;
  double eps;

  OTLOSS_DEVICE T none() const { return static_cast<T>(kLog2Zero); }
  OTLOSS_DEVICE Column no_column() const { return {none(), none(), T(0)}; }
  // Rows and columns of weight 0 must give finite entries.
  OTLOSS_DEVICE T row(int i) const { return a[i] > T(0) ? k * f[i] : none(); }
  OTLOSS_DEVICE T row_again(int i) const { return a[i] > T(0) ? to_E * f[i] : none(); }
  OTLOSS_DEVICE T exponent_of(int j) const { return b[j] > T(0) ? to_G * g[j] : none(); }
  OTLOSS_DEVICE Column column(int j) const {
    return {exponent_of(j), memory.load(H + j), memory.load(g_bar + j)};
  }
  OTLOSS_DEVICE T entry(T F, const Column& column, T c) const {
    return fast_exp2(F + column.G - k * c);
  }
  OTLOSS_DEVICE T term(const Column& column, T entry) const { return entry * column.g_bar; }
  OTLOSS_DEVICE T again(T E, const Column& column, T c) const {
    return fast_exp2(E + column.H - k * c);
  }
  OTLOSS_DEVICE T finish(int i, T u, bool leader) const {
    const bool counts = a[i] > T(0);
    const T outside = f_bar ? f_bar[i] : T(0);
    const T value = counts ? (outside - a[i] * u) * damping : T(0);
    if (leader && counts) a_bar[i] -= eps * static_cast<double>(u);
    if (leader && R) R[i] = value;
    return value;
  }
};

// The costs in memory, for the passes of the recursion; likewise MadeIterations.
template <typename T, class Block>
class StoredIterations {
 public:
  using Kernel = AdjointKernel<T>;
  using Team = TeamSweep<T, Block>;

  OTLOSS_DEVICE StoredIterations(Block&, const Kernel& kernel, Team& team)
      : kernel_(kernel), team_(team) {}

  OTLOSS_DEVICE void place(const AdjointGroup<T>& p, int64_t batch) {
    tile_ = p.C + (batch * p.n + team_.first_row()) * p.m;
    if (!kernel_.arguments.team.resident) return;
    T* const tile = team_.template at<T>(SweepShape(sizeof(T)).end);
    team_.for_entries([&](int i, int j) {
      const int64_t at = static_cast<int64_t>(i) * p.m + j;
      tile[at] = tile_[at];
    });
    team_.block_sync();
    tile_ = tile;
  }

  OTLOSS_DEVICE const T* tile() const { return tile_; }

  // Row sums of P C to work.out, and column sums to set(j, sum); G (m,) as made by the team.
  template <class Work, typename Set>
  OTLOSS_DEVICE void transport(const Work& work, Set&& set) {
    pass(work, set);
    team_.block_sync();
  }
  // Row sums to work.finish, and column sums of what it makes of them to set(j, sum).
  template <class Work, typename Set>
  OTLOSS_DEVICE void iteration(const Work& work, Set&& set) {
    pass(work, set);
  }

 private:
  template <class Work, typename Set>
  OTLOSS_DEVICE void pass(const Work& work, Set&& set) {
    team_.pass(work);
    team_.sync();
    team_.join(set);
  }

  const Kernel& kernel_;
  Team& team_;
  const T* tile_;  // (rows, m)
};

template <typename T, class Block>
class MadeIterations {
 public:
  using Kernel = MadeAdjointKernel<T>;
  using Sides = MadeSides<T, T, Block>;
  using Team = typename Sides::Team;

  OTLOSS_DEVICE MadeIterations(Block& block, const Kernel& kernel, Team& team)
      : kernel_(kernel), team_(team), sides_(block, team, kernel.layout) {}

  OTLOSS_DEVICE void place(const AdjointGroup<T>& p, int64_t batch) {
    const AdjointArguments<T>& arguments = kernel_.arguments;
    const IterationsOfPoints<T>& made = kernel_.made[&p - arguments.groups.items];
    sides_.place(made.points, batch, p.n, p.m, p.made.symmetric, arguments.eps);
    plan_F_ = made.F + batch * sides_.x().stride, plan_G_ = made.G + batch * sides_.y().stride;
    const int64_t rows = arguments.team.rows, columns = arguments.team.columns;
    F_ = kernel_.rows + team_.index() * 3 * rows, E_ = F_ + rows;
    G_ = kernel_.columns + team_.index() * 3 * columns, H_ = G_ + columns;
    u_ = E_ + rows + team_.first_row(), v_ = H_ + columns;
  }

  OTLOSS_DEVICE const T* tile() const { return nullptr; }

  // The plan's exponents stay for the gradient of the points.
  template <class Work, typename Set>
  OTLOSS_DEVICE void transport(const Work& work, Set&& set) {
    sides_.fill_rows(plan_F_, [&](int i) { return work.row(i) + log2_weight(work.a[i]); });
    sides_.fill_columns(plan_G_, [&](int j) { return work.column(j); });
    team_.sync();
    sides_.over_columns(plan_F_, plan_G_, nullptr, true, work.out);
    over_rows(plan_F_, plan_G_, nullptr, true, set);
  }

  template <class Work, typename Set>
  OTLOSS_DEVICE void iteration(const Work& work, Set&& set) {
    sides_.fill_rows(F_, [&](int i) { return work.row(i); });
    sides_.fill_columns(G_, [&](int j) { return work.exponent_of(j); });
    sides_.fill_rows(E_, [&](int i) { return work.row_again(i); });
    sides_.fill_columns(H_, [&](int j) { return team_.load(work.H + j); });
    team_.sync();
    sides_.over_columns(F_, G_, work.g_bar, false, u_);
    team_.for_rows([&](int i) { team_.store(work.R + i, work.finish(i, u_[i], true)); });
    team_.sync();
    over_rows(E_, H_, work.R - team_.first_row(), false, set);
  }

 private:
  template <typename Set>
  OTLOSS_DEVICE void over_rows(const T* F, const T* G, const T* x, bool of_costs, Set&& set) {
    sides_.over_rows(F, G, x, of_costs, v_ + team_.first_column());
    team_.for_columns([&](int j) { set(j, v_[j]); });
    team_.block_sync();
  }

  const Kernel& kernel_;
  Team& team_;
  Sides sides_;
  T *plan_F_, *plan_G_;  // (n,) (m,) exponents of the last plan
  T *F_, *E_;            // (n,) of the iteration
  T *G_, *H_;            // (m,)
  T *u_, *v_;            // (rows,) (m,) sums on their way
};

}  // namespace otloss::cuda
