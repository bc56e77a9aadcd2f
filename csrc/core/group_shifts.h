// The best shifts of groups of columns against each other, for host and device.
//
// Where the plan falls apart into groups that exchange next to nothing, the semidual is nearly flat
// along potentials that are constant on each group, until one is shifted so far that mass moves to
// another. Of such shifts t it is the dual of a small transport problem: row i holds A_i, group K
// of the columns wants B_K, and M_iK = -eps log of the part of A_i that the plan sends to K. The
// shifts are found by Newton's method, and where that leads nowhere, at temperatures that fall from
// the largest M to eps. One thread does it.
#pragma once

#include <cmath>
#include <cstdint>
#include <initializer_list>

#include "core/penalty.h"

namespace otloss {

struct GroupProblem {
  int64_t rows, k;  // k: groups of columns
  const double* M;  // (rows, k) in units of cost
  const double* A;  // (rows,) those of an A of 0 are left out
  const double* B;  // (k,) positive
  Penalty x, y;
  double eps;
};

// z = (t - M) per_h (k,). Returns the largest.
struct RowExponents {
  OTLOSS_HOST_DEVICE double operator()(int64_t k, double per_h, const double* t, const double* M,
                                       double* z) const {
    double largest = z[0] = (t[0] - M[0]) * per_h;
    for (int64_t K = 1; K < k; ++K) largest = std::fmax(largest, z[K] = (t[K] - M[K]) * per_h);
    return largest;
  }
};

// The dual problem of the groups at a temperature h in the place of eps: the value at shifts t, and
// the plan Q there with its marginals r and c; w is what the columns want. Of a row of Q only what
// is not next to nothing is kept, one group as a rule.
template <class Exponents>
struct GroupDual {
  const GroupProblem* p;
  double* t;       // (k,), and after it all other vectors
  int32_t* count;  // (rows,) of the entries of each row, and after it their groups
  double value;

  OTLOSS_HOST_DEVICE static constexpr int64_t numbers(int64_t rows, int64_t k) {
    return rows * (k + 1) + 3 * k;
  }
  OTLOSS_HOST_DEVICE static constexpr int64_t indices(int64_t rows, int64_t k) {
    return rows * (k + 1);
  }
  OTLOSS_HOST_DEVICE double* c() const { return t + p->k; }      // (k,)
  OTLOSS_HOST_DEVICE double* w() const { return t + 2 * p->k; }  // (k,)
  OTLOSS_HOST_DEVICE double* r() const { return t + 3 * p->k; }  // (rows,)
  OTLOSS_HOST_DEVICE double* Q(int64_t i) const { return r() + p->rows + i * p->k; }
  OTLOSS_HOST_DEVICE int32_t* group(int64_t i) const { return count + p->rows + i * p->k; }

  OTLOSS_HOST_DEVICE_CALL void evaluate(double h) {
    // A soft side's potential is damped, which its part of the dual contains.
    const Penalty rows{p->x.rate / (1 + h * p->x.rate)};
    value = 0;
    for (int64_t K = 0; K < p->k; ++K) {
      value += p->B[K] * p->y.dual(t[K]);
      w()[K] = p->B[K] * p->y.share(t[K]);
      c()[K] = 0;
    }
    for (int64_t i = 0; i < p->rows; ++i) {
      count[i] = 0;
      if (!(p->A[i] > 0)) continue;
      const double softmin = -h * set_row(i, 1 / h);
      value += p->A[i] * rows.dual(softmin);
      r()[i] = p->A[i] * rows.share(softmin);
      for (int e = 0; e < count[i]; ++e) c()[group(i)[e]] += Q(i)[e] *= r()[i];
    }
  }

 private:
  // Row i of Q as e^{(t - M) / h} over its sum. Returns the logarithm of the sum.
  OTLOSS_HOST_DEVICE double set_row(int64_t i, double per_h) {
    constexpr double kNothing = -100;  // log of a share
    double* const entry = Q(i);
    const double largest = Exponents()(p->k, per_h, t, p->M + i * p->k, entry);
    double sum = 0;
    for (int64_t K = 0; K < p->k; ++K) {
      const double z = entry[K] - largest;
      if (z < kNothing) continue;
      group(i)[count[i]] = static_cast<int32_t>(K);
      sum += entry[count[i]++] = std::exp(z);
    }
    for (int e = 0; e < count[i]; ++e) entry[e] /= sum;
    return largest + std::log(sum);
  }
};

// Exponents: what makes RowExponents on this machine.
template <class Exponents = RowExponents>
class GroupShifts {
  using Dual = GroupDual<Exponents>;

 public:
  // Of memory for a problem.
  OTLOSS_HOST_DEVICE static constexpr int64_t numbers(int64_t rows, int64_t k) {
    return 2 * Dual::numbers(rows, k) + k * (k + 4);
  }
  OTLOSS_HOST_DEVICE static constexpr int64_t indices(int64_t rows, int64_t k) {
    return 2 * Dual::indices(rows, k);
  }

  OTLOSS_HOST_DEVICE GroupShifts(const GroupProblem& problem, double* numbers, int32_t* indices)
      : p_(problem),
        at_{&problem, numbers, indices, 0},
        next_{&problem, numbers + Dual::numbers(p_.rows, k_), indices + Dual::indices(p_.rows, k_),
              0},
        log_ratio_(next_.t + Dual::numbers(p_.rows, k_)) {}

  // (k,) what to add to the potentials of each group of columns.
  OTLOSS_HOST_DEVICE const double* best() {
    constexpr double kRatio = 0.25;  // of one temperature to the one before
    if (!ascend(p_.eps, true)) {
      double h = largest_range();
      ascend(h, true);
      while (h > p_.eps) {
        h = std::fmax(p_.eps, kRatio * h);
        ascend(h, false);
      }
    }
    if (hard()) centre(p_.B, at_.t);
    return at_.t;
  }

 private:
  OTLOSS_HOST_DEVICE bool hard() const { return p_.x.hard() && p_.y.hard(); }

  OTLOSS_HOST_DEVICE_CALL double dot(const double* x, const double* y) const {
    double sum = 0;
    for (int64_t K = 0; K < k_; ++K) sum += x[K] * y[K];
    return sum;
  }
  OTLOSS_HOST_DEVICE_CALL double largest(const double* v) const {
    double most = 0;
    for (int64_t K = 0; K < k_; ++K) most = std::fmax(most, std::fabs(v[K]));
    return most;
  }
  // v less its mean in the weights w.
  OTLOSS_HOST_DEVICE_CALL void centre(const double* w, double* v) const {
    double total = 0;
    for (int64_t K = 0; K < k_; ++K) total += w[K];
    const double mean = dot(w, v) / total;
    for (int64_t K = 0; K < k_; ++K) v[K] -= mean;
  }

  // The largest difference of M within a row, eps at least.
  OTLOSS_HOST_DEVICE double largest_range() const {
    double range = p_.eps;
    for (int64_t i = 0; i < p_.rows; ++i) {
      if (!(p_.A[i] > 0)) continue;
      const double* const M = p_.M + i * k_;
      double least = M[0], most = M[0];
      for (int64_t K = 1; K < k_; ++K) least = std::fmin(least, M[K]), most = std::fmax(most, M[K]);
      range = std::fmax(range, most - least);
    }
    return range;
  }

  // H x = b, H (k, k) positive definite: by Cholesky's factor, which takes the place of H.
  OTLOSS_HOST_DEVICE void solve_in_place(double* H, double* b) const {
    for (int64_t j = 0; j < k_; ++j)
      for (int64_t i = j; i < k_; ++i) {
        double sum = H[i * k_ + j];
        for (int64_t l = 0; l < j; ++l) sum -= H[i * k_ + l] * H[j * k_ + l];
        H[i * k_ + j] = i == j ? std::sqrt(sum) : sum / H[j * k_ + j];
      }
    for (int64_t i = 0; i < k_; ++i) {
      for (int64_t l = 0; l < i; ++l) b[i] -= H[i * k_ + l] * b[l];
      b[i] /= H[i * k_ + i];
    }
    for (int64_t i = k_; i-- > 0;) {
      for (int64_t l = i + 1; l < k_; ++l) b[i] -= H[l * k_ + i] * b[l];
      b[i] /= H[i * k_ + i];
    }
  }

  // Newton's step on the log residual l = log(w / c):
  // (diag(c + h w / rho_y) - damping_x Q^T diag(1/r) Q) p = h c l, scaled by c^(1/2).
  OTLOSS_HOST_DEVICE void newton_step(double h) {
    constexpr double kLeast = 1e-200, kRidge = 1e-13;
    double *const l = direction(), *const scale = excess() + k_, *const H = scale + k_;
    const double* const c = at_.c();
    double total = 0;
    for (int64_t K = 0; K < k_; ++K) {
      l[K] = log_ratio_[K];
      scale[K] = std::sqrt(std::fmax(c[K], kLeast)), total += c[K];
    }
    if (hard()) centre(c, l);
    for (int64_t e = 0; e < k_ * k_; ++e) H[e] = 0;
    const double damping = p_.x.damping(h);
    for (int64_t i = 0; i < p_.rows; ++i) {
      const double* const Q = at_.Q(i);
      const int32_t* const group = at_.group(i);
      for (int e = 0; e < at_.count[i]; ++e) {
        const double factor = damping / at_.r()[i] * Q[e];
        for (int f = 0; f <= e; ++f) H[group[e] * k_ + group[f]] -= factor * Q[f];
      }
    }
    for (int64_t K = 0; K < k_; ++K) {
      H[K * k_ + K] += c[K] + h * p_.y.rate * at_.w()[K];
      for (int64_t L = 0; L <= K; ++L) {
        H[K * k_ + L] /= scale[K] * scale[L];
        if (hard()) H[K * k_ + L] += scale[K] * scale[L] / total;  // constants, not seen by it
      }
      H[K * k_ + K] += kRidge;
    }
    for (int64_t K = 0; K < k_; ++K) l[K] *= c[K] / scale[K];
    solve_in_place(H, l);
    for (int64_t K = 0; K < k_; ++K) l[K] *= h / scale[K];
  }

  // Whether the dual is higher somewhere along the direction: that is then the point.
  OTLOSS_HOST_DEVICE_CALL bool rise(double h, double slope) {
    constexpr int kTries = 30;
    constexpr double kShrink = 0.3, kSufficient = 1e-4, kRounding = 1e-14;
    double length = 1;
    for (int i = 0; slope > 0 && i < kTries; ++i, length *= kShrink) {
      for (int64_t K = 0; K < k_; ++K) next_.t[K] = at_.t[K] + length * direction()[K];
      next_.evaluate(h);
      const double rounding = kRounding * (std::fabs(at_.value) + h);
      if (!(next_.value >= at_.value + kSufficient * length * slope - rounding)) continue;
      const Dual before = at_;
      at_ = next_, next_ = before;
      return true;
    }
    return false;
  }

  // Raises the dual at temperature h, from 0 or from where it is. False where its top is not
  // reached.
  OTLOSS_HOST_DEVICE_CALL bool ascend(double h, bool from_zero) {
    constexpr int kSteps = 30;
    constexpr double kTolerance = 0.05, kNothing = 1e-300, kNoGain = 1e-6;
    double mass = 0;
    for (int64_t K = 0; K < k_; ++K) mass += p_.B[K], at_.t[K] = from_zero ? 0 : at_.t[K];
    at_.evaluate(h);
    bool raised = true;
    for (int step = 0; raised && step < kSteps; ++step) {
      for (int64_t K = 0; K < k_; ++K) {
        log_ratio_[K] = std::log(at_.w()[K] / std::fmax(at_.c()[K], kNothing));
        excess()[K] = at_.w()[K] - at_.c()[K];
      }
      newton_step(h);
      const double slope = dot(excess(), direction());
      if (largest(log_ratio_) <= kTolerance &&
          (largest(direction()) <= kTolerance * h || std::fabs(slope) <= kNoGain * h * mass))
        return true;
      raised = rise(h, slope);
      if (raised) continue;
      for (int64_t K = 0; K < k_; ++K) direction()[K] = h * log_ratio_[K];  // a plain iteration's
      raised = rise(h, dot(excess(), direction()));
    }
    return false;
  }

  OTLOSS_HOST_DEVICE double* direction() const { return log_ratio_ + k_; }
  OTLOSS_HOST_DEVICE double* excess() const { return log_ratio_ + 2 * k_; }

  const GroupProblem& p_;
  const int64_t k_ = p_.k;
  Dual at_, next_;
  double* const log_ratio_;  // (k,), and after it what else a step needs
};

}  // namespace otloss
