// The linear system of the implicit gradient, see implicit.cu: a block for each problem, between
// the products with its plan that it asks for. All vectors and sums are in double as on the CPU,
// whatever the plan's dtype. A thread touches its own entries only.
#pragma once

#include <limits>

#include "core/rounding.h"
#include "cuda/gradient/implicit_state.cuh"

namespace otloss::cuda {

// As in csrc/cpu/gradient/implicit.cpp.
template <typename T>
OTLOSS_HOST_DEVICE constexpr double implicit_tolerance() {
  return sizeof(T) == 4 ? 1e-8 : 1e-13;
}
constexpr int kMaxCgIterations = 2000;

template <typename T, class Block>
class Implicit {
 public:
  using Team = ControlTeam<Block>;

  OTLOSS_DEVICE Implicit(Block& block, const ImplicitArguments<T>& arguments, Team& team,
                         const ImplicitGroup<T>& p, int64_t batch, ImplicitState& state)
      : block_(block),
        args_(arguments),
        team_(team),
        p_(p),
        batch_(batch),
        s_(state),
        plan_(arguments.plans[&p - arguments.pack.items]),
        v_(arguments.vectors + team.index() * ImplicitVectors::kCount * arguments.orders.length,
           arguments.orders.length),
        x_{1 / p.penalties.rho_x},
        y_{1 / p.penalties.rho_y},
        a_(p.a + batch * p.n),
        b_(p.b + batch * p.m),
        F_(plan_.F + batch * packed_stride(p.n)),
        G_(plan_.G + batch * packed_stride(p.m)) {}

  // Asks for the first sums. True: there are none, and the gradient is done.
  OTLOSS_DEVICE bool open() {
    if (block_.thread() == 0) {
      const T k = static_cast<T>(kLog2E / args_.eps);
      const auto tiles = plan_.points.tiles(batch_, p_.n, p_.m, p_.symmetric, k);
      args_.orders.place(team_.index(), tiles, F_, G_);
    }
    block_.sync();
    centre_potentials();
    return args_.fixed ? seed() : ask(Stage::kSums, 0, nullptr);
  }

  // After the sums that were asked for. True: done; else others are asked for.
  OTLOSS_DEVICE bool advance() {
    const Stage stage = s_.stage;
    const bool rows = order().side == 0;
    switch (stage) {
      case Stage::kSums: return rows ? row_sums() : column_sums();
      case Stage::kCosts: return rows ? row_costs() : column_costs();
      case Stage::kRight: return right();
      case Stage::kStep: return rows ? row_product() : step();
      case Stage::kBack: return rows ? back() : finish();
    }
    return true;
  }

 private:
  OTLOSS_DEVICE static double quotient(double value, T weight) {
    return weight > T(0) ? value / static_cast<double>(weight) : 0.0;
  }
  OTLOSS_DEVICE double scale() const {
    return static_cast<double>(p_.coefficient * p_.grad[batch_]);
  }
  // NaN of a potential that is NaN, which its exponential alone would not make.
  OTLOSS_DEVICE static double nothing(T exponent) { return static_cast<double>(T(0) * exponent); }

  // ------------------------------------------------------------------------------------ sums

  OTLOSS_DEVICE SweepOrder<T, double>& order() const { return args_.orders.of[team_.index()]; }

  // Sums over the columns of P, or of P C, times x, for the rows; the other way round for side 1.
  OTLOSS_DEVICE bool ask(Stage stage, int side, const double* x, RowSum what = RowSum::kPlan) {
    block_.sync();
    if (block_.thread() != 0) return false;
    s_.stage = stage;
    order().ask(side, what, x);
    return false;
  }
  OTLOSS_DEVICE double sum(int i) const { return args_.orders.sum(team_.index(), i); }

  // --------------------------------------------------------------------------------- the plan

  // The potentials, with <a, f> = <b, g> if balanced; one potential for a cloud against itself.
  // Also the exponents of the plan.
  OTLOSS_DEVICE void centre_potentials() {
    const T *f = p_.f + batch_ * p_.n, *g = p_.g + batch_ * p_.m, *a = a_, *b = b_;
    double sums[4] = {};  // of a, b, <a, f>, <b, g>
    team_.for_rows([&](int i) {
      sums[0] += static_cast<double>(a[i]);
      if (a[i] > T(0)) sums[2] += static_cast<double>(a[i]) * static_cast<double>(f[i]);
    });
    team_.for_columns([&](int j) {
      sums[1] += static_cast<double>(b[j]);
      if (b[j] > T(0)) sums[3] += static_cast<double>(b[j]) * static_cast<double>(g[j]);
    });
    team_.sum(sums);
    constexpr double kRoundoff = static_cast<double>(std::numeric_limits<T>::epsilon());
    const double mass_a = snapped_total(sums[0], kRoundoff);
    const double mass_b = snapped_total(sums[1], kRoundoff);
    if (block_.thread() == 0) s_.mass_a = mass_a, s_.mass_b = mass_b;
    const double shift = p_.penalties.balanced ? (sums[3] - sums[2]) / (mass_a + mass_b) : 0.0;
    const double k = kLog2E / args_.eps;
    team_.for_columns([&](int j) {
      const double other = p_.symmetric ? static_cast<double>(f[j]) : 0.0;
      const double own = static_cast<double>(g[j]);
      v_.g[j] = !(b[j] > T(0)) ? 0.0 : p_.symmetric ? 0.5 * (own + other) : own - shift;
      G_[j] = static_cast<T>(k) * static_cast<T>(v_.g[j]) + log2_weight(b[j]);
    });
    team_.for_rows([&](int i) {
      const double own = static_cast<double>(f[i]) + shift;
      v_.f[i] = !(a[i] > T(0)) ? 0.0 : p_.symmetric ? v_.g[i] : own;
      F_[i] = static_cast<T>(k * v_.f[i]) + log2_weight(a[i]);
    });
    order().pad(block_);
    block_.sync();
  }

  OTLOSS_DEVICE bool row_sums() {
    const double damping = x_.damping(args_.eps);
    team_.for_rows([&](int i) { v_.row_mass[i] = (sum(i) + nothing(F_[i])) / damping; });
    if (!p_.symmetric) return ask(Stage::kSums, 1, nullptr);
    team_.for_columns([&](int j) { v_.c[j] = v_.row_mass[j]; });
    return seed();
  }

  OTLOSS_DEVICE bool column_sums() {
    const double damping = y_.damping(args_.eps);
    team_.for_columns([&](int j) { v_.c[j] = (sum(j) + nothing(G_[j])) / damping; });
    return seed();
  }

  // Times a row's mass, or a column's, to the -1; 0 for padding.
  OTLOSS_DEVICE double over_r(double value, int i) const {
    return v_.row_mass[i] != 0 ? value / v_.row_mass[i] : 0.0;
  }
  OTLOSS_DEVICE double over_c(double value, int j) const {
    return v_.c[j] != 0 ? value / v_.c[j] : 0.0;
  }

  // --------------------------------------------------------------------------- right-hand side

  OTLOSS_DEVICE static double outside(const T* grad, T weight, int64_t at) {
    return grad && weight > T(0) ? static_cast<double>(grad[at]) : 0.0;
  }
  OTLOSS_DEVICE double of_f(int i) const { return outside(p_.grad_f, a_[i], batch_ * p_.n + i); }
  OTLOSS_DEVICE double of_g(int j) const { return outside(p_.grad_g, b_[j], batch_ * p_.m + j); }

  // The objective's derivatives at fixed potentials (regularized: all there are at the solution),
  // or what <P, C> puts on the potentials, and what comes from outside. At fixed potentials <P, C>
  // does not depend on the weights: its plan is constant.
  OTLOSS_DEVICE bool seed() {
    const bool transport = args_.objective == Objective::kTransport;
    if (transport && !args_.fixed) return ask(Stage::kCosts, 0, nullptr, RowSum::kCost);
    const double of_value = transport ? 0.0 : scale();
    const auto value = [&](const Penalty& side, double other_mass, double v) {
      return p_.penalties.balanced ? v : side.weight_gradient(args_.eps, other_mass, v);
    };
    team_.for_rows([&](int i) {
      v_.f_bar[i] = of_f(i);
      v_.a_bar[i] = of_value * value(x_, s_.mass_b, v_.f[i]);
    });
    team_.for_columns([&](int j) {
      v_.g_bar[j] = of_g(j);
      v_.b_bar[j] = of_value * value(y_, s_.mass_a, v_.g[j]);
    });
    return args_.fixed ? put_weights() : fix_gauge();
  }

  OTLOSS_DEVICE bool row_costs() {
    team_.for_rows([&](int i) {
      const double term = scale() * sum(i);
      v_.f_bar[i] = of_f(i) + term / args_.eps;
      v_.a_bar[i] = quotient(term, a_[i]);
    });
    if (!p_.symmetric) return ask(Stage::kCosts, 1, nullptr, RowSum::kCost);
    return column_costs();
  }

  OTLOSS_DEVICE bool column_costs() {
    team_.for_columns([&](int j) {
      const double term = scale() * sum(j);
      v_.g_bar[j] = of_g(j) + term / args_.eps;
      v_.b_bar[j] = quotient(term, b_[j]);
    });
    return fix_gauge();
  }

  // f and g are those with <a, f> = <b, g>: a gradient along (1, -1) is one on the weights.
  OTLOSS_DEVICE bool fix_gauge() {
    if (p_.penalties.balanced) {
      double sums[1] = {0};
      team_.for_rows([&](int i) { sums[0] += v_.f_bar[i]; });
      team_.for_columns([&](int j) { sums[0] -= v_.g_bar[j]; });
      team_.sum(sums);
      const double excess = sums[0] / (s_.mass_a + s_.mass_b);
      team_.for_rows([&](int i) {
        v_.f_bar[i] -= excess * static_cast<double>(a_[i]);
        v_.a_bar[i] -= excess * v_.f[i];
      });
      team_.for_columns([&](int j) {
        v_.g_bar[j] += excess * static_cast<double>(b_[j]);
        v_.b_bar[j] += excess * v_.g[j];
      });
    }
    if (!p_.symmetric) {
      team_.for_rows([&](int i) { v_.w[i] = over_r(v_.f_bar[i], i); });
      return ask(Stage::kRight, 1, v_.w);
    }
    double size[1] = {0};
    team_.for_columns([&](int j) {
      const double half = 0.5 * (v_.f_bar[j] + v_.g_bar[j]);
      v_.rest[j] = v_.g_bar[j] = half;
      size[0] += over_c(half, j) * half;
    });
    return start(size);
  }

  OTLOSS_DEVICE bool right() {
    double size[1] = {0};
    team_.for_columns([&](int j) {
      const double g = v_.g_bar[j], q = sum(j);
      v_.rest[j] = g - q;
      size[0] += over_c(g, j) * g + over_c(q, j) * q;
    });
    return start(size);
  }

  // -------------------------------------------------------------------------------- iterations

  // Multiples of c are not in the range of the system of a balanced problem.
  OTLOSS_DEVICE bool projects() const { return p_.penalties.balanced && !p_.symmetric; }

  // Conjugate gradients for A beta = rest, preconditioned by the diagonal c. size: sum of the
  // squares of the terms of rest, over c.
  OTLOSS_DEVICE bool start(double (&size)[1]) {
    constexpr double kUnit = 4 * std::numeric_limits<double>::epsilon();
    double mass[2] = {0, 0}, norm[1] = {0};
    team_.sum(size);
    team_.for_columns([&](int j) { mass[0] += v_.c[j], mass[1] += v_.rest[j]; });
    team_.sum(mass);
    team_.for_columns([&](int j) {
      double& rest = v_.rest[j];
      if (projects()) rest -= mass[1] / mass[0] * v_.c[j];
      v_.beta[j] = 0;
      v_.direction[j] = over_c(rest, j);
      norm[0] += v_.direction[j] * rest;
    });
    team_.sum(norm);
    if (block_.thread() == 0) {
      s_.floor = kUnit * kUnit * size[0];
      s_.mass = mass[0];
      s_.first = s_.rz = norm[0];
      s_.iterations = 0;
    }
    block_.sync();
    return next();
  }

  // The next product, or the last ones.
  OTLOSS_DEVICE bool next() {
    constexpr double kTol = implicit_tolerance<T>();
    const bool goes_on = s_.rz > kTol * kTol * s_.first && s_.rz > s_.floor;
    if (goes_on && s_.iterations < kMaxCgIterations) return ask(Stage::kStep, 0, v_.direction);
    return last();
  }

  OTLOSS_DEVICE bool row_product() {
    if (p_.symmetric) return step();
    team_.for_rows([&](int i) { v_.w[i] = over_r(sum(i), i); });
    return ask(Stage::kStep, 1, v_.w);
  }

  OTLOSS_DEVICE bool step() {
    const auto product = [&](int j) {
      return v_.c[j] * v_.direction[j] + (p_.symmetric ? sum(j) : -sum(j));
    };
    double curvature[1] = {0};
    team_.for_columns([&](int j) { curvature[0] += v_.direction[j] * product(j); });
    team_.sum(curvature);
    if (!(curvature[0] > 0)) return last();
    const double length = s_.rz / curvature[0];
    double sums[2] = {0, 0};  // of the residual, and of its squares over c
    team_.for_columns([&](int j) {
      v_.beta[j] += length * v_.direction[j];
      const double rest = v_.rest[j] -= length * product(j);
      sums[0] += rest;
      sums[1] += over_c(rest, j) * rest;
    });
    team_.sum(sums);
    const double mean = projects() ? sums[0] / s_.mass : 0.0;
    const double rz = sums[1] - sums[0] * mean, turn = rz / s_.rz;
    team_.for_columns([&](int j) {
      v_.rest[j] -= mean * v_.c[j];
      v_.direction[j] = over_c(v_.rest[j], j) + turn * v_.direction[j];
    });
    block_.sync();
    if (block_.thread() == 0) s_.rz = rz, ++s_.iterations;
    block_.sync();
    return next();
  }

  // ------------------------------------------------------------------------------------ results

  OTLOSS_DEVICE bool last() {
    if (team_.first_thread()) {
      double* const status = p_.status + batch_ * kImplicitStatusFields;
      status[kImplicitIterations] = s_.iterations;
      status[kImplicitResidual] = s_.rz <= s_.floor ? 0.0 : sqrt(s_.rz / s_.first);
    }
    if (!p_.symmetric) return ask(Stage::kBack, 0, v_.beta);
    team_.for_columns([&](int j) {
      const double g = v_.g_bar[j], beta = v_.beta[j];
      v_.w[j] = beta, v_.f_bar[j] = g;
      v_.b_bar[j] -= args_.eps * quotient(g - v_.c[j] * beta, b_[j]);
    });
    return write();
  }

  // alpha, to w.
  OTLOSS_DEVICE bool back() {
    team_.for_rows([&](int i) { v_.w[i] = over_r(v_.f_bar[i] - sum(i), i); });
    return ask(Stage::kBack, 1, v_.w);
  }

  OTLOSS_DEVICE bool finish() {
    team_.for_columns([&](int j) { v_.b_bar[j] -= args_.eps * quotient(sum(j), b_[j]); });
    return write();
  }

  OTLOSS_DEVICE bool write() {
    team_.for_rows([&](int i) {  // (P beta)_i = f_bar_i - r_i alpha_i
      const double rest = v_.f_bar[i] - v_.row_mass[i] * v_.w[i];
      v_.a_bar[i] -= args_.eps * quotient(rest, a_[i]);
      plan_.alpha[batch_ * p_.n + i] = static_cast<T>(v_.w[i]);
    });
    team_.for_columns([&](int j) { plan_.beta[batch_ * p_.m + j] = static_cast<T>(v_.beta[j]); });
    return put_weights();
  }

  // Of (a_bar + t, b_bar - t), all gradients on weights of equal total, that with <a, a_bar> =
  // <b, b_bar>.
  OTLOSS_DEVICE bool put_weights() {
    if (p_.grad_a == nullptr) return true;
    double sums[1] = {0};
    team_.for_rows([&](int i) { sums[0] -= static_cast<double>(a_[i]) * v_.a_bar[i]; });
    team_.for_columns([&](int j) { sums[0] += static_cast<double>(b_[j]) * v_.b_bar[j]; });
    team_.sum(sums);
    const double shift = p_.penalties.balanced ? sums[0] / (s_.mass_a + s_.mass_b) : 0.0;
    T *const grad_a = p_.grad_a + batch_ * p_.n, *const grad_b = p_.grad_b + batch_ * p_.m;
    team_.for_rows(
        [&](int i) { grad_a[i] = a_[i] > T(0) ? static_cast<T>(v_.a_bar[i] + shift) : T(0); });
    team_.for_columns(
        [&](int j) { grad_b[j] = b_[j] > T(0) ? static_cast<T>(v_.b_bar[j] - shift) : T(0); });
    return true;
  }

  Block& block_;
  const ImplicitArguments<T>& args_;
  Team& team_;
  const ImplicitGroup<T>& p_;
  const int64_t batch_;
  ImplicitState& s_;
  const PlanOfPoints<T>& plan_;
  const ImplicitVectors v_;
  const Penalty x_, y_;
  const T *const a_, *const b_;  // (n,) (m,)
  T *const F_, *const G_;        // exponents of the plan
};

}  // namespace otloss::cuda
