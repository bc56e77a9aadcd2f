#include <algorithm>
#include <limits>
#include <vector>

#include "cpu/gradient/implicit_system.h"
#include "cpu/gradient/point_sums.h"
#include "cpu/multiscale/plan.h"

namespace otloss::cpu::multiscale {
namespace {

// Of the residual, see gradient/implicit.cpp: sums over a row are single precision, whatever the
// potentials are.
constexpr double kTolerance = 1e-7;

// A plan from both sides. The columns' own engine is there for sums that only rows have.
class ListedPlan final : public PlanProducts {
 public:
  ListedPlan(const Fixed& fixed, double eps, bool balanced, bool split)
      : fixed_(fixed),
        eps_(eps),
        wide_(!balanced && is_wide(fixed)),
        rows_(fixed.engine(eps, false, split)),
        columns_(fixed.exchanged(eps, split)),
        f_(scaled(fixed.F, eps / kLog2E)),
        G_(scaled(fixed.g, kLog2E / eps)) {}

  void sums(bool of_costs, double* rows, double* columns) override {
    const auto put = [](const Vector& sums, double* to) {
      std::copy(sums.begin(), sums.end(), to);
    };
    const double *F = fixed_.F.data(), *g = fixed_.g.data(), *f = f_.data(), *G = G_.data();
    if (of_costs) {
      put(rows_.cost_sums(eps_, F, g), rows);
      return put(columns_.cost_sums(eps_, G, f), columns);
    }
    const Vector ones(std::max(f_.size(), G_.size()), 1.0);
    Vector same(ones.size());
    rows_.product(eps_, F, g, ones.data(), nullptr, ones.data(), rows, nullptr);
    if (wide_)
      columns_.product(eps_, G, f, ones.data(), nullptr, ones.data(), columns, nullptr);
    else  // of the same entries as the rows'
      rows_.product(eps_, F, g, nullptr, ones.data(), ones.data(), same.data(), columns);
  }

  // Where penalties leave next to nothing of some points, x_j is beyond single precision, and
  // P_ij over the row's marginal as far below it. In range is P_ij over the column's, times what
  // x_j is of the column's mass: P x are sums over the rows of the other engine.
  void product(const double* x, const double* base, const double* factor, double* w,
               double* y) override {
    const double *F = fixed_.F.data(), *g = fixed_.g.data();
    if (!wide_ || !x) return rows_.product(eps_, F, g, x, base, factor, w, y);
    const Vector ones(std::max(f_.size(), G_.size()), 1.0);
    Vector same(ones.size()), sum(f_.size());
    columns_.product(eps_, G_.data(), f_.data(), nullptr, x, ones.data(), same.data(), sum.data());
    for (size_t i = 0; i < sum.size(); ++i) sum[i] = (base ? base[i] : 0.0) + factor[i] * sum[i];
    if (y)
      rows_.product(eps_, F, g, nullptr, sum.data(), ones.data(), w, y);
    else
      std::copy(sum.begin(), sum.end(), w);
  }

  // Of x_i the sum of P_ij (scale + alpha_i + beta_j) (y_j - x_i), (n, d), and of y_j likewise.
  void displacements(double scale, const ProblemSystem& system, Vector& of_x, Vector& of_y) {
    const Cloud &x = fixed_.x, &y = fixed_.y;
    Vector of_rows(x.size * x.d), of_columns(y.size * x.d);
    of_x.resize(of_rows.size()), of_y.resize(of_columns.size());
    rows_.displacements(eps_, fixed_.F.data(), fixed_.g.data(), weighted(x, system.x).data(),
                        of_rows.data(), of_y.data());
    columns_.displacements(eps_, G_.data(), f_.data(), weighted(y, system.y).data(),
                           of_columns.data(), of_x.data());
    const auto add = [&](const SystemSide& side, const Vector& displacement, Vector& to) {
      for (size_t e = 0; e < to.size(); ++e)
        to[e] += (scale + side.solution[e / x.d]) * displacement[e];
    };
    add(system.x, of_rows, of_x), add(system.y, of_columns, of_y);
  }

 private:
  // Whether marginals are so far apart that single precision has no room for it.
  static bool is_wide(const Fixed& fixed) {
    constexpr double kRoom = 1e-30;
    double least = std::numeric_limits<double>::infinity(), most = 0;
    for (const Cloud* cloud : {&fixed.x, &fixed.y})
      for (int64_t i = 0; i < cloud->n; ++i)
        least = std::min(least, cloud->w[i]), most = std::max(most, cloud->w[i]);
    return least < kRoom * most;
  }
  static Vector scaled(Vector v, double factor) {
    for (double& value : v) value *= factor;
    return v;
  }
  static Vector weighted(const Cloud& cloud, const SystemSide& side) {
    Vector result = cloud.w;  // the plan's, not the weights given
    for (int64_t i = 0; i < side.count; ++i) result[i] *= side.solution[i];
    return result;
  }

  const Fixed& fixed_;
  const double eps_;
  const bool wide_;
  Engine rows_, columns_;
  const Vector f_, G_;
};

// One problem. Values of its sides are in order; padding has none.
template <typename T>
class ImplicitProblem {
 public:
  ImplicitProblem(const ImplicitGroup<T>& group, int64_t p, double eps, Objective objective,
                  bool split)
      : group_(group), problem_(p), eps_(eps), objective_(objective), split_(split) {}

  void run() {
    const SystemSide &x = system_.x, &y = system_.y;
    take(x, in_order(group_.grad_f, x_).data(), x.v_bar);
    take(y, in_order(group_.grad_g, y_).data(), y.v_bar);
    ListedPlan plan(fixed_, eps_, group_.penalties.balanced, split_);
    system_.solve(plan, objective_, scale_, kTolerance,
                  group_.status + problem_ * kImplicitStatusFields);
    if (interrupted()) return;
    if (objective_ == Objective::kRegularized)
      point_gradients(plan);
    else
      transport_gradients();
    if (!group_.grad_a) return;
    const double shift = system_.rules().weight_shift();
    weights_to(x, shift, x_, group_.grad_a), weights_to(y, -shift, y_, group_.grad_b);
  }

 private:
  struct Order {
    const std::vector<int32_t>& in;
    int64_t size, count;  // in order, as given
  };

  // Null: 0.
  Vector in_order(const T* values, const Order& order) const {
    Vector result(order.size);
    for (size_t i = 0; values && i < order.in.size(); ++i)
      result[i] = static_cast<double>(values[problem_ * order.count + order.in[i]]);
    return result;
  }

  void weights_to(const SystemSide& side, double shift, const Order& order, T* grad) const {
    T* to = grad + problem_ * order.count;
    std::fill(to, to + order.count, T(0));
    for (size_t i = 0; i < order.in.size(); ++i)
      to[order.in[i]] = static_cast<T>(side.weight_bar[i] + shift);
  }

  void point_gradients(ListedPlan& plan) {
    const PointPair<T>& points = *group_.given;
    const MadeCost<T>& made = group_.made;
    if (!made.x.sum && !made.y.sum) return;
    Vector of_x, of_y;
    plan.displacements(scale_, system_, of_x, of_y);
    double scale = points.kind == CostKind::kSqEuclidean ? 2 : 1;
    if (group_.symmetric) scale *= 2;  // both sides are x
    scale /= fixed_.clouds.scale;
    put(made.x, problem_, x_.count, points.d, scale, x_.in, of_x);
    put(made.y, problem_, y_.count, points.d, scale, y_.in, of_y);
  }

  // These are of P C too, and by readings of all pairs.
  void transport_gradients() {
    const MadeCost<T>& made = group_.made;
    const double sides = group_.symmetric ? 2 : 1;
    const auto as_given = [&](const double* values, const Order& order, double factor) {
      std::vector<T> result(order.count);
      for (size_t i = 0; i < order.in.size(); ++i)
        result[order.in[i]] = static_cast<T>(factor * values[i]);
      return result;
    };
    const std::vector<T> f = as_given(system_.x.v, x_, 1), g = as_given(system_.y.v, y_, 1);
    const std::vector<T> alpha = as_given(system_.x.solution, x_, sides);
    const std::vector<T> beta = as_given(system_.y.solution, y_, sides);
    const T s = static_cast<T>(sides * scale_), t = static_cast<T>(-sides * scale_ / eps_);
    const T *a = group_.a + problem_ * x_.count, *b = group_.b + problem_ * y_.count;
    if (made.x.sum)
      point_sums(made.points, x_.count, y_.count, problem_, group_.symmetric, split_,
                 PlanGradient<T>{eps_, s, t, a, b, f.data(), g.data(), alpha.data(), beta.data()},
                 made.x);
    if (made.y.sum)
      point_sums(exchanged(made.points), y_.count, x_.count, problem_, false, split_,
                 PlanGradient<T>{eps_, s, t, b, a, g.data(), f.data(), beta.data(), alpha.data()},
                 made.y);
  }

  const ImplicitGroup<T>& group_;
  const int64_t problem_;
  const double eps_;
  const Objective objective_;
  const bool split_;
  const double scale_ = static_cast<double>(group_.coefficient * group_.grad[problem_]);
  const Fixed fixed_{*group_.given,    problem_, group_.n, group_.a,
                     group_.f,         group_.m, group_.b, group_.g,
                     group_.symmetric, eps_,     split_,   group_.penalties};
  const Order x_{fixed_.in_x, fixed_.x.size, group_.n}, y_{fixed_.in_y, fixed_.y.size, group_.m};
  ProblemSystem system_{
      Side<double>(x_.size, in_order(group_.a, x_).data(), group_.penalties.rho_x),
      in_order(group_.f, x_).data(),
      Side<double>(y_.size, in_order(group_.b, y_).data(), group_.penalties.rho_y),
      in_order(group_.g, y_).data(),
      eps_,
      group_.penalties.balanced,
      group_.symmetric};
};

}  // namespace

template <typename T>
void implicit_backward(const std::vector<ImplicitGroup<T>>& groups, double eps,
                       Objective objective) {
  for_each_problem(groups, [&](const ImplicitGroup<T>& group, int64_t p, bool split) {
    ImplicitProblem<T>(group, p, eps, objective, split).run();
  });
}

template void implicit_backward(const std::vector<ImplicitGroup<float>>&, double, Objective);
template void implicit_backward(const std::vector<ImplicitGroup<double>>&, double, Objective);

}  // namespace otloss::cpu::multiscale
