// Newton's step for the solver, from the plan summed over groups of neighbouring points.
//
// With P the plan, r, c its row and column sums, the step that takes the residual to 0 solves
//     (diag(c) - coupling P^T diag(1/r) P) p = c residual
// (see solve/sparse_newton.h). Here P, r and c are those of groups of either side, summed as passes
// go, and p replaces the residual's mean over each group: right where the potentials' error is
// smooth at the scale of a group, a plain iteration where it is not. diag(c) is multiplied by
// 1 + 0.1 error, which fades as the error does (Levenberg, Marquardt).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/engines/engine.h"
#include "cpu/multiscale/engine.h"
#include "cpu/solve/conjugate_gradients.h"

namespace otloss::cpu::multiscale {

class GroupNewton {
 public:
  explicit GroupNewton(Engine& engine) : engine_(engine) { engine.want_groups(); }

  // As SparseNewton. The last pass was that of the point.
  void reset() {}
  bool prepare(double eps, const double* F, const SemidualPoint<double>& point, int64_t sweeps,
               int64_t& readings);
  void step(double error, std::vector<double>& p);

 private:
  // Adds to `out` what function(sums, row group, begin, end, out) does for the runs of each row
  // group, a worker's in one task.
  template <typename F>
  void add_rows(Vector& out, F&& function);

  Engine& engine_;
  double coupling_ = 1;
  std::vector<Vector> parts_;
};

}  // namespace otloss::cpu::multiscale
