// A start for the solver: the entropic potential between the Gaussians fitted to two clouds.
#pragma once

#include <cstdint>

namespace otloss::cpu {

template <typename T>
struct GaussianStart {
  int64_t n, m, d;
  const T* x;  // (n, d) prepared points
  const T* y;  // (m, d)
  const T* a;  // (n,)
  const T* b;  // (m,)
  double eps;  // of the squared euclidean cost |x - y|^2
  T* g;        // (m,) out
};

// Squared euclidean costs only. False where it takes more time than this number of sweeps over n m
// costs.
template <typename T>
bool gaussian_start(double sweeps, const GaussianStart<T>& args);

}  // namespace otloss::cpu
