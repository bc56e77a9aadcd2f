// The plan of a problem as the linear system of the implicit gradient needs it: stored, in shared
// memory or in global memory, or made from points again in every product (made_sums.cuh). make()
// from potentials f (rows,) and g (m,); sums() of P or P C; products P x and P^T w; finish().
#pragma once

#include "core/math.h"
#include "cuda/gradient/plan_works.cuh"
#include "cuda/gradient/point_sums.h"
#include "cuda/pass/made_sums.cuh"
#include "cuda/pass/pack.cuh"

namespace otloss::cuda {

// Vectors of a problem in double, of rows and of columns, see Implicit::place; the last is the
// plan's.
constexpr int kRowVectors = 7, kColumnVectors = 10;

template <typename T>
struct ImplicitArguments {
  Pack<ImplicitGroup<T>> groups;
  TeamArguments<double> team;
  double eps;
  Objective objective;
  double* rows;     // (teams, kRowVectors, rows)
  double* columns;  // (teams, kColumnVectors, columns)
};

template <typename T>
struct ImplicitKernel {
  static constexpr int kThreads = kSolveThreads;

  ImplicitArguments<T> arguments;
  T* published;  // (teams, columns)

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const;
};

// Without cost matrices.
template <typename T>
struct MadeImplicitKernel {
  static constexpr int kThreads = kSolveThreads;

  ImplicitArguments<T> arguments;
  MadeLayout layout;
  PlanOfPoints<T> plans[kMaxGroups];

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const;
};

// The plan of a problem as the linear system needs it; likewise MadePlan.
template <typename T, class Block>
class StoredPlan {
 public:
  using Kernel = ImplicitKernel<T>;
  using Team = TeamSweep<double, Block>;

  OTLOSS_DEVICE StoredPlan(Block&, const Kernel& kernel, Team& team)
      : kernel_(kernel), team_(team) {}

  OTLOSS_DEVICE void place(const ImplicitGroup<T>& p, int64_t batch) {
    const int64_t at = batch * p.n + team_.first_row();
    m_ = p.m;
    a_ = p.a + at, b_ = p.b + batch * m_;
    C_ = p.C + at * m_;
    P_ = kernel_.arguments.team.resident ? team_.template at<T>(SweepShape(sizeof(double)).end)
                                         : p.P + at * m_;
    grad_C_ = p.grad_C ? p.grad_C + at * m_ : nullptr;
    published_ = kernel_.published + team_.index() * kernel_.arguments.team.columns;
  }

  // From f (rows,) and g (m,).
  OTLOSS_DEVICE void make(const double* f, const double* g) {
    const double to_base2 = kLog2E / kernel_.arguments.eps;
    const T k = static_cast<T>(to_base2);
    team_.for_columns([&](int j) {
      const T G = k * static_cast<T>(g[j]);
      team_.store(published_ + j, b_[j] > T(0) ? G + fast_log2(b_[j]) : static_cast<T>(kLog2Zero));
    });
    team_.sync();
    team_.for_entries([&](int i, int j) {
      const int64_t at = static_cast<int64_t>(i) * m_ + j;
      const T F = static_cast<T>(to_base2 * f[i]);
      // A potential that is NaN makes the plan NaN, which its exponential alone would not.
      P_[at] = a_[i] > T(0)
                   ? plan_entry(a_[i], F + team_.load(published_ + j) - k * C_[at]) + T(0) * F
                   : T(0);
    });
    team_.block_sync();
  }

  // Row sums of P, or of P C for potentials f (rows,), to w (rows,), and column sums to
  // set(j, sum).
  template <typename Set>
  OTLOSS_DEVICE void sums(bool of_costs, const double* f, double* w, Set&& set) {
    const double to_base2 = kLog2E / kernel_.arguments.eps;
    const T k = static_cast<T>(to_base2);
    if (of_costs)
      team_.pass(
          PlanCostWork<T, double, Block>{team_.memory(), C_, a_, f, published_, k, to_base2, w});
    else
      team_.pass(PlanSumsWork<T>{P_, w});
    team_.sync();
    team_.join(set);
    team_.sync();  // before the next pass takes the blocks' parts
  }

  // w = base + sign (P x) inverse, and P^T w to set(j, sum); x, base and inverse may be null.
  template <typename Set>
  OTLOSS_DEVICE void product(const double* x, const double* base, const double* inverse,
                             double sign, double* w, Set&& set) {
    team_.pass(ProductWork<Block, T>{team_.memory(), P_, x, base, inverse, sign, w});
    team_.sync();
    team_.join(set);
  }

  // w = P x.
  OTLOSS_DEVICE void row_product(const double* x, double* w) {
    team_.pass(ProductWork<Block, T>{team_.memory(), P_, x, nullptr, nullptr, 1, w}, false);
  }

  // The gradient of the cost, P (s + t C + alpha + beta); P may stand where it goes.
  OTLOSS_DEVICE void finish(double s, double t, const double* alpha, const double* beta) {
    if (grad_C_ == nullptr) return;
    team_.for_columns([&](int j) { team_.store(published_ + j, static_cast<T>(beta[j])); });
    team_.sync();
    team_.for_entries([&](int i, int j) {
      const int64_t at = static_cast<int64_t>(i) * m_ + j;
      const T shift = static_cast<T>(s) + static_cast<T>(alpha[i]), plan = P_[at];
      const T value = plan * (shift + static_cast<T>(t) * C_[at] + team_.load(published_ + j));
      grad_C_[at] = plan != T(0) ? value : T(0);
    });
  }

 private:
  const Kernel& kernel_;
  Team& team_;
  int64_t m_;
  const T* a_;    // (rows,)
  const T* b_;    // (m,)
  const T* C_;    // (rows, m)
  T* P_;          // (rows, m)
  T* grad_C_;     // (rows, m) or null
  T* published_;  // (m,) k g + log2 b, later beta
};

// ------------------------------------------------------------------------ the plan of points

template <typename T, class Block>
class MadePlan {
 public:
  using Kernel = MadeImplicitKernel<T>;
  using Sides = MadeSides<T, double, Block>;
  using Team = typename Sides::Team;

  OTLOSS_DEVICE MadePlan(Block& block, const Kernel& kernel, Team& team)
      : kernel_(kernel), team_(team), sides_(block, team, kernel.layout) {}

  OTLOSS_DEVICE void place(const ImplicitGroup<T>& p, int64_t batch) {
    const PlanOfPoints<T>& plan = kernel_.plans[&p - kernel_.arguments.groups.items];
    sides_.place(plan.points, batch, p.n, p.m, p.symmetric, kernel_.arguments.eps);
    a_ = p.a + batch * p.n + team_.first_row(), b_ = p.b + batch * p.m;
    F_ = plan.F + batch * sides_.x().stride, G_ = plan.G + batch * sides_.y().stride;
    alpha_ = plan.alpha + batch * p.n + team_.first_row(), beta_ = plan.beta + batch * p.m;
    out_ = kernel_.arguments.columns +
           (team_.index() * kColumnVectors + kColumnVectors - 1) * kernel_.arguments.team.columns;
  }

  OTLOSS_DEVICE void make(const double* f, const double* g) {
    const double k = kLog2E / kernel_.arguments.eps;
    sides_.fill_rows(F_, [&](int i) { return static_cast<T>(k * f[i]) + log2_weight(a_[i]); });
    sides_.fill_columns(G_, [&](int j) { return static_cast<T>(k * g[j]) + log2_weight(b_[j]); });
    team_.sync();
  }

  template <typename Set>
  OTLOSS_DEVICE void sums(bool of_costs, const double*, double* w, Set&& set) {
    sides_.over_columns(F_, G_, nullptr, of_costs, w);
    const T* const F = F_ + team_.first_row();
    team_.for_rows([&](int i) { w[i] += nothing(F[i]); });
    sides_.over_rows(F_, G_, nullptr, of_costs, out_ + team_.first_column());
    team_.for_columns([&](int j) { set(j, out_[j] + nothing(G_[j])); });
    team_.block_sync();
  }

  template <typename Set>
  OTLOSS_DEVICE void product(const double* x, const double* base, const double* inverse,
                             double sign, double* w, Set&& set) {
    if (x != nullptr) sides_.over_columns(F_, G_, x, false, w);
    team_.for_rows([&](int i) {
      const double sum = x != nullptr ? w[i] * (inverse ? inverse[i] : 1.0) : 0.0;
      team_.store(w + i, (base ? base[i] : 0.0) + sign * sum);
    });
    team_.sync();
    sides_.over_rows(F_, G_, w - team_.first_row(), false, out_ + team_.first_column());
    team_.for_columns([&](int j) { set(j, out_[j]); });
    team_.block_sync();
  }

  OTLOSS_DEVICE void row_product(const double* x, double* w) {
    sides_.over_columns(F_, G_, x, false, w);
  }

  // For the gradient of the points, by another launch.
  OTLOSS_DEVICE void finish(double, double, const double* alpha, const double* beta) {
    team_.for_rows([&](int i) { alpha_[i] = static_cast<T>(alpha[i]); });
    team_.for_columns([&](int j) { beta_[j] = static_cast<T>(beta[j]); });
  }

 private:
  // NaN of a potential that is NaN, which its exponential alone would not make.
  OTLOSS_DEVICE static double nothing(T exponent) { return static_cast<double>(T(0) * exponent); }

  const Kernel& kernel_;
  Team& team_;
  Sides sides_;
  const T* a_;        // (rows,)
  const T* b_;        // (m,)
  T *F_, *G_;         // (n,) (m,) k f + log2 a, k g + log2 b
  T *alpha_, *beta_;  // (rows,) (m,)
  double* out_;       // (m,) sums on their way
};

// All arguments but the team.
template <typename T>
void fill_arguments(const Context& context, const Pack<ImplicitGroup<T>>& pack, double eps,
                    Objective objective, ImplicitArguments<T>* arguments) {
  const TeamArguments<double>& team = arguments->team;
  arguments->groups = pack;
  arguments->eps = eps;
  arguments->objective = objective;
  arguments->rows = context.scratch<double>(team.teams * kRowVectors * team.rows);
  arguments->columns = context.scratch<double>(team.teams * kColumnVectors * team.columns);
}

}  // namespace otloss::cuda
