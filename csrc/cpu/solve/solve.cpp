// Launches solves, on stored cost matrices or on points.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/math.h"
#include "cpu/simd/vectors.h"
#include "cpu/solve/solver.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

template <typename T>
double value_of(Engine<T>& engine, const SolveOptions& options, bool balanced, const T* f,
                const T* g) {
  const Side<T>&x = engine.x, &y = engine.y;
  if (options.objective == Objective::kTransport) {
    std::vector<T> F(f, f + x.count);
    for (T& value : F) value *= factor<T>(options.eps);
    return engine.transport(options.eps, F.data(), g);
  }
  if (!balanced)
    return soft_value(x, y, x.mass, y.mass, options.eps, x.soft_mean(f, 1).mean,
                      y.soft_mean(g, 1).mean);
  return dot(x.count, x.weight, f) + dot(y.count, y.weight, g);
}

template <typename T>
void solve_problem(const SolveGroup<T>& group, int64_t p, const SolveOptions& options, bool split) {
  const int64_t n = group.n, m = group.m;
  const T* a = group.a + p * n;
  T *f = group.f + p * n, *g = group.g + p * m;
  const std::vector<T> b = column_weights(group.penalties, n, a, m, group.b + p * m);
  Engine<T> engine(Side<T>(n, a, group.penalties.rho_x),
                   Side<T>(m, b.data(), group.penalties.rho_y), group, p, split);
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
    group.value[p] = static_cast<T>(value_of(engine, options, group.penalties.balanced, f, g));
  }
  status[kStatusIterations] = static_cast<double>(outcome.iterations);
  status[kStatusError] = outcome.error;
  status[kStatusConverged] = outcome.converged ? 1.0 : 0.0;
}

}  // namespace

template <typename T>
void solve(const std::vector<SolveGroup<T>>& groups, const SolveOptions& options) {
  for_each_problem(groups, [&](const SolveGroup<T>& group, int64_t p, bool split) {
    solve_problem(group, p, options, split);
  });
}

// The loss from the values of its problems.
template <typename T>
void combine_values(const std::vector<double>& coefficients, const T* values, int64_t batch,
                    T* loss) {
  for (int64_t k = 0; k < batch; ++k) {
    T sum = 0;
    for (size_t p = 0; p < coefficients.size(); ++p)
      sum += static_cast<T>(coefficients[p]) * values[p * batch + k];
    loss[k] = sum;
  }
}

#define OTLOSS_INSTANTIATE(T)                                                  \
  template void solve(const std::vector<SolveGroup<T>>&, const SolveOptions&); \
  template void combine_values(const std::vector<double>&, const T*, int64_t, T*);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
