// A start for the solver from the moments of the clouds, see gaussian_potential.h.
//
// Work: (n + m) d^2 for the moments, a few d^3 for the matrices; nothing against n m d.
#include "cpu/solve/gaussian.h"

#include <vector>

#include "core/gaussian_potential.h"

namespace otloss::cpu {
namespace {

using Vector = std::vector<double>;
using Matrix = std::vector<double>;  // (d, d)

struct Moments {
  Vector mean;
  Matrix covariance;
};

template <typename T>
Moments moments(int64_t count, int64_t d, const T* x, const T* weight) {
  Moments result{Vector(d), Matrix(d * d)};
  double mass = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double w = static_cast<double>(weight[i]);
    mass += w;
    for (int64_t k = 0; k < d; ++k) result.mean[k] += w * static_cast<double>(x[i * d + k]);
  }
  for (double& value : result.mean) value /= mass;
  Vector z(d);
  for (int64_t i = 0; i < count; ++i) {
    const double w = static_cast<double>(weight[i]) / mass;
    if (!(w > 0)) continue;
    for (int64_t k = 0; k < d; ++k) z[k] = static_cast<double>(x[i * d + k]) - result.mean[k];
    for (int64_t k = 0; k < d; ++k)
      for (int64_t l = 0; l < d; ++l) result.covariance[k * d + l] += w * z[k] * z[l];
  }
  return result;
}

struct OneThread {
  template <typename F>
  void each(int count, F&& function) {
    for (int i = 0; i < count; ++i) function(i);
  }
};

}  // namespace

template <typename T>
bool gaussian_start(double sweeps, const GaussianStart<T>& p) {
  const double work = (400.0 * p.d + 5.0 * (p.n + p.m)) * p.d * p.d;  // in costs of a sweep
  if (p.d > kGaussianDims || sweeps * p.n * p.m < work) return false;
  const int d = static_cast<int>(p.d);
  Moments x = moments(p.n, p.d, p.x, p.a), y = moments(p.m, p.d, p.y, p.b);
  Matrix L(p.d * p.d), V(p.d * p.d);
  Vector scratch(3 * kGaussianDims), shift(p.d), z(p.d);
  OneThread threads;
  gaussian_matrix(
      threads, d, p.eps,
      GaussianWork{x.covariance.data(), y.covariance.data(), L.data(), V.data(), scratch.data()});
  for (int k = 0; k < d; ++k) shift[k] = y.mean[k] - x.mean[k];
  for (int64_t j = 0; j < p.m; ++j) {
    double g = 0;
    for (int k = 0; k < d; ++k) z[k] = static_cast<double>(p.y[j * p.d + k]) - y.mean[k];
    for (int k = 0; k < d; ++k)
      g += gaussian_term(d, y.covariance.data(), shift.data(), k, [&](int l) { return z[l]; });
    p.g[j] = p.b[j] > T(0) ? static_cast<T>(g) : T(0);
  }
  return true;
}

template bool gaussian_start(double, const GaussianStart<float>&);
template bool gaussian_start(double, const GaussianStart<double>&);

}  // namespace otloss::cpu
