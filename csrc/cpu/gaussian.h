// A start for the solver: the entropic potential between the Gaussians fitted to two clouds.
#pragma once

#include <cstdint>

namespace otloss::cpu {

constexpr int64_t kGaussianDims = 64;  // the eigenvalue problems stay small

template <typename T>
struct GaussianStart {
  int64_t n, m, d;  // d at most kGaussianDims
  const T* x;       // (n, d) prepared points
  const T* y;       // (m, d)
  const T* a;       // (n,)
  const T* b;       // (m,)
  double eps;       // of the squared euclidean cost |x - y|^2
  T* g;             // (m,) out: the start, or 0 where that is better
};

// Squared euclidean costs only. The start is kept if it raises the dual value on a sample of the
// points; otherwise a quarter of it, otherwise none.
void gaussian_start(const GaussianStart<float>& args);
void gaussian_start(const GaussianStart<double>& args);

}  // namespace otloss::cpu
