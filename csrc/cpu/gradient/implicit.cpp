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
#include "cpu/gradient/plan_passes.h"
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

// ------------------------------------------------------------------------------- one problem

template <typename T>
class ImplicitProblem {
 public:
  ImplicitProblem(const ImplicitGroup<T>& group, int64_t p, double eps, bool split)
      : n_(group.n),
        m_(group.m),
        eps_(eps),
        symmetric_(group.symmetric),
        balanced_(group.penalties.balanced),
        x_(n_, group.a + p * n_, group.penalties.rho_x),
        y_(m_, group.b + p * m_, group.penalties.rho_y),
        split_(split),
        made_(group.made),
        problem_(p),
        a_(group.a + p * n_),
        b_(group.b + p * m_),
        kept_P_(group.P ? group.P + p * n_ * m_ : nullptr),
        parts_(n_, m_, split),
        costs_(parts_, kBlockRows, RowSource<T>(n_, m_, group.C, made_.points, p, symmetric_)),
        made_P_(kept_P_ ? 0 : parts_.count() * costs_.at_once() * m_),
        columns_(parts_, m_),
        F_(n_),
        G_(m_),
        f_(n_),
        g_(m_),
        f_bar_(n_),
        g_bar_(m_),
        a_bar_(n_),
        b_bar_(m_),
        inverse_r_(n_),
        inverse_c_(m_),
        r_(n_),
        c_(m_),
        alpha_(n_),
        beta_(m_) {
    centre_potentials(group.f + p * n_, group.g + p * m_);
    make_plan();
  }

  // Gradients of scale * value + <grad_f, f> + <grad_g, g>; grad_f and grad_g may be null.
  CgReport run(double scale, Objective objective, const T* grad_f, const T* grad_g) {
    for (int64_t i = 0; i < n_; ++i)
      f_bar_[i] = grad_f && a_[i] > T(0) ? static_cast<double>(grad_f[i]) : 0.0;
    for (int64_t j = 0; j < m_; ++j)
      g_bar_[j] = grad_g && b_[j] > T(0) ? static_cast<double>(grad_g[j]) : 0.0;
    seed(scale, objective);
    if (balanced_) fix_gauge();
    const CgReport report = symmetric_ ? solve_symmetric() : solve_pair();
    for (int64_t i = 0; i < n_; ++i)  // (P beta)_i = f_bar_i - r_i alpha_i
      a_bar_[i] -= eps_ * quotient(f_bar_[i] - r_[i] * alpha_[i], a_[i]);
    return report;
  }

  void cost_gradient(double scale, Objective objective, T* grad_C) {
    const std::vector<T> alpha(alpha_.begin(), alpha_.end()), beta(beta_.begin(), beta_.end());
    const T s = static_cast<T>(scale), t = static_cast<T>(of_cost(scale, objective));
    for_each_block([&](int64_t, const T* P, const T* C, int64_t i, int64_t rows) {
      weigh_plan(
          WeighPlan<T>{rows, m_, s, t, P, C, alpha.data() + i, beta.data(), grad_C + i * m_});
    });
  }

  // The sums that the points' gradients need. Both sides of a cloud against itself are the same.
  void point_gradients(double scale, Objective objective) const {
    const double sides = symmetric_ ? 2 : 1;
    std::vector<T> alpha(n_), beta(m_);
    for (int64_t i = 0; i < n_; ++i) alpha[i] = static_cast<T>(sides * alpha_[i]);
    for (int64_t j = 0; j < m_; ++j) beta[j] = static_cast<T>(sides * beta_[j]);
    const std::vector<T> f(f_.begin(), f_.end()), g(g_.begin(), g_.end());
    const T s = static_cast<T>(sides * scale);
    const T t = static_cast<T>(sides * of_cost(scale, objective));
    if (made_.x.sum)
      point_sums(made_.points, n_, m_, problem_, symmetric_, split_,
                 PlanGradient<T>{eps_, s, t, a_, b_, f.data(), g.data(), alpha.data(), beta.data()},
                 made_.x);
    if (made_.y.sum)
      point_sums(exchanged(made_.points), m_, n_, problem_, symmetric_, split_,
                 PlanGradient<T>{eps_, s, t, b_, a_, g.data(), f.data(), beta.data(), alpha.data()},
                 made_.y);
  }

  // Of (a_bar + t, b_bar - t), all gradients on weights of equal total, that with
  // <a, a_bar> = <b, b_bar>.
  void weight_gradients(T* grad_a, T* grad_b) const {
    const double shift = balanced_ ? (dot(b_, b_bar_) - dot(a_, a_bar_)) / mass() : 0.0;
    for (int64_t i = 0; i < n_; ++i)
      grad_a[i] = a_[i] > T(0) ? static_cast<T>(a_bar_[i] + shift) : T(0);
    for (int64_t j = 0; j < m_; ++j)
      grad_b[j] = b_[j] > T(0) ? static_cast<T>(b_bar_[j] - shift) : T(0);
  }

 private:
  static double quotient(double value, T weight) {
    return weight > T(0) ? value / static_cast<double>(weight) : 0.0;
  }
  static double dot(const T* w, const Vector& x) {
    double sum = 0;
    for (size_t i = 0; i < x.size(); ++i) sum += static_cast<double>(w[i]) * x[i];
    return sum;
  }
  double mass() const { return x_.mass + y_.mass; }

  // t of the cost's gradient P_ij (scale + t C_ij + alpha_i + beta_j).
  double of_cost(double scale, Objective objective) const {
    return objective == Objective::kTransport ? -scale / eps_ : 0.0;
  }

  // Calls function(part, P, C, first row, rows) for all rows of the plan: kept where costs are
  // stored, made again each time where they are made.
  void for_each_block(
      FunctionRef<void(int64_t part, const T* P, const T* C, int64_t i, int64_t rows)> function) {
    const T k = factor<T>(eps_);
    costs_.for_each([&](int64_t part, const T* C, int64_t i, int64_t rows) {
      T* P = kept_P_ ? kept_P_ + i * m_ : made_P_.data() + part * costs_.at_once() * m_;
      if (!plan_is_kept_)
        plan_rows(PlanRows<T>{rows, m_, k, T(1), C, a_ + i, F_.data() + i, G_.data(), P});
      function(part, P, C, i, rows);
    });
  }

  // The potentials, with <a, f> = <b, g> if balanced; one potential for a cloud against itself.
  void centre_potentials(const T* f, const T* g) {
    for (int64_t i = 0; i < n_; ++i) f_[i] = a_[i] > T(0) ? static_cast<double>(f[i]) : 0.0;
    for (int64_t j = 0; j < m_; ++j) g_[j] = b_[j] > T(0) ? static_cast<double>(g[j]) : 0.0;
    const double shift = balanced_ ? (dot(b_, g_) - dot(a_, f_)) / mass() : 0.0;
    for (int64_t i = 0; i < n_; ++i) f_[i] += a_[i] > T(0) ? shift : 0.0;
    for (int64_t j = 0; j < m_; ++j) g_[j] -= b_[j] > T(0) ? shift : 0.0;
    if (symmetric_)
      for (int64_t i = 0; i < n_; ++i) f_[i] = g_[i] = 0.5 * (f_[i] + g_[i]);
  }

  void make_plan() {
    const double k = kLog2E / eps_;
    const std::vector<T> g(g_.begin(), g_.end());
    for (int64_t i = 0; i < n_; ++i) F_[i] = static_cast<T>(k * f_[i]);
    absorb_weights(m_, static_cast<T>(k), g.data(), b_, G_.data());
    columns_.clear();
    for_each_block([&](int64_t part, const T* P, const T*, int64_t i, int64_t rows) {
      plan_sums(PlanSums<T>{rows, m_, P, nullptr, r_.data() + i, columns_.part(part)});
    });
    plan_is_kept_ = kept_P_ != nullptr;
    const double* c = columns_.total();
    for (int64_t i = 0; i < n_; ++i) {
      r_[i] /= x_.damping(eps_);
      inverse_r_[i] = r_[i] > 0 ? 1.0 / r_[i] : 0.0;
    }
    for (int64_t j = 0; j < m_; ++j) {
      c_[j] = c[j] / y_.damping(eps_);
      inverse_c_[j] = c_[j] > 0 ? 1.0 / c_[j] : 0.0;
    }
  }

  // The objective's derivatives at fixed potentials (regularized: all there are at the solution)
  // and, for <P, C>, what it puts on the potentials.
  void seed(double scale, Objective objective) {
    if (objective == Objective::kRegularized) {
      for (int64_t i = 0; i < n_; ++i)
        a_bar_[i] = scale * (balanced_ ? f_[i] : x_.weight_gradient(eps_, y_.mass, f_[i]));
      for (int64_t j = 0; j < m_; ++j)
        b_bar_[j] = scale * (balanced_ ? g_[j] : y_.weight_gradient(eps_, x_.mass, g_[j]));
      return;
    }
    Vector row(n_);
    columns_.clear();
    for_each_block([&](int64_t part, const T* P, const T* C, int64_t i, int64_t rows) {
      plan_sums(PlanSums<T>{rows, m_, P, C, row.data() + i, columns_.part(part)});
    });
    const double* column = columns_.total();
    for (int64_t i = 0; i < n_; ++i) {
      f_bar_[i] += scale * row[i] / eps_;
      a_bar_[i] = quotient(scale * row[i], a_[i]);
    }
    for (int64_t j = 0; j < m_; ++j) {
      g_bar_[j] += scale * column[j] / eps_;
      b_bar_[j] = quotient(scale * column[j], b_[j]);
    }
  }

  // f and g are those with <a, f> = <b, g>: a gradient along (1, -1) is one on the weights.
  void fix_gauge() {
    double excess = 0;
    for (const double value : f_bar_) excess += value;
    for (const double value : g_bar_) excess -= value;
    excess /= mass();
    for (int64_t i = 0; i < n_; ++i) {
      f_bar_[i] -= excess * static_cast<double>(a_[i]);
      a_bar_[i] -= excess * f_[i];
    }
    for (int64_t j = 0; j < m_; ++j) {
      g_bar_[j] += excess * static_cast<double>(b_[j]);
      b_bar_[j] += excess * g_[j];
    }
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
      base[i] = f_bar_[i] * inverse_r_[i];
      minus[i] = -inverse_r_[i];
    }
    const double* y = product(nullptr, base.data(), minus.data(), w, true);
    double size = 0;
    for (int64_t j = 0; j < m_; ++j) {
      right[j] = g_bar_[j] - y[j];
      size += inverse_c_[j] * (g_bar_[j] * g_bar_[j] + y[j] * y[j]);
    }
    const double mass = inner_one(c_);
    const auto project = [&](Vector& r) {
      if (!balanced_) return;
      const double mean = inner_one(r) / mass;
      for (int64_t j = 0; j < m_; ++j) r[j] -= mean * c_[j];
    };
    const auto apply = [&](const Vector& x, Vector& y_out) {
      const double* sums = product(x.data(), nullptr, inverse_r_.data(), w, true);
      for (int64_t j = 0; j < m_; ++j) y_out[j] = c_[j] * x[j] - sums[j];
    };
    const CgReport report = conjugate_gradients({kTolerance<T>, rounding(size), kMaxIterations},
                                                inverse_c_, apply, project, right, beta_);
    const double* sums = product(beta_.data(), base.data(), minus.data(), alpha_, true);
    for (int64_t j = 0; j < m_; ++j) b_bar_[j] -= eps_ * quotient(sums[j], b_[j]);
    return report;
  }

  CgReport solve_symmetric() {
    Vector half(n_), w(n_);
    for (int64_t i = 0; i < n_; ++i) half[i] = 0.5 * (f_bar_[i] + g_bar_[i]);
    const Vector ones(n_, 1.0);
    const auto apply = [&](const Vector& x, Vector& y) {
      product(x.data(), nullptr, ones.data(), w, false);
      for (int64_t i = 0; i < n_; ++i) y[i] = r_[i] * x[i] + w[i];
    };
    double size = 0;
    for (int64_t i = 0; i < n_; ++i) size += inverse_r_[i] * half[i] * half[i];
    Vector right = half;
    const CgReport report = conjugate_gradients(
        {kTolerance<T>, rounding(size), kMaxIterations}, inverse_r_, apply, [](Vector&) {}, right,
        alpha_);
    beta_ = alpha_;
    f_bar_ = half;
    for (int64_t j = 0; j < m_; ++j)
      b_bar_[j] -= eps_ * quotient(half[j] - r_[j] * alpha_[j], b_[j]);
    return report;
  }

  static double inner_one(const Vector& x) {
    double sum = 0;
    for (const double value : x) sum += value;
    return sum;
  }

  // The squared rounding error of a sum of terms whose squares add up to `size`.
  static double rounding(double size) {
    constexpr double kUnit = 4 * std::numeric_limits<double>::epsilon();
    return kUnit * kUnit * size;
  }

  const int64_t n_, m_;
  const double eps_;
  const bool symmetric_, balanced_;
  const Side<T> x_, y_;
  const bool split_;
  const MadeCost<T>& made_;
  const int64_t problem_;
  const T* const a_;  // (n,)
  const T* const b_;  // (m,)
  T* const kept_P_;   // (n, m) or null
  bool plan_is_kept_ = false;
  RowParts parts_;
  CostBlocks<T> costs_;
  BlockVector<T> made_P_;                 // (parts, at_once, m) or nothing
  PartSums<double> columns_;              // (m,)
  std::vector<T> F_, G_;                  // (n,) (m,) the plan's, in base-2 units
  Vector f_, g_;                          // (n,) (m,) the solution with <a, f> = <b, g>
  Vector f_bar_, g_bar_, a_bar_, b_bar_;  // (n,) (m,) (n,) (m,)
  Vector inverse_r_, inverse_c_;          // (n,) (m,) 0 for padding
  Vector r_, c_;                          // (n,) (m,) sums of P over the dampings
  Vector alpha_, beta_;                   // (n,) (m,)
};

}  // namespace

template <typename T>
void implicit_backward(const std::vector<ImplicitGroup<T>>& groups, double eps,
                       Objective objective) {
  for_each_problem(groups, [&](const ImplicitGroup<T>& group, int64_t p, bool split) {
    const int64_t n = group.n, m = group.m;
    const double scale = static_cast<double>(group.coefficient * group.grad[p]);
    ImplicitProblem<T> problem(group, p, eps, split);
    const CgReport report =
        problem.run(scale, objective, group.grad_f ? group.grad_f + p * n : nullptr,
                    group.grad_g ? group.grad_g + p * m : nullptr);
    if (group.grad_C) problem.cost_gradient(scale, objective, group.grad_C + p * n * m);
    if (!group.C && !interrupted()) problem.point_gradients(scale, objective);
    if (group.grad_a) problem.weight_gradients(group.grad_a + p * n, group.grad_b + p * m);
    double* status = group.status + p * kImplicitStatusFields;
    status[kImplicitIterations] = static_cast<double>(report.iterations);
    status[kImplicitResidual] = report.residual;
  });
}

template void implicit_backward(const std::vector<ImplicitGroup<float>>&, double, Objective);
template void implicit_backward(const std::vector<ImplicitGroup<double>>&, double, Objective);

}  // namespace otloss::cpu
