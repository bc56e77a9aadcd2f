// Solves and envelope gradients, on stored cost matrices or on points.
//
// Problems run in parallel first, each on one thread from start to end. When there are fewer
// problems than threads, each large problem splits its rows instead, with private column sums.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/math.h"
#include "cpu/engines/engine.h"
#include "cpu/gradient/point_sums.h"
#include "cpu/parallel.h"
#include "cpu/problems.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/solver.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

template <typename T, typename Engine>
double value_of(Engine& engine, const SolveOptions& options, bool balanced, const T* f,
                const T* g) {
  if (options.objective == Objective::kTransport) {
    std::vector<T> F(engine.n);
    const T to_base2 = static_cast<T>(kLog2E / options.eps);
    for (int64_t i = 0; i < engine.n; ++i) F[i] = to_base2 * f[i];
    return engine.transport(options.eps, F.data(), g);
  }
  if (!balanced) return soft_value(engine.x, engine.y, options.eps, f, g);
  return dot(engine.n, engine.a, f) + dot(engine.m, engine.b, g);
}

template <typename T, typename Source>
void solve_problem(const SolveGroup<T>& group, int64_t p, const SolveOptions& options, bool split,
                   const Source& source) {
  const int64_t n = group.n, m = group.m;
  T *f = group.f + p * n, *g = group.g + p * m;
  const std::vector<T> b = column_weights(group.strength, n, group.a + p * n, m, group.b + p * m);
  Engine<T, Source> engine(n, m, group.a + p * n, b.data(), source, split, group.strength);
  const double max_cost = engine.max_cost();
  double* status = group.status + p * kStatusFields;
  status[kStatusMaxCost] = max_cost;

  Outcome outcome;
  if (!std::isfinite(max_cost)) {
    std::fill(f, f + n, std::numeric_limits<T>::quiet_NaN());
    std::fill(g, g + m, std::numeric_limits<T>::quiet_NaN());
    group.value[p] = std::numeric_limits<T>::quiet_NaN();
  } else {
    const bool one_potential = group.symmetric && options.n_iters < 0;
    // The solvers work on what is damped to give f, the symmetric one on f itself.
    const double damping = one_potential ? 1 : engine.x.damping(options.eps);
    const T to_base2 = static_cast<T>(kLog2E / options.eps / damping);
    std::vector<T> F(n);
    if (options.warm_start)
      for (int64_t i = 0; i < n; ++i) F[i] = to_base2 * f[i];
    else
      std::fill(g, g + m, T(0));
    if (options.n_iters >= 0) {
      T* trace = group.trace ? group.trace + p * options.n_iters * (n + m) : nullptr;
      outcome = solve_fixed(engine, options, F.data(), g, trace);
    } else if (one_potential) {
      outcome = solve_symmetric(engine, options, F.data());
    } else {
      outcome = solve_pair(engine, options, F.data(), g);
    }
    const T to_cost = static_cast<T>(damping * options.eps / kLog2E);
    for (int64_t i = 0; i < n; ++i) f[i] = to_cost * F[i];
    if (one_potential) std::copy(f, f + n, g);
    group.value[p] = static_cast<T>(value_of(engine, options, group.strength.balanced, f, g));
  }
  status[kStatusIterations] = static_cast<double>(outcome.iterations);
  status[kStatusError] = outcome.error;
  status[kStatusConverged] = outcome.converged ? 1.0 : 0.0;
}

// dOT/da = f up to a constant; the one with <a, f> = <b, g>. Where a side is soft there is no
// constant to choose. The transport objective's plan is held constant, so its weights receive
// nothing.
template <typename T>
void weight_gradients(const EnvelopeGroup<T>& group, int64_t p, double eps, Objective objective) {
  if (!group.grad_a && !group.grad_b) return;
  const int64_t n = group.n, m = group.m;
  const T *f = group.f + p * n, *g = group.g + p * m;
  const Side<T> x(n, group.a + p * n, group.strength.rho_x);
  const Side<T> y(m, group.b + p * m, group.strength.rho_y);
  const T scale = objective == Objective::kRegularized ? group.coefficient * group.grad[p] : T(0);
  const auto fill = [&](const Side<T>& side, const Side<T>& other, const T* v, double shift,
                        T* grad) {
    for (int64_t i = 0; i < side.count; ++i) {
      const double value = group.strength.balanced
                               ? static_cast<double>(v[i]) + shift
                               : side.weight_gradient(eps, other.mass, static_cast<double>(v[i]));
      grad[i] = side.weight[i] > T(0) ? scale * static_cast<T>(value) : T(0);
    }
  };
  const double shift = (dot(m, y.weight, g) - dot(n, x.weight, f)) / (2 * x.mass);
  if (group.grad_a) fill(x, y, f, shift, group.grad_a + p * n);
  if (group.grad_b) fill(y, x, g, -shift, group.grad_b + p * m);
}

// grad_C = coefficient * grad * P.
template <typename T>
void matrix_gradient(const EnvelopeGroup<T>& group, int64_t p, double eps, bool split) {
  const int64_t n = group.n, m = group.m;
  const T k = static_cast<T>(kLog2E / eps);
  std::vector<T> F(n), G(m);
  for (int64_t i = 0; i < n; ++i) F[i] = k * group.f[p * n + i];
  absorb_weights(m, k, group.g + p * m, group.b + p * m, G.data());
  const auto rows = [&](int64_t begin, int64_t end) {
    const int64_t row = p * n + begin;
    plan_rows(PlanRows<T>{end - begin, m, k, group.coefficient * group.grad[p], group.C + row * m,
                          group.a + row, F.data() + begin, G.data(), group.grad_C + row * m});
  };
  if (split)
    parallel_for(0, n, std::max<int64_t>(1, kSplitGrain / m), rows);
  else
    rows(0, n);
}

}  // namespace

template <typename T>
void solve(const std::vector<SolveGroup<T>>& groups, const SolveOptions& options) {
  for_each_problem(groups, [&](const SolveGroup<T>& group, int64_t p, bool split) {
    const int64_t n = group.n, m = group.m;
    if (group.C)
      solve_problem(group, p, options, split, StoredRows<T>(n, m, group.C, group.points, p));
    else
      solve_problem(group, p, options, split, MadeRows<T>(n, m, group.points, p, group.symmetric));
  });
}

template <typename T>
void envelope_backward(const std::vector<EnvelopeGroup<T>>& groups, double eps,
                       Objective objective) {
  for_each_problem(groups, [&](const EnvelopeGroup<T>& group, int64_t p, bool split) {
    if (group.grad_C) matrix_gradient(group, p, eps, split);
    weight_gradients(group, p, eps, objective);
  });
}

template <typename T>
void point_gradient_sums(const std::vector<PointGradientGroup<T>>& groups, double eps) {
  for_each_problem(groups, [&](const PointGradientGroup<T>& group, int64_t p, bool split) {
    const int64_t n = group.n, m = group.m;
    const PlanGradient<T> plan{eps,
                               group.coefficient * group.grad[p],
                               T(0),
                               group.a + p * n,
                               group.b + p * m,
                               group.f + p * n,
                               group.g + p * m,
                               nullptr,
                               nullptr};
    point_sums(group.points, n, m, p, group.symmetric, split, plan, {group.sum, group.product});
  });
}

#define OTLOSS_INSTANTIATE(T)                                                               \
  template void solve(const std::vector<SolveGroup<T>>&, const SolveOptions&);              \
  template void envelope_backward(const std::vector<EnvelopeGroup<T>>&, double, Objective); \
  template void point_gradient_sums(const std::vector<PointGradientGroup<T>>&, double);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss::cpu
