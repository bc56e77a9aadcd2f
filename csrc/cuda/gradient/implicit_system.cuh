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
  using Team = cuda::Team<Block, kControlThreads>;

  OTLOSS_DEVICE Implicit(Block& block, const ImplicitArguments<T>& arguments, Team& team,
                         const ImplicitGroup<T>& p, int64_t batch, ImplicitState<T>& state)
      : block_(block), args_(arguments), team_(team), p_(p), batch_(batch), s_(state) {}

  // Asks for the first sums.
  OTLOSS_DEVICE bool open() {
    block_.sync();
    if (block_.thread() == 0) place();
    block_.sync();
    centre_potentials();
    return ask(Stage::kSums, 0, nullptr);
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

  OTLOSS_DEVICE void place() {
    const int group = static_cast<int>(&p_ - args_.pack.items);
    const PlanOfPoints<T>& plan = args_.plans[group];
    const PackedPair<T>& points = plan.points;
    s_.v = args_.vectors_of(team_.index());
    s_.a = p_.a + batch_ * p_.n, s_.b = p_.b + batch_ * p_.m;
    s_.F = plan.F + batch_ * packed_stride(p_.n), s_.G = plan.G + batch_ * packed_stride(p_.m);
    args_.orders.place(team_.index(), points, p_, batch_, p_.symmetric, kLog2E / args_.eps, s_.F,
                       s_.G);
    s_.of_x = {1 / p_.penalties.rho_x}, s_.of_y = {1 / p_.penalties.rho_y};
    s_.symmetric = p_.symmetric, s_.balanced = p_.penalties.balanced;
    s_.scale = static_cast<double>(p_.coefficient * p_.grad[batch_]);
  }

  // The potentials, with <a, f> = <b, g> if balanced; one potential for a cloud against itself.
  // Also the exponents of the plan.
  OTLOSS_DEVICE void centre_potentials() {
    const T *f = p_.f + batch_ * p_.n, *g = p_.g + batch_ * p_.m, *a = s_.a, *b = s_.b;
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
    const double shift = s_.balanced ? (sums[3] - sums[2]) / (mass_a + mass_b) : 0.0;
    const double k = kLog2E / args_.eps;
    T *const F = s_.F, *const G = s_.G;
    team_.for_columns([&](int j) {
      const double other = s_.symmetric ? static_cast<double>(f[j]) : 0.0;
      const double own = static_cast<double>(g[j]);
      s_.v.g[j] = !(b[j] > T(0)) ? 0.0 : s_.symmetric ? 0.5 * (own + other) : own - shift;
      G[j] = static_cast<T>(k) * static_cast<T>(s_.v.g[j]) + log2_weight(b[j]);
    });
    team_.for_rows([&](int i) {
      const double own = static_cast<double>(f[i]) + shift;
      s_.v.f[i] = !(a[i] > T(0)) ? 0.0 : s_.symmetric ? s_.v.g[i] : own;
      F[i] = static_cast<T>(k * s_.v.f[i]) + log2_weight(a[i]);
    });
    order().sides[0].pad(block_), order().sides[1].pad(block_);
  }

  OTLOSS_DEVICE bool row_sums() {
    const double damping = s_.of_x.damping(args_.eps);
    team_.for_rows([&](int i) {
      const double total = sum(i) + nothing(s_.F[i]), mass = total / damping;
      s_.v.row_mass[i] = mass;
      s_.v.inverse_r[i] = mass != 0 ? 1 / mass : 0.0;
    });
    if (!s_.symmetric) return ask(Stage::kSums, 1, nullptr);
    team_.for_columns([&](int j) { set_column_mass(j, s_.v.row_mass[j]); });
    return seed();
  }

  OTLOSS_DEVICE bool column_sums() {
    const double damping = s_.of_y.damping(args_.eps);
    team_.for_columns([&](int j) { set_column_mass(j, (sum(j) + nothing(s_.G[j])) / damping); });
    return seed();
  }

  OTLOSS_DEVICE void set_column_mass(int j, double mass) {
    s_.v.c[j] = mass;
    s_.v.inverse_c[j] = mass != 0 ? 1 / mass : 0.0;
  }

  // --------------------------------------------------------------------------- right-hand side

  OTLOSS_DEVICE static double outside(const T* grad, T weight, int64_t at) {
    return grad && weight > T(0) ? static_cast<double>(grad[at]) : 0.0;
  }
  OTLOSS_DEVICE double of_f(int i) const { return outside(p_.grad_f, s_.a[i], batch_ * p_.n + i); }
  OTLOSS_DEVICE double of_g(int j) const { return outside(p_.grad_g, s_.b[j], batch_ * p_.m + j); }

  // The objective's derivatives at fixed potentials (regularized: all there are at the solution),
  // or what <P, C> puts on the potentials, and what comes from outside.
  OTLOSS_DEVICE bool seed() {
    if (args_.objective == Objective::kTransport)
      return ask(Stage::kCosts, 0, nullptr, RowSum::kCost);
    const auto value = [&](const Penalty& side, double other_mass, double v) {
      return s_.balanced ? v : side.weight_gradient(args_.eps, other_mass, v);
    };
    team_.for_rows([&](int i) {
      s_.v.f_bar[i] = of_f(i);
      s_.v.a_bar[i] = s_.scale * value(s_.of_x, s_.mass_b, s_.v.f[i]);
    });
    team_.for_columns([&](int j) {
      s_.v.g_bar[j] = of_g(j);
      s_.v.b_bar[j] = s_.scale * value(s_.of_y, s_.mass_a, s_.v.g[j]);
    });
    return fix_gauge();
  }

  OTLOSS_DEVICE bool row_costs() {
    team_.for_rows([&](int i) {
      const double term = s_.scale * sum(i);
      s_.v.f_bar[i] = of_f(i) + term / args_.eps;
      s_.v.a_bar[i] = quotient(term, s_.a[i]);
    });
    if (!s_.symmetric) return ask(Stage::kCosts, 1, nullptr, RowSum::kCost);
    return column_costs();
  }

  OTLOSS_DEVICE bool column_costs() {
    team_.for_columns([&](int j) {
      const double term = s_.scale * sum(j);
      s_.v.g_bar[j] = of_g(j) + term / args_.eps;
      s_.v.b_bar[j] = quotient(term, s_.b[j]);
    });
    return fix_gauge();
  }

  // f and g are those with <a, f> = <b, g>: a gradient along (1, -1) is one on the weights.
  OTLOSS_DEVICE bool fix_gauge() {
    if (s_.balanced) {
      double sums[1] = {0};
      team_.for_rows([&](int i) { sums[0] += s_.v.f_bar[i]; });
      team_.for_columns([&](int j) { sums[0] -= s_.v.g_bar[j]; });
      team_.sum(sums);
      const double excess = sums[0] / (s_.mass_a + s_.mass_b);
      team_.for_rows([&](int i) {
        s_.v.f_bar[i] -= excess * static_cast<double>(s_.a[i]);
        s_.v.a_bar[i] -= excess * s_.v.f[i];
      });
      team_.for_columns([&](int j) {
        s_.v.g_bar[j] += excess * static_cast<double>(s_.b[j]);
        s_.v.b_bar[j] += excess * s_.v.g[j];
      });
    }
    if (!s_.symmetric) {
      team_.for_rows([&](int i) { s_.v.base[i] = s_.v.f_bar[i] * s_.v.inverse_r[i]; });
      return ask(Stage::kRight, 1, s_.v.base);
    }
    double size[1] = {0};
    team_.for_columns([&](int j) {
      const double half = 0.5 * (s_.v.f_bar[j] + s_.v.g_bar[j]);
      s_.v.rest[j] = s_.v.g_bar[j] = half;
      size[0] += s_.v.inverse_c[j] * half * half;
    });
    return start(size);
  }

  OTLOSS_DEVICE bool right() {
    double size[1] = {0};
    team_.for_columns([&](int j) {
      const double g = s_.v.g_bar[j], q = sum(j);
      s_.v.rest[j] = g - q;
      size[0] += s_.v.inverse_c[j] * (g * g + q * q);
    });
    return start(size);
  }

  // -------------------------------------------------------------------------------- iterations

  // Multiples of c are not in the range of the system of a balanced problem.
  OTLOSS_DEVICE bool projects() const { return s_.balanced && !s_.symmetric; }

  // Conjugate gradients for A beta = rest, preconditioned by the diagonal c. size: sum of the
  // squares of the terms of rest, over c.
  OTLOSS_DEVICE bool start(double (&size)[1]) {
    constexpr double kUnit = 4 * std::numeric_limits<double>::epsilon();
    double mass[2] = {0, 0}, norm[1] = {0};
    team_.sum(size);
    team_.for_columns([&](int j) { mass[0] += s_.v.c[j], mass[1] += s_.v.rest[j]; });
    team_.sum(mass);
    team_.for_columns([&](int j) {
      double& rest = s_.v.rest[j];
      if (projects()) rest -= mass[1] / mass[0] * s_.v.c[j];
      s_.v.beta[j] = 0;
      s_.v.direction[j] = s_.v.inverse_c[j] * rest;
      norm[0] += s_.v.direction[j] * rest;
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
    if (goes_on && s_.iterations < kMaxCgIterations) return ask(Stage::kStep, 0, s_.v.direction);
    return last();
  }

  OTLOSS_DEVICE bool row_product() {
    if (s_.symmetric) return step();
    team_.for_rows([&](int i) { s_.v.w[i] = sum(i) * s_.v.inverse_r[i]; });
    return ask(Stage::kStep, 1, s_.v.w);
  }

  OTLOSS_DEVICE bool step() {
    double curvature[1] = {0};
    team_.for_columns([&](int j) {
      const double d = s_.v.direction[j], product = sum(j);
      s_.v.q[j] = s_.v.c[j] * d + (s_.symmetric ? product : -product);
      curvature[0] += d * s_.v.q[j];
    });
    team_.sum(curvature);
    if (!(curvature[0] > 0)) return last();
    const double length = s_.rz / curvature[0];
    double sums[2] = {0, 0};  // of the residual, and of its squares over c
    team_.for_columns([&](int j) {
      s_.v.beta[j] += length * s_.v.direction[j];
      const double rest = s_.v.rest[j] -= length * s_.v.q[j];
      sums[0] += rest;
      sums[1] += s_.v.inverse_c[j] * rest * rest;
    });
    team_.sum(sums);
    const double mean = projects() ? sums[0] / s_.mass : 0.0;
    const double rz = sums[1] - sums[0] * mean, turn = rz / s_.rz;
    team_.for_columns([&](int j) {
      s_.v.rest[j] -= mean * s_.v.c[j];
      s_.v.direction[j] = s_.v.inverse_c[j] * s_.v.rest[j] + turn * s_.v.direction[j];
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
    if (!s_.symmetric) return ask(Stage::kBack, 0, s_.v.beta);
    team_.for_columns([&](int j) {
      const double g = s_.v.g_bar[j], beta = s_.v.beta[j];
      s_.v.w[j] = beta, s_.v.f_bar[j] = g;
      s_.v.b_bar[j] -= args_.eps * quotient(g - s_.v.c[j] * beta, s_.b[j]);
    });
    return write();
  }

  // alpha, to w.
  OTLOSS_DEVICE bool back() {
    team_.for_rows([&](int i) { s_.v.w[i] = s_.v.base[i] - sum(i) * s_.v.inverse_r[i]; });
    return ask(Stage::kBack, 1, s_.v.w);
  }

  OTLOSS_DEVICE bool finish() {
    team_.for_columns([&](int j) { s_.v.b_bar[j] -= args_.eps * quotient(sum(j), s_.b[j]); });
    return write();
  }

  // Gradients of the weights: of (a_bar + t, b_bar - t), all gradients on weights of equal total,
  // that with <a, a_bar> = <b, b_bar>. Also alpha and beta for those of the points.
  OTLOSS_DEVICE bool write() {
    double sums[1] = {0};
    team_.for_rows([&](int i) {  // (P beta)_i = f_bar_i - r_i alpha_i
      const double rest = s_.v.f_bar[i] - s_.v.row_mass[i] * s_.v.w[i];
      s_.v.a_bar[i] -= args_.eps * quotient(rest, s_.a[i]);
      sums[0] -= static_cast<double>(s_.a[i]) * s_.v.a_bar[i];
    });
    team_.for_columns([&](int j) { sums[0] += static_cast<double>(s_.b[j]) * s_.v.b_bar[j]; });
    team_.sum(sums);
    const double shift = s_.balanced ? sums[0] / (s_.mass_a + s_.mass_b) : 0.0;
    const PlanOfPoints<T>& plan = args_.plans[&p_ - args_.pack.items];
    const auto put = [&](T* to, int64_t at, double value) {
      if (to != nullptr) to[at] = static_cast<T>(value);
    };
    team_.for_rows([&](int i) {
      const int64_t at = batch_ * p_.n + i;
      put(p_.grad_a, at, s_.a[i] > T(0) ? s_.v.a_bar[i] + shift : 0.0);
      put(plan.alpha, at, s_.v.w[i]);
    });
    team_.for_columns([&](int j) {
      const int64_t at = batch_ * p_.m + j;
      put(p_.grad_b, at, s_.b[j] > T(0) ? s_.v.b_bar[j] - shift : 0.0);
      put(plan.beta, at, s_.v.beta[j]);
    });
    return true;
  }

  Block& block_;
  const ImplicitArguments<T>& args_;
  Team& team_;
  const ImplicitGroup<T>& p_;
  const int64_t batch_;
  ImplicitState<T>& s_;
};

}  // namespace otloss::cuda
