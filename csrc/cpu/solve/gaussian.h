// A start for the solver: the entropic potential between the Gaussians fitted to two clouds.
#pragma once

#include <cstdint>

#include "core/gaussian_potential.h"

namespace otloss::cpu {

template <typename T>
struct GaussianStart {
  int64_t n, m, d;  // d at most kGaussianDims
  const T* x;       // (n, d) prepared points
  const T* y;       // (m, d)
  const T* a;       // (n,)
  const T* b;       // (m,)
  double eps;       // of the squared euclidean cost |x - y|^2
  T* g;             // (m,) out
};

// Whether it takes less time than this number of sweeps over n m costs.
inline bool gaussian_start_within(double sweeps, int64_t n, int64_t m, int64_t d) {
  const double work = 400.0 * d * d * d + 5.0 * (n + m) * d * d;  // in costs of a sweep
  return d <= kGaussianDims && sweeps * n * m >= work;
}

// Squared euclidean costs only.
template <typename T>
void gaussian_start(const GaussianStart<T>& args);

}  // namespace otloss::cpu
