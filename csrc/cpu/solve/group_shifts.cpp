#include "cpu/solve/group_shifts.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/simd/simd.h"
#include "cpu/simd/vectors.h"

namespace otloss::cpu {
namespace {

using Vector = std::vector<double>;

// q = e^{(t - M) / h} over its sum, down to the least double. Returns the logarithm of the sum.
double softmax(int64_t k, double h, const double* t, const double* M, double* q) {
  double largest = -std::numeric_limits<double>::infinity(), sum = 0;
  for (int64_t K = 0; K < k; ++K) largest = std::max(largest, q[K] = (t[K] - M[K]) / h);
  for (int64_t K = 0; K < k; ++K) sum += q[K] = std::exp(q[K] - largest);
  for (int64_t K = 0; K < k; ++K) q[K] /= sum;
  return largest + std::log(sum);
}

// H (k, k) += factor q q^T, below the diagonal and on it.
OTLOSS_SIMD void add_square(int64_t k, double factor, const double* q, double* H) {
  for (int64_t K = 0; K < k; ++K) {
    const double scaled = factor * q[K];
#pragma omp simd
    for (int64_t L = 0; L <= K; ++L) H[K * k + L] += scaled * q[L];
  }
}

// The dual problem of the groups at a temperature h in the place of eps: the value at shifts t, and
// the plan Q (k, k) with its marginals r and c there; w is what the columns want.
class Dual {
 public:
  double value = 0;
  Vector t, Q, r, c, w;

  Dual(const GroupProblem& p, double h, const Vector& t)
      : t(t), Q(p.k * p.k), r(p.k), c(p.k), w(p.k) {
    // A soft side's potential is damped, which its part of the dual contains.
    const Penalty rows{p.x.rate / (1 + h * p.x.rate)};
    for (int64_t I = 0; I < p.k; ++I) {
      if (!(p.A[I] > 0)) continue;
      double* q = &Q[I * p.k];
      const double softmin = -h * softmax(p.k, h, t.data(), &p.M[I * p.k], q);
      value += p.A[I] * rows.dual(softmin);
      r[I] = p.A[I] * rows.share(softmin);
      for (int64_t K = 0; K < p.k; ++K) c[K] += q[K] *= r[I];
    }
    for (int64_t K = 0; K < p.k; ++K) {
      value += p.B[K] * p.y.dual(t[K]);
      w[K] = p.B[K] * p.y.share(t[K]);
    }
  }
};

double dot(const Vector& x, const Vector& y) {
  return cpu::dot(static_cast<int64_t>(x.size()), x.data(), y.data());
}

// v less its mean in the weights w.
void centre(const Vector& w, Vector& v) {
  double total = 0;
  for (const double weight : w) total += weight;
  const double mean = dot(w, v) / total;
  for (double& value : v) value -= mean;
}

// H x = b, H (k, k) positive definite: by Cholesky's factor, which takes the place of H.
void solve_in_place(int64_t k, Vector& H, Vector& b) {
  for (int64_t j = 0; j < k; ++j)
    for (int64_t i = j; i < k; ++i) {
      double sum = H[i * k + j];
      for (int64_t l = 0; l < j; ++l) sum -= H[i * k + l] * H[j * k + l];
      H[i * k + j] = i == j ? std::sqrt(sum) : sum / H[j * k + j];
    }
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t l = 0; l < i; ++l) b[i] -= H[i * k + l] * b[l];
    b[i] /= H[i * k + i];
  }
  for (int64_t i = k; i-- > 0;) {
    for (int64_t l = i + 1; l < k; ++l) b[i] -= H[l * k + i] * b[l];
    b[i] /= H[i * k + i];
  }
}

// Newton's step on the log residual l = log(w / c):
// (diag(c + h w / rho_y) - damping_x Q^T diag(1/r) Q) p = h c l, scaled by c^(1/2).
Vector newton_step(const GroupProblem& p, double h, const Dual& at, Vector l) {
  constexpr double kLeast = 1e-200, kRidge = 1e-13;
  const int64_t k = p.k;
  const bool hard = p.x.hard() && p.y.hard();
  if (hard) centre(at.c, l);
  double total = 0;
  Vector scale(k), H(k * k);
  for (int64_t K = 0; K < k; ++K) scale[K] = std::sqrt(std::max(at.c[K], kLeast)), total += at.c[K];
  for (int64_t I = 0; I < k; ++I)
    if (at.r[I] > 0) add_square(k, -p.x.damping(h) / at.r[I], &at.Q[I * k], H.data());
  for (int64_t K = 0; K < k; ++K) {
    H[K * k + K] += at.c[K] + h * p.y.rate * at.w[K];
    for (int64_t L = 0; L <= K; ++L) {
      H[K * k + L] /= scale[K] * scale[L];
      if (hard) H[K * k + L] += scale[K] * scale[L] / total;  // constants, which it does not see
    }
    H[K * k + K] += kRidge;
  }
  for (int64_t K = 0; K < k; ++K) l[K] *= at.c[K] / scale[K];
  solve_in_place(k, H, l);
  for (int64_t K = 0; K < k; ++K) l[K] *= h / scale[K];
  return l;
}

double largest(const Vector& v) {
  double most = 0;
  for (const double value : v) most = std::max(most, std::abs(value));
  return most;
}

// Raises the dual at temperature h.
Vector ascend(const GroupProblem& p, double h, const Vector& start) {
  constexpr int kSteps = 30, kTries = 30;
  constexpr double kTolerance = 0.05, kShrink = 0.3, kSufficient = 1e-4, kRounding = 1e-14;
  constexpr double kNothing = 1e-300;
  Dual at(p, h, start);
  for (int step = 0; step < kSteps; ++step) {
    Vector l(p.k), excess(p.k), trial(p.k);
    for (int64_t K = 0; K < p.k; ++K) {
      l[K] = std::log(at.w[K] / std::max(at.c[K], kNothing));
      excess[K] = at.w[K] - at.c[K];
    }
    Vector direction = newton_step(p, h, at, l);
    double slope = dot(excess, direction);
    if (largest(l) <= kTolerance && largest(direction) <= kTolerance * h) break;
    if (!(slope > 0)) {
      for (int64_t K = 0; K < p.k; ++K) direction[K] = h * l[K];
      slope = dot(excess, direction);
    }
    double length = 1;
    bool raised = false;
    for (int i = 0; i < kTries && !raised; ++i, length *= kShrink) {
      for (int64_t K = 0; K < p.k; ++K) trial[K] = at.t[K] + length * direction[K];
      Dual next(p, h, trial);
      raised = next.value >=
               at.value + kSufficient * length * slope - kRounding * (std::abs(at.value) + h);
      if (raised) at = std::move(next);
    }
    if (!raised) break;
  }
  return at.t;
}

}  // namespace

std::vector<double> best_shifts(const GroupProblem& p) {
  constexpr double kRatio = 0.25;  // of one temperature to the one before
  double h = p.eps;
  for (int64_t I = 0; I < p.k; ++I) {
    const auto row = p.M.begin() + I * p.k;
    if (!(p.A[I] > 0)) continue;
    const auto [least, most] = std::minmax_element(row, row + p.k);
    h = std::max(h, *most - *least);
  }
  Vector t = ascend(p, h, Vector(p.k));
  while (h > p.eps) t = ascend(p, h = std::max(p.eps, kRatio * h), t);
  if (p.x.hard() && p.y.hard()) centre(p.B, t);
  return t;
}

}  // namespace otloss::cpu
