// Launches solves, on stored cost matrices or on points.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "core/last_update.h"
#include "core/math.h"
#include "core/rounding.h"
#include "cost_kernels.h"
#include "cpu/multiscale/levels.h"
#include "cpu/simd/vectors.h"
#include "cpu/solve/last_update.h"
#include "cpu/solve/solver.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

// What an earlier call found, and its value.
template <typename T>
void take_known(const SolveGroup<T>& group, int64_t p, double eps) {
  const int64_t n = group.n;
  const double* known = group.known + p * (n + kStatusFields);
  const T* a = group.a + p * n;
  T *f = group.f + p * n, *g = group.g + p * n;
  for (int64_t i = 0; i < n; ++i) f[i] = g[i] = static_cast<T>(known[i]);
  double* status = group.status + p * kStatusFields;
  std::copy_n(known + n, static_cast<int64_t>(kStatusFields), status);
  if (group.points.multiscale) return;  // whose term is not that of rounded potentials
  const std::vector<T> b = column_weights(group.penalties, n, a, n, a);
  const Side<T> x(n, a, group.penalties.rho_x), y(n, b.data(), group.penalties.rho_y);
  status[kStatusTerm] =
      group.coefficient * regularized_value(x, y, eps, group.penalties.balanced, f, g);
}

// Whether one potential solves the problem: a cloud against itself, or against an equal one.
template <typename T>
bool has_one_potential(const SolveGroup<T>& group, int64_t p) {
  if (group.symmetric) return true;
  if (group.dummies > 0) return false;
  const int64_t n = group.n, entries = n * group.points.d;
  const T *x = group.points.zx, *y = group.points.zy, *a = group.a + p * n;
  return x && n == group.m && group.penalties.rho_x == group.penalties.rho_y &&
         std::equal(x + p * entries, x + (p + 1) * entries, y + p * entries) &&
         std::equal(a, a + n, group.b + p * n);
}

// False where all pairs take less time: then f and g are where to go on from.
template <typename T>
bool solve_multiscale(const SolveGroup<T>& group, int64_t p, const SolveOptions& options,
                      bool split) {
  const int64_t n = group.n, m = group.m;
  const T *a = group.a + p * n, *b = group.b + p * m;
  T *f = group.f + p * n, *g = group.g + p * m;
  double* status = group.status + p * kStatusFields;
  const Penalties& penalties = group.penalties;
  const double mass_x = Side<T>(n, a, penalties.rho_x).mass;
  const double mass_y = penalties.balanced ? mass_x : Side<T>(m, b, penalties.rho_y).mass;
  const bool one = has_one_potential(group, p);
  multiscale::Clouds clouds(group.points, p, n, a, m, b, one, split);
  status[kStatusMaxCost] = clouds.max_cost();
  multiscale::Solution solution;
  if (std::isfinite(status[kStatusMaxCost])) {
    clouds.set_masses(mass_x, mass_y);
    const std::vector<int32_t> in_x = clouds.in_x, in_y = one ? in_x : clouds.in_y;
    if (options.warm_start) {
      for (const int32_t i : in_x) solution.f.push_back(static_cast<double>(f[i]));
      for (const int32_t j : in_y) solution.g.push_back(static_cast<double>(g[j]));
    }
    solution = (one ? multiscale::solve_self : multiscale::solve_pair)(
        std::move(clouds), penalties, options, std::move(solution), std::is_same_v<T, float>,
        split);
    std::fill(f, f + n, T(0)), std::fill(g, g + m, T(0));
    for (size_t i = 0; i < solution.f.size(); ++i) f[in_x[i]] = static_cast<T>(solution.f[i]);
    for (size_t j = 0; j < solution.g.size(); ++j) g[in_y[j]] = static_cast<T>(solution.g[j]);
    status[kStatusTerm] = group.coefficient * solution.value;
  } else {
    std::fill(f, f + n, std::numeric_limits<T>::quiet_NaN());
    std::fill(g, g + m, std::numeric_limits<T>::quiet_NaN());
    status[kStatusTerm] = std::numeric_limits<double>::quiet_NaN();
  }
  status[kStatusIterations] = static_cast<double>(solution.outcome.iterations);
  status[kStatusError] = solution.outcome.error;
  status[kStatusConverged] = solution.outcome.converged ? 1.0 : 0.0;
  return solution.finished;
}

// Those of problem p of a batch.
SolveOptions of_problem(SolveOptions options, int64_t p) {
  options.eps = Eps{options.eps, options.each_eps}.of(p);
  return options;
}

template <typename T>
void solve_streamed(const SolveGroup<T>& group, int64_t p, SolveOptions options, bool split);

template <typename T>
void solve_problem(const SolveGroup<T>& group, int64_t p, const SolveOptions& of_all, bool split) {
  const SolveOptions options = of_problem(of_all, p);
  if (group.known) return take_known(group, p, options.eps);
  if (group.points.multiscale) {
    if (!solve_multiscale(group, p, options, split)) solve_streamed(group, p, options, split);
    return;
  }
  const int64_t n = group.n, m = group.m;
  const T* a = group.a + p * n;
  T *f = group.f + p * n, *g = group.g + p * m;
  const std::vector<T> b = column_weights(group.penalties, n, a, m, group.b + p * m);
  Engine<T> engine(Side<T>(n, a, group.penalties.rho_x),
                   Side<T>(m, b.data(), group.penalties.rho_y), group, p, options.eps, split);
  const double max_cost = engine.max_cost();
  double* status = group.status + p * kStatusFields;
  status[kStatusMaxCost] = max_cost;

  Outcome outcome;
  const int64_t traced = group.trace ? options.n_iters * (n + m) : 0;
  T* trace = group.trace ? group.trace + p * traced : nullptr;
  if (!std::isfinite(max_cost)) {
    std::fill(f, f + n, std::numeric_limits<T>::quiet_NaN());
    std::fill(g, g + m, std::numeric_limits<T>::quiet_NaN());
    std::fill(trace, trace + traced, std::numeric_limits<T>::quiet_NaN());
    status[kStatusTerm] = std::numeric_limits<double>::quiet_NaN();
  } else {
    const bool one_potential = options.n_iters < 0 && has_one_potential(group, p);
    // The solvers work on what is damped to give f, the symmetric one on f itself.
    const double damping = one_potential ? 1 : engine.x.damping(options.eps);
    const T to_base2 = static_cast<T>(kLog2E / options.eps / damping);
    std::vector<T> F(n);
    if (options.warm_start)
      for (int64_t i = 0; i < n; ++i) F[i] = to_base2 * f[i];
    else
      std::fill(g, g + m, T(0));
    if (options.n_iters >= 0) {
      outcome = solve_fixed(engine, options, F.data(), g, trace);
    } else if (one_potential) {
      outcome = solve_symmetric(engine, options, F.data());
    } else {
      outcome = solve_pair(engine, options, F.data(), g);
    }
    const T to_cost = static_cast<T>(damping * options.eps / kLog2E);
    for (int64_t i = 0; i < n; ++i) f[i] = to_cost * F[i];
    if (one_potential) std::copy(f, f + n, g);
    status[kStatusTerm] =
        group.coefficient * value_of(engine, options, group.penalties.balanced, f, g);
  }
  status[kStatusIterations] = static_cast<double>(outcome.iterations);
  status[kStatusError] = outcome.error;
  status[kStatusConverged] = outcome.converged ? 1.0 : 0.0;
}

// What multiscale does not pay for, from where it left off.
template <typename T>
void solve_streamed(const SolveGroup<T>& group, int64_t p, SolveOptions options, bool split) {
  const int64_t n = group.n, m = group.m, d = group.points.d;
  SolveGroup<T> one = group;
  one.batch = 1;
  one.a += p * n, one.f += p * n, one.b += p * m, one.g += p * m, one.status += p * kStatusFields;
  std::vector<T> zx(n * d), zy(m * d), norm_x(n), norm_y(m);
  prepare_clouds<T>({{1, n, d, group.points.zx + p * n * d, one.a, zx.data(), norm_x.data()},
                     {1, m, d, group.points.zy + p * m * d, one.b, zy.data(), norm_y.data()}},
                    group.points.kind);
  one.points = {group.points.kind, d, zx.data(), zy.data(), norm_x.data(), norm_y.data()};
  options.warm_start = true;
  solve_problem(one, 0, options, split);
}

template <typename T>
LossTerms loss_of(const std::vector<SolveGroup<T>>& groups, int64_t k) {
  LossTerms loss;
  for (const auto& group : groups) loss.add(group.status[k * kStatusFields + kStatusTerm]);
  return loss;
}

// Terms that nearly cancel are made again in double.
void refine(const std::vector<SolveGroup<float>>& groups, const SolveOptions& options) {
  if (!has_last_update(groups, options)) return;
  std::vector<int64_t> chosen;
  for (int64_t k = 0; k < groups[0].batch; ++k)
    if (loss_of(groups, k).cancel()) chosen.push_back(k);
  const int64_t count = static_cast<int64_t>(groups.size());
  const auto again = count * static_cast<int64_t>(chosen.size());
  parallel_problems(again, groups[0].n * groups[0].m, [&](int64_t i, bool split) {
    const SolveGroup<float>& group = groups[i % count];
    const int64_t k = chosen[i / count];
    group.status[k * kStatusFields + kStatusTerm] =
        group.coefficient * value_in_double(group, k, of_problem(options, k).eps, split);
  });
}

// A pair's value is below its optimum by the solver's error, which may make the divergence of
// nearly equal clouds negative. Then the potentials of the clouds against themselves are better
// ones: where e^{-C/eps} is positive definite their value is at least half of those of both clouds
// together, whatever the potentials are (Feydy et al. 2019). So the pair is solved again from
// there. Returns the entries of which that was done.
template <typename T>
std::vector<int64_t> solve_negative_again(const std::vector<SolveGroup<T>>& groups,
                                          const SolveOptions& options) {
  constexpr double kUnit = static_cast<double>(std::numeric_limits<T>::epsilon());
  if (groups.size() != 3 || !groups[1].symmetric || !groups[2].symmetric) return {};
  if (options.n_iters >= 0 || options.objective != Objective::kRegularized) return {};
  const SolveGroup<T>& pair = groups[0];
  std::vector<int64_t> chosen;
  for (int64_t k = 0; k < pair.batch; ++k) {
    if (loss_of(groups, k).clamped(kUnit) < 0 &&
        pair.status[k * kStatusFields + kStatusConverged] > 0)
      chosen.push_back(k);
  }
  const auto again = static_cast<int64_t>(chosen.size());
  parallel_problems(again, pair.n * pair.m, [&](int64_t i, bool split) {
    const int64_t k = chosen[i], n = pair.n, m = pair.m;
    double& sweeps = pair.status[k * kStatusFields + kStatusIterations];
    const double before = sweeps;
    std::copy_n(groups[1].f + k * n, n, pair.f + k * n);
    std::copy_n(groups[2].f + k * m, m, pair.g + k * m);
    SolveOptions from_there = options;
    from_there.warm_start = true;
    solve_problem(pair, k, from_there, split);
    sweeps += before;
  });
  return chosen;
}

// What is negative still, for a named cost, is rounding: costs that are 0 have only that.
template <typename T>
void raise_to_bound(const std::vector<SolveGroup<T>>& groups, const std::vector<int64_t>& entries) {
  if (!groups[0].points.zx) return;
  for (const int64_t k : entries) {
    const auto term = [&](int p) -> double& {
      return groups[p].status[k * kStatusFields + kStatusTerm];
    };
    term(0) = std::max(term(0), -(term(1) + term(2)));
  }
}

}  // namespace

template <typename T>
void solve(const std::vector<SolveGroup<T>>& groups, const SolveOptions& options) {
  const bool multiscaled = groups[0].points.multiscale;
  const auto solve_one = [&](const SolveGroup<T>& group, int64_t p, bool split) {
    solve_problem(group, p, options, split);
  };
  if (multiscaled)
    multiscale::for_each_problem(groups, solve_one);
  else
    for_each_problem(groups, solve_one);
  const auto in_double = [&] {
    if constexpr (std::is_same_v<T, float>)
      if (!multiscaled) refine(groups, options);
  };
  in_double();
  const std::vector<int64_t> again = solve_negative_again(groups, options);
  if (again.empty()) return;
  in_double();
  raise_to_bound(groups, again);
}

template <typename T>
void combine_terms(int64_t count, int64_t batch, const double* status, T* loss) {
  for (int64_t k = 0; k < batch; ++k) {
    LossTerms entry;
    for (int64_t p = 0; p < count; ++p)
      entry.add(status[(p * batch + k) * kStatusFields + kStatusTerm]);
    loss[k] = static_cast<T>(entry.clamped(std::numeric_limits<T>::epsilon()));
  }
}

#define OTLOSS_INSTANTIATE(T)                                                  \
  template void solve(const std::vector<SolveGroup<T>>&, const SolveOptions&); \
  template void combine_terms(int64_t, int64_t, const double*, T*);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
