// The solver: which potentials to try next. It sees the problem only through an Engine, and takes
// its decisions by StepControl (core/step_control.h).
//
// Method (docs/solver.md): Sinkhorn's iteration is a fixed-point map g -> gt whose residual
// r = gt - g is the semidual's gradient, preconditioned. L-BFGS on r in the inner product weighted
// by the target marginal (b, or b e^{-g/rho}) needs a fraction of the passes, and falls back to the
// plain iteration, which always ascends. Where that is slow and the plan has few large entries,
// Newton's step takes the place of its first guess (sparse_newton.h).
#pragma once

#include <limits>

#include "cpu/engines/engine.h"
#include "kernels.h"

namespace otloss::cpu {

struct Outcome {
  int64_t iterations = 0;
  double error = std::numeric_limits<double>::quiet_NaN();
  bool converged = false;
};

inline Outcome outcome_of(const StepControl& control) {
  return {control.passes(), control.stop().final_error(), control.stop().reached()};
}

// A general pair. F (n,) and g (m,) in: start (warm_start), out: solution.
template <typename E, typename T = typename E::Value>
Outcome solve_pair(E& engine, const SolveOptions& options, T* F, T* g);

// A cloud against itself, one potential.
template <typename E, typename T = typename E::Value>
Outcome solve_symmetric(E& engine, const SolveOptions& options, T* F);

// The value at potentials f and g: of the dual where the objective is regularized.
template <typename T>
double regularized_value(const Side<T>& x, const Side<T>& y, double eps, bool balanced, const T* f,
                         const T* g);
template <typename E, typename T = typename E::Value>
double value_of(E& engine, const SolveOptions& options, bool balanced, const T* f, const T* g);

// Exactly options.n_iters iterations, f then g, from the potentials given, at one eps: what papers
// write as "L iterations". trace (L, n + m) out: f and g after each, or null.
template <typename T>
Outcome solve_fixed(Engine<T>& engine, const SolveOptions& options, T* F, T* g, T* trace);

}  // namespace otloss::cpu
