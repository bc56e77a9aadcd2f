// Iterations of a given number, without the solver's decisions.
#include <algorithm>
#include <vector>

#include "core/math.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/solver.h"

namespace otloss::cpu {

template <typename T>
Outcome solve_fixed(Engine<T>& engine, const SolveOptions& options, T* F, T* g, T* trace) {
  const Side<T>&x = engine.x, &y = engine.y;
  const int64_t n = x.count, m = y.count;
  const double eps = options.eps, roundoff = std::numeric_limits<T>::epsilon();
  const T to_cost = static_cast<T>(eps / kLog2E * x.damping(eps));
  const T damping = static_cast<T>(y.damping(eps));
  std::vector<T> gt(m), q(m), target(y.weight, y.weight + m);
  StepControl control(eps, options.tol, options.n_iters, y.mass, std::min(x.points, y.points));
  for (int64_t it = 0; it < options.n_iters && !interrupted(); ++it) {
    engine.iterate(eps, g, F, gt.data(), q.data());
    if (it + 1 == options.n_iters && !y.hard())
      y.set_target(eps, 0, g, gt.data(), y.soft_mean(g, 1).mean, q.data(), target.data());
    for (int64_t j = 0; j < m; ++j) g[j] = damping * gt[j];
    if (trace) {
      for (int64_t i = 0; i < n; ++i) trace[i] = to_cost * F[i];
      std::copy(g, g + m, trace + n);
      trace += n + m;
    }
    control.count_passes(1);
  }
  if (control.passes() > 0) {
    const double size = x.soft_mean(F, to_cost).magnitude + y.soft_mean(g, 1).magnitude;
    control.observe(
        {0, 4 * roundoff * y.mass * size, marginal_error(m, target.data(), q.data()) / y.mass});
  }
  return outcome_of(control);
}

template Outcome solve_fixed(Engine<float>&, const SolveOptions&, float*, float*, float*);
template Outcome solve_fixed(Engine<double>&, const SolveOptions&, double*, double*, double*);

}  // namespace otloss::cpu
