// Small clouds for the engine of streamed costs, and all that the solver knows to do with it.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/multiscale/cloud.h"
#include "cpu/simd/sweep.h"
#include "kernels.h"

namespace otloss::cpu::multiscale {

// Of the first n and m points.
struct AllPairs {
  SolveGroup<double> group{};
  std::vector<double> norm_x, norm_y;
  Side<double> x, y;

  AllPairs(const Cloud& X, const Cloud& Y, int64_t n, int64_t m, const Penalties& penalties)
      : norm_x(norms(X, n)),
        norm_y(norms(Y, m)),
        x(n, X.w.data(), penalties.rho_x),
        y(m, Y.w.data(), penalties.rho_y) {
    group.batch = 1, group.n = n, group.m = m, group.symmetric = &X == &Y;
    group.points = {CostKind::kSqEuclidean, X.d,          X.X.data(), Y.X.data(),
                    norm_x.data(),          norm_y.data()};
  }

  static std::vector<double> norms(const Cloud& cloud, int64_t count) {
    std::vector<double> norm(count);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < cloud.d; ++c) norm[i] += std::pow(cloud.X[i * cloud.d + c], 2);
    return norm;
  }
};

}  // namespace otloss::cpu::multiscale
