// Entropic transport between Gaussians N(mx, A), N(my, B) has quadratic potentials. For the cost
// |x - y|^2 / 2 and e the regularisation (Janati, Muzellec, Peyre, Cuturi 2020):
//
//     M = I - A^1/2 ((A^1/2 B A^1/2 + e^2/4 I)^1/2 + e/2 I)^-1 A^1/2
//     g(y) = (y - my)^T M (y - my) / 2 + (y - my)^T (my - mx)
//
// Our cost is |x - y|^2: twice the potential at e = eps / 2.
//
// Work: (n + m) d^2 for the moments, a few d^3 for the square roots; nothing against n m d.
#include "gaussian.h"

#include <algorithm>
#include <cmath>
#include <vector>

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

Matrix product(int64_t d, const Matrix& left, const Matrix& right) {
  Matrix out(d * d);
  for (int64_t i = 0; i < d; ++i)
    for (int64_t k = 0; k < d; ++k)
      for (int64_t j = 0; j < d; ++j) out[i * d + j] += left[i * d + k] * right[k * d + j];
  return out;
}

// Eigenvectors (rows of V) and eigenvalues of a symmetric matrix, by Jacobi rotations.
void eigen(int64_t d, Matrix S, Vector& values, Matrix& V) {
  constexpr int kSweeps = 30;
  V.assign(d * d, 0.0);
  for (int64_t k = 0; k < d; ++k) V[k * d + k] = 1;
  for (int sweep = 0; sweep < kSweeps; ++sweep) {
    double off = 0, size = 0;
    for (int64_t p = 0; p < d; ++p)
      for (int64_t q = 0; q < d; ++q) (p == q ? size : off) += S[p * d + q] * S[p * d + q];
    if (off <= 1e-24 * size) break;
    for (int64_t p = 0; p < d; ++p)
      for (int64_t q = p + 1; q < d; ++q) {
        if (S[p * d + q] == 0) continue;
        const double theta = (S[q * d + q] - S[p * d + p]) / (2 * S[p * d + q]);
        const double t = std::copysign(1.0, theta) / (std::abs(theta) + std::hypot(theta, 1.0));
        const double c = 1 / std::hypot(t, 1.0), s = t * c;
        for (int64_t k = 0; k < d; ++k) {
          const double kp = S[k * d + p], kq = S[k * d + q];
          S[k * d + p] = c * kp - s * kq, S[k * d + q] = s * kp + c * kq;
        }
        for (int64_t k = 0; k < d; ++k) {
          const double pk = S[p * d + k], qk = S[q * d + k];
          S[p * d + k] = c * pk - s * qk, S[q * d + k] = s * pk + c * qk;
          const double vp = V[p * d + k], vq = V[q * d + k];
          V[p * d + k] = c * vp - s * vq, V[q * d + k] = s * vp + c * vq;
        }
      }
  }
  values.resize(d);
  for (int64_t k = 0; k < d; ++k) values[k] = S[k * d + k];
}

// function(S) of a symmetric matrix.
template <typename F>
Matrix apply(int64_t d, const Matrix& S, F&& function) {
  Vector values;
  Matrix V, out(d * d);
  eigen(d, S, values, V);
  for (int64_t k = 0; k < d; ++k) {
    const double value = function(values[k]);
    for (int64_t i = 0; i < d; ++i)
      for (int64_t j = 0; j < d; ++j) out[i * d + j] += value * V[k * d + i] * V[k * d + j];
  }
  return out;
}

// The potential on the points y.
template <typename T>
void potential(const GaussianStart<T>& p) {
  const int64_t d = p.d;
  const double e = p.eps / 2;
  const Moments mx = moments(p.n, d, p.x, p.a), my = moments(p.m, d, p.y, p.b);
  const Matrix root = apply(d, mx.covariance, [](double v) { return std::sqrt(std::max(v, 0.0)); });
  const Matrix inner = product(d, product(d, root, my.covariance), root);
  const Matrix inverse = apply(
      d, inner, [e](double v) { return 1 / (std::sqrt(std::max(v, 0.0) + e * e / 4) + e / 2); });
  Matrix M = product(d, product(d, root, inverse), root);
  for (int64_t k = 0; k < d; ++k)
    for (int64_t l = 0; l < d; ++l) M[k * d + l] = (k == l ? 1.0 : 0.0) - M[k * d + l];
  Vector z(d);
  for (int64_t j = 0; j < p.m; ++j) {
    p.g[j] = 0;
    if (!(p.b[j] > T(0))) continue;
    double g = 0;
    for (int64_t k = 0; k < d; ++k) z[k] = static_cast<double>(p.y[j * d + k]) - my.mean[k];
    for (int64_t k = 0; k < d; ++k) {
      double Mz = 0;
      for (int64_t l = 0; l < d; ++l) Mz += M[k * d + l] * z[l];
      g += z[k] * (Mz + 2 * (my.mean[k] - mx.mean[k]));
    }
    p.g[j] = static_cast<T>(g);
  }
}

}  // namespace

void gaussian_start(const GaussianStart<float>& args) { potential(args); }
void gaussian_start(const GaussianStart<double>& args) { potential(args); }

}  // namespace otloss::cpu
