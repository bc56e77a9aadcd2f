// Launches solves between densities on a grid.
#include <algorithm>
#include <vector>

#include "core/math.h"
#include "cpu/grid/engine.h"
#include "cpu/parallel.h"
#include "cpu/solve/solver.h"
#include "grid_kernels.h"

namespace otloss::cpu {

void solve_grid(const std::vector<GridGroup>& groups, const SolveOptions& options) {
  for_each_problem(groups, kEndless, [&](const GridGroup& group, int64_t p, bool split) {
    const int64_t N = group.axes.size();
    const double *a = group.a + p * N, eps = options.eps;
    double *f = group.f + p * N, *g = group.g + p * N;
    const std::vector<double> b = column_weights(group.penalties, N, a, N, group.b + p * N);
    grid::Engine engine(Side<double>(N, a, group.penalties.rho_x),
                        Side<double>(N, b.data(), group.penalties.rho_y), group.axes, split);
    // The solvers work on what is damped to give f, the symmetric one on f itself.
    const double to_cost = (group.symmetric ? 1 : engine.x.damping(eps)) * eps / kLog2E;
    std::vector<double> F(N);
    if (options.warm_start)
      for (int64_t i = 0; i < N; ++i) F[i] = f[i] / to_cost;
    else
      std::fill(g, g + N, 0.0);
    const Outcome outcome = group.symmetric ? solve_symmetric(engine, options, F.data())
                                            : solve_pair(engine, options, F.data(), g);
    for (int64_t i = 0; i < N; ++i) f[i] = to_cost * F[i];
    if (group.symmetric) std::copy(f, f + N, g);
    double* status = group.status + p * kStatusFields;
    status[kStatusIterations] = static_cast<double>(outcome.iterations);
    status[kStatusError] = outcome.error;
    status[kStatusConverged] = outcome.converged ? 1.0 : 0.0;
    status[kStatusMaxCost] = engine.max_cost();
    status[kStatusTerm] =
        regularized_value(engine.x, engine.y, eps, group.penalties.balanced, f, g);
  });
}

}  // namespace otloss::cpu
