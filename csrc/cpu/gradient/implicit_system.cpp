#include "cpu/gradient/implicit_system.h"

#include <limits>

namespace otloss::cpu {
namespace {

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

}  // namespace

void ImplicitSystem::fix_potentials() {
  if (balanced_) {  // <a, f> = <b, g>
    const double shift = (y.dot(y.v) - x.dot(x.v)) / (x.mass + y.mass);
    x.shift_potential(shift), y.shift_potential(-shift);
  }
  for (int64_t i = 0; symmetric_ && i < x.count; ++i) x.v[i] = y.v[i] = 0.5 * (x.v[i] + y.v[i]);
}

CgReport ImplicitSystem::solve(PlanProducts& plan, Objective objective, double scale, double tol) {
  Vector rows(x.count), columns(y.count);
  plan.sums(false, rows, columns);
  x.set_sums(eps_, rows.data()), y.set_sums(eps_, columns.data());
  if (objective == Objective::kRegularized) {
    x.seed_value(scale, eps_, balanced_, y.mass);
    y.seed_value(scale, eps_, balanced_, x.mass);
  } else {
    plan.sums(true, rows, columns);
    x.seed_transport(scale, eps_, rows.data());
    y.seed_transport(scale, eps_, columns.data());
  }
  if (balanced_) {  // a gradient along (1, -1) is one on the weights
    const double excess = (sum_of(x.v_bar) - sum_of(y.v_bar)) / (x.mass + y.mass);
    x.fix_gauge(excess), y.fix_gauge(-excess);
  }
  const CgReport report = symmetric_ ? solve_symmetric(plan, tol) : solve_pair(plan, tol);
  for (int64_t i = 0; i < x.count; ++i)  // (P beta)_i = f_bar_i - r_i alpha_i
    x.weight_bar[i] -= eps_ * quotient(x.v_bar[i] - x.sum[i] * x.solution[i], x.weight[i]);
  return report;
}

CgReport ImplicitSystem::solve_pair(PlanProducts& plan, double tol) {
  const int64_t n = x.count, m = y.count;
  Vector base(n), minus(n), w(n), right(m), sums(m);
  for (int64_t i = 0; i < n; ++i) {
    base[i] = x.v_bar[i] * x.inverse[i];
    minus[i] = -x.inverse[i];
  }
  plan.product(nullptr, base.data(), minus.data(), w, &sums);
  const Vector& c = y.sum;
  double size = 0;
  for (int64_t j = 0; j < m; ++j) {
    right[j] = y.v_bar[j] - sums[j];
    size += y.inverse[j] * (y.v_bar[j] * y.v_bar[j] + sums[j] * sums[j]);
  }
  const double mass = sum_of(c);
  const auto project = [&](Vector& r) {
    if (!balanced_) return;
    const double mean = sum_of(r) / mass;
    for (int64_t j = 0; j < m; ++j) r[j] -= mean * c[j];
  };
  const auto apply = [&](const Vector& v, Vector& out) {
    plan.product(v.data(), nullptr, x.inverse.data(), w, &out);
    for (int64_t j = 0; j < m; ++j) out[j] = c[j] * v[j] - out[j];
  };
  const CgReport report = conjugate_gradients({tol, rounding(size), kMaxIterations}, y.inverse,
                                              apply, project, right, y.solution);
  plan.product(y.solution.data(), base.data(), minus.data(), x.solution, &sums);
  for (int64_t j = 0; j < m; ++j) y.weight_bar[j] -= eps_ * quotient(sums[j], y.weight[j]);
  return report;
}

CgReport ImplicitSystem::solve_symmetric(PlanProducts& plan, double tol) {
  const int64_t n = x.count;
  Vector half(n);
  for (int64_t i = 0; i < n; ++i) half[i] = 0.5 * (x.v_bar[i] + y.v_bar[i]);
  const Vector ones(n, 1.0), &r = x.sum;
  const auto apply = [&](const Vector& v, Vector& out) {
    plan.product(v.data(), nullptr, ones.data(), out, nullptr);
    for (int64_t i = 0; i < n; ++i) out[i] += r[i] * v[i];
  };
  double size = 0;
  for (int64_t i = 0; i < n; ++i) size += x.inverse[i] * half[i] * half[i];
  Vector right = half;
  const CgReport report = conjugate_gradients(
      {tol, rounding(size), kMaxIterations}, x.inverse, apply, [](Vector&) {}, right, x.solution);
  y.solution = x.solution;
  x.v_bar = half;
  for (int64_t j = 0; j < n; ++j)
    y.weight_bar[j] -= eps_ * quotient(half[j] - r[j] * x.solution[j], y.weight[j]);
  return report;
}

}  // namespace otloss::cpu
