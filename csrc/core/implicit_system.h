// The derivative of the solution, for host and device: the optimality conditions, differentiated
// and solved.
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
// What gradients are made of is c beta, the mass that each point's potential moves, and a residual
// counts by its sum of sizes. In the iterations' own norm, that of 1/c, points that hold next to
// nothing of a plan with penalties would hide all others.
//
// A cloud against itself has one potential, and the system is (diag(r) + P) alpha = h with
// h = (f_bar + g_bar) / 2: well conditioned whatever eps, while S vanishes as eps does.
//
// A team of threads does the work: for_rows(f) and for_columns(f) call f with each index once, a
// thread its own ones, the same rows as columns; sums(f, g) adds f up over the rows and g over the
// columns, column_sums(f) a pair over the columns; what one(f) writes by one thread all see. On a
// CPU there is one.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <limits>

#include "core/penalty.h"

namespace otloss {

constexpr int64_t kMaxCgIterations = 2000;

// The rows or the columns of the system.
struct SystemSide : Penalty {
  int64_t count;
  double mass;         // total weight
  double* weight;      // (count,)
  double* v;           // (count,) the potential
  double* v_bar;       // (count,) its gradient from outside; then what the system leaves of it
  double* weight_bar;  // (count,) gradient of the weights
  double* sum;         // (count,) sums of P over the damping
  double* inverse;     // (count,) 1 / sum, 0 for padding
  double* solution;    // (count,) alpha or beta

  static constexpr int kVectors = 7;
  // Sets the vectors; returns the end of the memory.
  OTLOSS_HOST_DEVICE double* place(double* memory, int64_t length) {
    for (double** const vector : {&weight, &v, &v_bar, &weight_bar, &sum, &inverse, &solution})
      *vector = memory, memory += length;
    return memory;
  }
  OTLOSS_HOST_DEVICE double over_weight(double value, int i) const {
    return weight[i] > 0 ? value / weight[i] : 0.0;
  }
};

// What is asked of the plan. kSums: w = P 1 and y = P^T 1; kCostSums: the same of P C; kProduct:
// w = base + factor P x and y = P^T w.
enum class PlanOf : int { kNothing, kSums, kCostSums, kProduct };
struct PlanOrder {
  PlanOf what;
  const double* x;       // (m,) or null: 0
  const double* base;    // (n,) or null: 0
  const double* factor;  // (n,)
  double* w;             // (n,) out
  double* y;             // (m,) out, or null: not wanted
};

// The problem, and what is kept of it between two orders.
struct ImplicitState {
  SystemSide x, y;
  double* base;       // (n,) f_bar / r, or 1
  double* sums;       // (m,) of an order
  double* direction;  // (m,)
  double eps, scale;  // scale: gradient of the value
  double tol;         // of the residual over its initial size
  bool balanced, symmetric, transport;
  PlanOrder order;
  enum class Stage : int { kSums, kCosts, kRight, kStep, kBack } stage;
  double mass, floor, first, size;  // of c; rounding of the right-hand side; residuals' sizes
  double rz;                        // squared norm
  int64_t iterations;

  static constexpr int kVectors = 2 * SystemSide::kVectors + 3;
  // Of so many doubles each.
  OTLOSS_HOST_DEVICE void place(double* memory, int64_t length) {
    base = y.place(x.place(memory, length), length);
    sums = base + length, direction = sums + length;
  }
  OTLOSS_HOST_DEVICE double residual() const { return size <= floor ? 0.0 : size / first; }
};

// Gradients of scale * value + <f_bar, f> + <g_bar, g>: alpha and beta, and those of the weights.
// v_bar is set before; for a cloud against itself it is changed on both sides.
template <class Team>
class ImplicitSystem {
 public:
  using Stage = ImplicitState::Stage;

  OTLOSS_COOPERATIVE ImplicitSystem(Team& team, ImplicitState& state)
      : team_(team), s_(state), x_(state.x), y_(state.y) {}

  // The potentials with <a, f> = <b, g> if balanced; one for a cloud against itself.
  OTLOSS_COOPERATIVE void fix_potentials() {
    const TwoSums means = team_.sums([&](int i) { return x_.weight[i] * x_.v[i]; },
                                     [&](int j) { return y_.weight[j] * y_.v[j]; });
    const double shift = s_.balanced ? (means.second - means.first) / (x_.mass + y_.mass) : 0.0;
    team_.for_columns([&](int j) { y_.v[j] -= y_.weight[j] > 0 ? shift : 0.0; });
    team_.for_rows([&](int i) {
      x_.v[i] += x_.weight[i] > 0 ? shift : 0.0;
      if (s_.symmetric) x_.v[i] = y_.v[i] = 0.5 * (x_.v[i] + y_.v[i]);
    });
  }

  // The objective's derivatives at fixed potentials: regularized, all there are at the solution.
  OTLOSS_COOPERATIVE void seed_value(double scale) {
    const auto gradient = [&](const SystemSide& side, double other_mass, int i) {
      const double v = side.v[i];
      return scale * (s_.balanced ? v : side.weight_gradient(s_.eps, other_mass, v));
    };
    team_.for_rows([&](int i) { x_.weight_bar[i] = gradient(x_, y_.mass, i); });
    team_.for_columns([&](int j) { y_.weight_bar[j] = gradient(y_, x_.mass, j); });
  }

  // The first order, after fix_potentials().
  OTLOSS_COOPERATIVE void open() {
    double* const columns = s_.symmetric ? nullptr : y_.sum;
    ask(Stage::kSums, {PlanOf::kSums, nullptr, nullptr, nullptr, x_.sum, columns});
  }

  // After what was ordered. The next order is in the state; of nothing: done.
  OTLOSS_COOPERATIVE void advance() {
    switch (s_.stage) {
      case Stage::kSums: return take_sums();
      case Stage::kCosts: return take_cost_sums();
      case Stage::kRight: return take_right();
      case Stage::kStep: return step();
      case Stage::kBack: return finish();
    }
  }

  // What to add to the gradients of a, and take from those of b: of (a_bar + t, b_bar - t), all
  // gradients on weights of equal total, that with <a, a_bar> = <b, b_bar>.
  OTLOSS_COOPERATIVE double weight_shift() const {
    const TwoSums means = team_.sums([&](int i) { return x_.weight[i] * x_.weight_bar[i]; },
                                     [&](int j) { return y_.weight[j] * y_.weight_bar[j]; });
    return s_.balanced ? (means.second - means.first) / (x_.mass + y_.mass) : 0.0;
  }
  template <typename T>
  OTLOSS_COOPERATIVE void put_weights(T* grad_a, T* grad_b) const {
    const double shift = weight_shift();
    team_.for_rows([&](int i) {
      grad_a[i] = x_.weight[i] > 0 ? static_cast<T>(x_.weight_bar[i] + shift) : T(0);
    });
    team_.for_columns([&](int j) {
      grad_b[j] = y_.weight[j] > 0 ? static_cast<T>(y_.weight_bar[j] - shift) : T(0);
    });
  }

 private:
  OTLOSS_COOPERATIVE void ask(Stage stage, const PlanOrder& order) {
    team_.one([&] { s_.stage = stage, s_.order = order; });
  }

  OTLOSS_COOPERATIVE void take_sums() {
    const auto set = [&](const SystemSide& side, double sum, int i) {
      side.sum[i] = sum / side.damping(s_.eps);
      side.inverse[i] = side.sum[i] != 0 ? 1 / side.sum[i] : 0.0;  // NaN stays
    };
    team_.for_rows([&](int i) {
      if (s_.symmetric) set(y_, x_.sum[i], i);
      set(x_, x_.sum[i], i);
    });
    if (!s_.symmetric) team_.for_columns([&](int j) { set(y_, y_.sum[j], j); });
    if (s_.transport)
      return ask(Stage::kCosts,
                 {PlanOf::kCostSums, nullptr, nullptr, nullptr, x_.solution, s_.sums});
    seed_value(s_.scale);
    begin();
  }

  // What <P, C> puts on the potentials, and on the weights.
  OTLOSS_COOPERATIVE void take_cost_sums() {
    const auto seed = [&](const SystemSide& side, double sum, int i) {
      side.v_bar[i] += s_.scale * sum / s_.eps;
      side.weight_bar[i] = side.over_weight(s_.scale * sum, i);
    };
    team_.for_rows([&](int i) { seed(x_, x_.solution[i], i); });
    team_.for_columns([&](int j) { seed(y_, s_.sums[j], j); });
    begin();
  }

  // The right-hand side. A gradient of the potentials along (1, -1) is one on the weights.
  OTLOSS_COOPERATIVE void begin() {
    if (s_.balanced) {
      const TwoSums bar =
          team_.sums([&](int i) { return x_.v_bar[i]; }, [&](int j) { return y_.v_bar[j]; });
      const double excess = (bar.first - bar.second) / (x_.mass + y_.mass);
      const auto fix = [](const SystemSide& side, double by, int i) {
        side.v_bar[i] -= by * side.weight[i];
        side.weight_bar[i] -= by * side.v[i];
      };
      team_.for_rows([&](int i) { fix(x_, excess, i); });
      team_.for_columns([&](int j) { fix(y_, -excess, j); });
    }
    if (!s_.symmetric) {
      team_.for_rows([&](int i) { s_.base[i] = x_.inverse[i] * x_.v_bar[i]; });
      return ask_product(Stage::kRight, nullptr, s_.base);
    }
    team_.for_rows([&](int i) {
      s_.base[i] = 1;
      x_.v_bar[i] = y_.v_bar[i] = 0.5 * (x_.v_bar[i] + y_.v_bar[i]);
    });
    start(team_.column_sums([&](int j) {
      const double h = y_.v_bar[j];
      return TwoSums{std::abs(h), y_.sum[j]};
    }));
  }

  OTLOSS_COOPERATIVE void take_right() {
    start(team_.column_sums([&](int j) {
      const double g = y_.v_bar[j], q = s_.sums[j];
      y_.v_bar[j] = g - q;
      return TwoSums{std::abs(g) + std::abs(q), y_.sum[j]};
    }));
  }

  // w = base + P x / r and P^T w; P x of a cloud against itself.
  OTLOSS_COOPERATIVE void ask_product(Stage stage, const double* x, const double* base) {
    if (s_.symmetric)
      ask(stage, {PlanOf::kProduct, x, nullptr, s_.base, s_.sums, nullptr});
    else
      ask(stage, {PlanOf::kProduct, x, base, x_.inverse, x_.solution, s_.sums});
  }

  // Multiples of c are not in the range of the system of a balanced problem.
  OTLOSS_COOPERATIVE bool projects() const { return s_.balanced && !s_.symmetric; }

  // Conjugate gradients for A beta = v_bar of y, which holds the residual, preconditioned by c.
  // sizes: of the terms of the right-hand side, and of c.
  OTLOSS_COOPERATIVE void start(const TwoSums& sizes) {
    constexpr double kUnit = 4 * std::numeric_limits<double>::epsilon();
    double* const rest = y_.v_bar;
    double mean = 0;
    if (projects())
      mean = team_.column_sums([&](int j) { return TwoSums{rest[j], 0}; }).first / sizes.second;
    const TwoSums norms = team_.column_sums([&](int j) {
      rest[j] -= mean * y_.sum[j];
      y_.solution[j] = 0;
      s_.direction[j] = y_.inverse[j] * rest[j];
      return TwoSums{s_.direction[j] * rest[j], std::abs(rest[j])};
    });
    team_.one([&] {
      s_.mass = sizes.second, s_.floor = kUnit * sizes.first;
      s_.rz = norms.first, s_.first = s_.size = norms.second, s_.iterations = 0;
    });
    go_on();
  }

  OTLOSS_COOPERATIVE void go_on() {
    const bool more = s_.size > s_.tol * s_.first && s_.size > s_.floor;
    if (more && s_.iterations < kMaxCgIterations)
      return ask_product(Stage::kStep, s_.direction, nullptr);
    end();
  }

  OTLOSS_COOPERATIVE void step() {
    double* const rest = y_.v_bar;
    const double sign = s_.symmetric ? 1 : -1;
    const double curvature = team_
                                 .column_sums([&](int j) {
                                   s_.sums[j] = y_.sum[j] * s_.direction[j] + sign * s_.sums[j];
                                   return TwoSums{s_.direction[j] * s_.sums[j], 0};
                                 })
                                 .first;
    if (!(curvature > 0)) return end();
    const double length = s_.rz / curvature;
    const TwoSums sizes = team_.column_sums([&](int j) {  // of the residual; of its square over c
      y_.solution[j] += length * s_.direction[j];
      rest[j] -= length * s_.sums[j];
      return TwoSums{rest[j], y_.inverse[j] * rest[j] * rest[j]};
    });
    const double mean = projects() ? sizes.first / s_.mass : 0.0;
    const double rz = sizes.second - sizes.first * mean, turn = rz / s_.rz;
    const double size = team_
                            .column_sums([&](int j) {
                              rest[j] -= mean * y_.sum[j];
                              s_.direction[j] = y_.inverse[j] * rest[j] + turn * s_.direction[j];
                              return TwoSums{std::abs(rest[j]), 0};
                            })
                            .first;
    team_.one([&] { s_.rz = rz, s_.size = size, ++s_.iterations; });
    go_on();
  }

  // The last product: alpha = f_bar / r - P beta / r, and P^T alpha.
  OTLOSS_COOPERATIVE void end() {
    if (s_.symmetric) return finish();
    team_.for_columns([&](int j) { s_.direction[j] = -y_.solution[j]; });
    ask_product(Stage::kBack, s_.direction, s_.base);
  }

  OTLOSS_COOPERATIVE void finish() {
    // (P beta)_i = f_bar_i - r_i alpha_i
    const auto take = [&](const SystemSide& side, double product, int i) {
      side.weight_bar[i] -= s_.eps * side.over_weight(product, i);
    };
    team_.for_rows([&](int i) {
      if (s_.symmetric) x_.solution[i] = y_.solution[i];
      const double product = x_.v_bar[i] - x_.sum[i] * x_.solution[i];
      take(x_, product, i);
      if (s_.symmetric) take(y_, product, i);
    });
    if (!s_.symmetric) team_.for_columns([&](int j) { take(y_, s_.sums[j], j); });
    ask(Stage::kBack, {});
  }

  Team& team_;
  ImplicitState& s_;
  SystemSide &x_, &y_;
};

}  // namespace otloss
