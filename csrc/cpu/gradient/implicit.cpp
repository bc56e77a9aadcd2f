// The gradient of the solution (core/implicit_system.h), of all pairs: the plan is kept where costs
// are stored. Where they are made from points, a product makes the plan again, a few rows at a
// time, and what the points receive from C_bar is one more pass for each side.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/math.h"
#include "cpu/gradient/implicit_system.h"
#include "cpu/gradient/point_sums.h"
#include "cpu/multiscale/plan.h"
#include "cpu/simd/sweep.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

// Conjugate gradients stop at this residual relative to the right-hand side, in the norm of the
// inverse preconditioner: the gradient is then as exact as the plan's dtype allows.
template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-8 : 1e-13;

template <typename T>
class ImplicitProblem final : public PlanProducts {
 public:
  ImplicitProblem(const ImplicitGroup<T>& group, int64_t p, double eps, Objective objective,
                  bool split)
      : group_(group), problem_(p), eps_(eps), objective_(objective), split_(split) {
    const std::vector<T> g(system_.y.v, system_.y.v + m_);
    for (int64_t i = 0; i < n_; ++i) F_[i] = static_cast<T>(kLog2E / eps * system_.x.v[i]);
    absorb_weights(m_, factor<T>(eps), g.data(), b_, G_.data());
  }

  // Gradients of scale * value + <grad_f, f> + <grad_g, g>.
  void run() {
    const SystemSide &x = system_.x, &y = system_.y;
    take(x, group_.grad_f ? group_.grad_f + problem_ * n_ : nullptr, x.v_bar);
    take(y, group_.grad_g ? group_.grad_g + problem_ * m_ : nullptr, y.v_bar);
    system_.solve(*this, objective_, scale_, kTolerance<T>,
                  group_.status + problem_ * kImplicitStatusFields);
    double& residual = group_.status[problem_ * kImplicitStatusFields + kImplicitResidual];
    residual = std::max(residual, out_of_range());
    if (group_.grad_C) cost_gradient(group_.grad_C + problem_ * n_ * m_);
    const MadeCost<T>& made = group_.made;
    if (made.x.sum && !interrupted()) side_sums(made.points, x, a_, y, b_, made.x);
    if (made.y.sum && !interrupted()) side_sums(exchanged(made.points), y, b_, x, a_, made.y);
    if (!group_.grad_a) return;
    system_.rules().put_weights(group_.grad_a + problem_ * n_, group_.grad_b + problem_ * m_);
  }

  void sums(bool of_costs, double* rows, double* columns) override {
    columns_.clear();
    for_each_block([&](int64_t part, const T* P, const T* C, int64_t i, int64_t count) {
      plan_sums(PlanSums<T>{count, m_, P, of_costs ? C : nullptr, rows + i, columns_.part(part)});
    });
    plan_is_kept_ = kept_P_ != nullptr;
    std::copy_n(columns_.total(), m_, columns);
  }

  void product(const double* x, const double* base, const double* factor, double* w,
               double* y) override {
    columns_.clear();
    for_each_block([&](int64_t part, const T* P, const T*, int64_t i, int64_t rows) {
      plan_product(PlanProduct<T>{rows, m_, P, x, base ? base + i : nullptr, factor + i, w + i,
                                  y ? columns_.part(part) : nullptr});
    });
    if (y) std::copy_n(columns_.total(), m_, y);
  }

 private:
  // The part of what comes in that is of points of whose plan exp2 leaves nothing, or not all:
  // their part of the gradient is lost.
  double out_of_range() const {
    const double least = std::exp2(static_cast<double>(kExp2Least<T>));
    double all = 0, lost = 0;
    const auto add = [&](const SystemSide& side, const T* bar, bool of_rows) {
      for (int64_t i = 0; bar && i < side.count; ++i) {
        if (!(side.weight[i] > 0)) continue;
        const double size = std::abs(static_cast<double>(bar[problem_ * side.count + i]));
        const double weights = of_rows ? side.weight[i] * static_cast<double>(m_) : system_.x.mass;
        all += size, lost += side.sum[i] < weights * least ? size : 0.0;
      }
    };
    add(system_.x, group_.grad_f, true), add(system_.y, group_.grad_g, false);
    return all > 0 ? lost / all : 0.0;
  }

  void cost_gradient(T* grad_C) {
    const std::vector<T> alpha(system_.x.solution, system_.x.solution + n_);
    const std::vector<T> beta(system_.y.solution, system_.y.solution + m_);
    const T s = static_cast<T>(scale_), t = static_cast<T>(of_cost_);
    for_each_block([&](int64_t, const T* P, const T* C, int64_t i, int64_t rows) {
      weigh_plan(
          WeighPlan<T>{rows, m_, s, t, P, C, alpha.data() + i, beta.data(), grad_C + i * m_});
    });
  }

  // The sums that the gradients of the points of `rows` need. Both sides of a cloud against itself
  // are alike.
  void side_sums(const PointPair<T>& points, const SystemSide& rows, const T* a,
                 const SystemSide& columns, const T* b, const PointSums<T>& out) const {
    const double sides = symmetric_ ? 2 : 1;
    std::vector<T> alpha(rows.count), beta(columns.count);
    for (int64_t i = 0; i < rows.count; ++i) alpha[i] = static_cast<T>(sides * rows.solution[i]);
    for (int64_t j = 0; j < columns.count; ++j)
      beta[j] = static_cast<T>(sides * columns.solution[j]);
    const std::vector<T> f(rows.v, rows.v + rows.count), g(columns.v, columns.v + columns.count);
    point_sums(
        points, rows.count - group_.dummies, columns.count - group_.dummies, problem_, symmetric_,
        split_,
        PlanGradient<T>{eps_, static_cast<T>(sides * scale_), static_cast<T>(sides * of_cost_), a,
                        b, f.data(), g.data(), alpha.data(), beta.data()},
        out);
  }

  // Calls function(part, P, C, first row, rows) for all rows of the plan: kept where costs are
  // stored, made again each time where they are made.
  void for_each_block(
      FunctionRef<void(int64_t part, const T* P, const T* C, int64_t i, int64_t rows)> function) {
    const T k = factor<T>(eps_);
    costs_.for_each([&](int64_t part, const T* C, int64_t i, int64_t rows) {
      T* P = kept_P_ ? kept_P_ + i * m_ : made_P_.data() + part * costs_.at_once() * m_;
      if (!plan_is_kept_)
        plan_rows(PlanRows<T>{rows, m_, k, T(1), C, m_, a_ + i, F_.data() + i, G_.data(), P});
      function(part, P, C, i, rows);
    });
  }

  const ImplicitGroup<T>& group_;
  const int64_t problem_;
  const double eps_;
  const Objective objective_;
  const bool split_;
  const double scale_ = static_cast<double>(group_.coefficient * group_.grad[problem_]);
  // t of the cost's gradient P_ij (scale + t C_ij + alpha_i + beta_j).
  const double of_cost_ = objective_ == Objective::kTransport ? -scale_ / eps_ : 0.0;
  const bool symmetric_ = group_.symmetric;
  const int64_t n_ = group_.n, m_ = group_.m;
  const T* const a_ = group_.a + problem_ * n_;  // (n,)
  const T* const b_ = group_.b + problem_ * m_;  // (m,)
  ProblemSystem system_{Side<T>(n_, a_, group_.penalties.rho_x),
                        group_.f + problem_ * n_,
                        Side<T>(m_, b_, group_.penalties.rho_y),
                        group_.g + problem_ * m_,
                        eps_,
                        group_.penalties.balanced,
                        symmetric_};
  T* const kept_P_ = group_.P ? group_.P + problem_ * n_ * m_ : nullptr;  // (n, m) or null
  bool plan_is_kept_ = false;
  CostBlocks<T> costs_{
      RowParts(n_, m_, split_), kBlockRows,
      RowSource<T>(n_, m_, {group_.matrix(problem_), m_ - group_.dummies}, m_, group_.made.points,
                   problem_, symmetric_, group_.dummies, eps_)};
  BlockVector<T> made_P_ = BlockVector<T>(  // (parts, at_once, m) or nothing
      kept_P_ ? 0 : costs_.parts().count() * costs_.at_once() * m_);
  PartSums<double> columns_{costs_.parts(), m_};                    // (m,)
  std::vector<T> F_ = std::vector<T>(n_), G_ = std::vector<T>(m_);  // the plan's, base-2 units
};

}  // namespace

template <typename T>
void implicit_backward(const std::vector<ImplicitGroup<T>>& groups, const Eps& eps,
                       Objective objective) {
  if (groups[0].given) return multiscale::implicit_backward(groups, eps.all, objective);
  for_each_problem(groups, [&](const ImplicitGroup<T>& group, int64_t p, bool split) {
    ImplicitProblem<T>(group, p, eps.of(p), objective, split).run();
  });
}

template void implicit_backward(const std::vector<ImplicitGroup<float>>&, const Eps&, Objective);
template void implicit_backward(const std::vector<ImplicitGroup<double>>&, const Eps&, Objective);

}  // namespace otloss::cpu
