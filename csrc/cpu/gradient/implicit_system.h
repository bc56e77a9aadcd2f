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
// A cloud against itself has one potential, and the system is (diag(r) + P) alpha = h with
// h = (f_bar + g_bar) / 2: well conditioned whatever eps, while S vanishes as eps does.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/solve/conjugate_gradients.h"
#include "cpu/solve/marginal.h"
#include "kernels.h"

namespace otloss::cpu {

// The plan, as the system reads it.
class PlanProducts {
 public:
  virtual ~PlanProducts() = default;
  // Row and column sums of P, or of P C.
  virtual void sums(bool of_costs, Vector& rows, Vector& columns) = 0;
  // w = base + factor P x and, unless it is null, y = P^T w. x and base may be null.
  virtual void product(const double* x, const double* base, const double* factor, Vector& w,
                       Vector* y) = 0;
};

inline double quotient(double value, double weight) { return weight > 0 ? value / weight : 0.0; }

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

class ImplicitSystem {
 public:
  SystemSide x, y;  // v_bar is set before `solve`

  template <typename T>
  ImplicitSystem(const Side<T>& x, const T* f, const Side<T>& y, const T* g, double eps,
                 bool balanced, bool symmetric)
      : x(x, f), y(y, g), eps_(eps), balanced_(balanced), symmetric_(symmetric) {
    fix_potentials();
  }

  // Gradients of scale * value + <f_bar, f> + <g_bar, g>: alpha and beta, and those of the weights.
  // Iterations stop at a residual of `tol`.
  CgReport solve(PlanProducts& plan, Objective objective, double scale, double tol);

  // What to add to the gradients of a, and take from those of b: of (a_bar + t, b_bar - t), all
  // gradients on weights of equal total, that with <a, a_bar> = <b, b_bar>.
  double weight_shift() const {
    return balanced_ ? (y.dot(y.weight_bar) - x.dot(x.weight_bar)) / (x.mass + y.mass) : 0.0;
  }

 private:
  void fix_potentials();
  CgReport solve_pair(PlanProducts& plan, double tol);
  CgReport solve_symmetric(PlanProducts& plan, double tol);

  double eps_;
  bool balanced_, symmetric_;
};

inline void put_status(const CgReport& report, double* status) {
  status[kImplicitIterations] = static_cast<double>(report.iterations);
  status[kImplicitResidual] = report.residual;
}

}  // namespace otloss::cpu
