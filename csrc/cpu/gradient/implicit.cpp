// The derivative of the solution: the optimality conditions, differentiated and solved.
//
// At the solution the plan P = a b exp((f + g - C) / eps) has marginals r = a and c = b, so that
//     [diag(r)  P     ] (df)   (sum_j P_ij (dC_ij - eps db_j / b_j))
//     [P^T      diag(c)] (dg) = (sum_i P_ij (dC_ij - eps da_i / a_i)).
// Gradients f_bar, g_bar of f and g therefore go back through the same symmetric matrix,
//     M (alpha, beta) = (f_bar, g_bar),  C_bar_ij += P_ij (alpha_i + beta_j),
//     a_bar_i -= eps sum_j P_ij beta_j / a_i,  b_bar_j -= eps sum_i P_ij alpha_i / b_j.
// M has the null vector (1, -1): only f_i + g_j is determined. f and g stand for the solution with
// <a, f> = <b, g>, which moves f_bar, g_bar into the range of M.
//
// Where a marginal is soft, r_i = a_i exp(-f_i / rho) at the solution. That divides r in M by the
// damping rho / (rho + eps), likewise c, and changes nothing else: M is then regular.
//
// Eliminating alpha leaves S beta = g_bar - P^T (f_bar / r) with S = diag(c) - P^T diag(1/r) P, a
// weighted graph's Laplacian, solved by conjugate gradients preconditioned by diag(c). Eliminating
// beta instead would have the same spectrum; this way a product with S is one reading of P, row by
// row: w_i = sum_j P_ij x_j / r_i, then y_j += P_ij w_i. All vectors and sums are double; r and c
// are P's own sums, so that S 1 = 0 to rounding even when P is float.
//
// Where costs are made from points, a product makes the plan again, a few rows at a time, and what
// the points receive from C_bar is one more pass for each side.
//
// A cloud against itself has one potential, and the system is (diag(r) + P) alpha = h with
// h = (f_bar + g_bar) / 2: well conditioned whatever eps, while S vanishes as eps does.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/math.h"
#include "cpu/gradient/point_sums.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/conjugate_gradients.h"
#include "cpu/solve/marginal.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

// Conjugate gradients stop at this residual relative to the right-hand side, in the norm of the
// inverse preconditioner: the gradient is then as exact as the plan's dtype allows.
template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-8 : 1e-13;
constexpr int64_t kMaxIterations = 2000;

double sum_of(const Vector& x) {
  double sum = 0;
  for (const double value : x) sum += value;
  return sum;
}

// The squared rounding error of a sum of terms whose squares add up to `size`.
double rounding(double size) {
  constexpr double kUnit = 4 * std::numeric_limits<double>::epsilon();
  return kUnit * kUnit * size;
}

double quotient(double value, double weight) { return weight > 0 ? value / weight : 0.0; }

// The rows or the columns of the system.
struct SystemSide : Penalty {
  int64_t count;
  double mass;
  Vector weight;
  Vector v;                  // the potential, with <a, f> = <b, g> if balanced
  Vector v_bar, weight_bar;  // gradients: of the potential from outside, of the weights
  Vector sum, inverse;       // sums of P over the damping, and 1 over them, 0 for padding
  Vector solution;           // alpha or beta

  template <typename T>
  SystemSide(const Side<T>& side, const T* potential)
      : Penalty(side),
        count(side.count),
        mass(side.mass),
        weight(side.weight, side.weight + count),
        v(of_mass(potential)),
        v_bar(count),
        weight_bar(count),
        sum(count),
        inverse(count),
        solution(count) {}

  // 0 in place of what may be anything, where there is no weight, or null.
  template <typename T>
  Vector of_mass(const T* values) const {
    Vector result(count);
    for (int64_t i = 0; i < count; ++i)
      if (values && weight[i] > 0) result[i] = static_cast<double>(values[i]);
    return result;
  }
  double dot(const Vector& x) const {
    double total = 0;
    for (int64_t i = 0; i < count; ++i) total += weight[i] * x[i];
    return total;
  }
  void shift_potential(double shift) {
    for (int64_t i = 0; i < count; ++i) v[i] += weight[i] > 0 ? shift : 0.0;
  }
  // sums: of P.
  void set_sums(double eps, const double* sums) {
    for (int64_t i = 0; i < count; ++i) {
      sum[i] = sums[i] / damping(eps);
      inverse[i] = sum[i] > 0 ? 1.0 / sum[i] : 0.0;
    }
  }
  // The objective's derivatives at fixed potentials: regularized, all there are at the solution.
  void seed_value(double scale, double eps, bool balanced, double other_mass) {
    for (int64_t i = 0; i < count; ++i)
      weight_bar[i] = scale * (balanced ? v[i] : weight_gradient(eps, other_mass, v[i]));
  }
  // Those of <P, C>, from the sums of P C, and what it puts on the potential.
  void seed_transport(double scale, double eps, const double* sums) {
    for (int64_t i = 0; i < count; ++i) {
      v_bar[i] += scale * sums[i] / eps;
      weight_bar[i] = quotient(scale * sums[i], weight[i]);
    }
  }
  // Moves a gradient of the potential along a constant to the weights.
  void fix_gauge(double excess) {
    for (int64_t i = 0; i < count; ++i) {
      v_bar[i] -= excess * weight[i];
      weight_bar[i] -= excess * v[i];
    }
  }
  template <typename T>
  void weight_gradient_to(double shift, T* grad) const {
    for (int64_t i = 0; i < count; ++i)
      grad[i] = weight[i] > 0 ? static_cast<T>(weight_bar[i] + shift) : T(0);
  }
};

// ------------------------------------------------------------------------------- one problem

template <typename T>
class ImplicitProblem {
 public:
  ImplicitProblem(const ImplicitGroup<T>& group, int64_t p, double eps, Objective objective,
                  bool split)
      : group_(group), problem_(p), eps_(eps), objective_(objective), split_(split) {
    if (balanced_) {  // <a, f> = <b, g>
      const double shift = (y_.dot(y_.v) - x_.dot(x_.v)) / mass();
      x_.shift_potential(shift), y_.shift_potential(-shift);
    }
    if (symmetric_)
      for (int64_t i = 0; i < n_; ++i) x_.v[i] = y_.v[i] = 0.5 * (x_.v[i] + y_.v[i]);
    make_plan();
  }

  // Gradients of scale * value + <grad_f, f> + <grad_g, g>.
  void run() {
    x_.v_bar = x_.of_mass(group_.grad_f ? group_.grad_f + problem_ * n_ : nullptr);
    y_.v_bar = y_.of_mass(group_.grad_g ? group_.grad_g + problem_ * m_ : nullptr);
    if (objective_ == Objective::kRegularized) {
      x_.seed_value(scale_, eps_, balanced_, y_.mass);
      y_.seed_value(scale_, eps_, balanced_, x_.mass);
    } else {
      const Vector row = plan_sums_of(true);
      x_.seed_transport(scale_, eps_, row.data());
      y_.seed_transport(scale_, eps_, columns_.total());
    }
    if (balanced_) {  // a gradient along (1, -1) is one on the weights
      double excess = sum_of(x_.v_bar);
      for (const double value : y_.v_bar) excess -= value;
      excess /= mass();
      x_.fix_gauge(excess), y_.fix_gauge(-excess);
    }
    const CgReport report = symmetric_ ? solve_symmetric() : solve_pair();
    for (int64_t i = 0; i < n_; ++i)  // (P beta)_i = f_bar_i - r_i alpha_i
      x_.weight_bar[i] -= eps_ * quotient(x_.v_bar[i] - x_.sum[i] * x_.solution[i], x_.weight[i]);
    double* status = group_.status + problem_ * kImplicitStatusFields;
    status[kImplicitIterations] = static_cast<double>(report.iterations);
    status[kImplicitResidual] = report.residual;
    if (group_.grad_C) cost_gradient(group_.grad_C + problem_ * n_ * m_);
    const MadeCost<T>& made = group_.made;
    if (made.x.sum && !interrupted()) side_sums(made.points, x_, a_, y_, b_, made.x);
    if (made.y.sum && !interrupted()) side_sums(exchanged(made.points), y_, b_, x_, a_, made.y);
    if (!group_.grad_a) return;
    // Of (a_bar + t, b_bar - t), all gradients on weights of equal total, that with
    // <a, a_bar> = <b, b_bar>.
    const double shift = balanced_ ? (y_.dot(y_.weight_bar) - x_.dot(x_.weight_bar)) / mass() : 0.0;
    x_.weight_gradient_to(shift, group_.grad_a + problem_ * n_);
    y_.weight_gradient_to(-shift, group_.grad_b + problem_ * m_);
  }

 private:
  double mass() const { return x_.mass + y_.mass; }

  void cost_gradient(T* grad_C) {
    const std::vector<T> alpha(x_.solution.begin(), x_.solution.end());
    const std::vector<T> beta(y_.solution.begin(), y_.solution.end());
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
    const std::vector<T> f(rows.v.begin(), rows.v.end()), g(columns.v.begin(), columns.v.end());
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

  void make_plan() {
    const double k = kLog2E / eps_;
    const std::vector<T> g(y_.v.begin(), y_.v.end());
    for (int64_t i = 0; i < n_; ++i) F_[i] = static_cast<T>(k * x_.v[i]);
    absorb_weights(m_, static_cast<T>(k), g.data(), b_, G_.data());
    const Vector row = plan_sums_of(false);
    plan_is_kept_ = kept_P_ != nullptr;
    x_.set_sums(eps_, row.data());
    y_.set_sums(eps_, columns_.total());
  }

  // The row sums of P, or of P C, and in columns_ the column sums.
  Vector plan_sums_of(bool of_costs) {
    Vector row(n_);
    columns_.clear();
    for_each_block([&](int64_t part, const T* P, const T* C, int64_t i, int64_t rows) {
      plan_sums(
          PlanSums<T>{rows, m_, P, of_costs ? C : nullptr, row.data() + i, columns_.part(part)});
    });
    return row;
  }

  // w = base + factor P x, and the column sums y = P^T w where wanted. x and base may be null.
  const double* product(const double* x, const double* base, const double* factor, Vector& w,
                        bool columns) {
    columns_.clear();
    for_each_block([&](int64_t part, const T* P, const T*, int64_t i, int64_t rows) {
      plan_product(PlanProduct<T>{rows, m_, P, x, base ? base + i : nullptr, factor + i,
                                  w.data() + i, columns ? columns_.part(part) : nullptr});
    });
    return columns_.total();
  }

  CgReport solve_pair() {
    Vector base(n_), minus(n_), w(n_), right(m_);
    for (int64_t i = 0; i < n_; ++i) {
      base[i] = x_.v_bar[i] * x_.inverse[i];
      minus[i] = -x_.inverse[i];
    }
    const double* y = product(nullptr, base.data(), minus.data(), w, true);
    const Vector& c = y_.sum;
    double size = 0;
    for (int64_t j = 0; j < m_; ++j) {
      right[j] = y_.v_bar[j] - y[j];
      size += y_.inverse[j] * (y_.v_bar[j] * y_.v_bar[j] + y[j] * y[j]);
    }
    const double mass = sum_of(c);
    const auto project = [&](Vector& r) {
      if (!balanced_) return;
      const double mean = sum_of(r) / mass;
      for (int64_t j = 0; j < m_; ++j) r[j] -= mean * c[j];
    };
    const auto apply = [&](const Vector& x, Vector& y_out) {
      const double* sums = product(x.data(), nullptr, x_.inverse.data(), w, true);
      for (int64_t j = 0; j < m_; ++j) y_out[j] = c[j] * x[j] - sums[j];
    };
    const CgReport report = conjugate_gradients({kTolerance<T>, rounding(size), kMaxIterations},
                                                y_.inverse, apply, project, right, y_.solution);
    const double* sums = product(y_.solution.data(), base.data(), minus.data(), x_.solution, true);
    for (int64_t j = 0; j < m_; ++j) y_.weight_bar[j] -= eps_ * quotient(sums[j], y_.weight[j]);
    return report;
  }

  CgReport solve_symmetric() {
    Vector half(n_), w(n_);
    for (int64_t i = 0; i < n_; ++i) half[i] = 0.5 * (x_.v_bar[i] + y_.v_bar[i]);
    const Vector ones(n_, 1.0), &r = x_.sum;
    const auto apply = [&](const Vector& x, Vector& y) {
      product(x.data(), nullptr, ones.data(), w, false);
      for (int64_t i = 0; i < n_; ++i) y[i] = r[i] * x[i] + w[i];
    };
    double size = 0;
    for (int64_t i = 0; i < n_; ++i) size += x_.inverse[i] * half[i] * half[i];
    Vector right = half;
    const CgReport report = conjugate_gradients(
        {kTolerance<T>, rounding(size), kMaxIterations}, x_.inverse, apply, [](Vector&) {}, right,
        x_.solution);
    y_.solution = x_.solution;
    x_.v_bar = half;
    for (int64_t j = 0; j < m_; ++j)
      y_.weight_bar[j] -= eps_ * quotient(half[j] - r[j] * x_.solution[j], y_.weight[j]);
    return report;
  }

  const ImplicitGroup<T>& group_;
  const int64_t problem_;
  const double eps_;
  const Objective objective_;
  const bool split_;
  const double scale_ = static_cast<double>(group_.coefficient * group_.grad[problem_]);
  // t of the cost's gradient P_ij (scale + t C_ij + alpha_i + beta_j).
  const double of_cost_ = objective_ == Objective::kTransport ? -scale_ / eps_ : 0.0;
  const bool symmetric_ = group_.symmetric, balanced_ = group_.penalties.balanced;
  const int64_t n_ = group_.n, m_ = group_.m;
  const T* const a_ = group_.a + problem_ * n_;  // (n,)
  const T* const b_ = group_.b + problem_ * m_;  // (m,)
  SystemSide x_{Side<T>(n_, a_, group_.penalties.rho_x), group_.f + problem_ * n_};
  SystemSide y_{Side<T>(m_, b_, group_.penalties.rho_y), group_.g + problem_ * m_};
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
  for_each_problem(groups, [&](const ImplicitGroup<T>& group, int64_t p, bool split) {
    ImplicitProblem<T>(group, p, eps.of(p), objective, split).run();
  });
}

template void implicit_backward(const std::vector<ImplicitGroup<float>>&, const Eps&, Objective);
template void implicit_backward(const std::vector<ImplicitGroup<double>>&, const Eps&, Objective);

}  // namespace otloss::cpu
