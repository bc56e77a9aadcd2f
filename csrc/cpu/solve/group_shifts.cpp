#include "cpu/solve/group_shifts.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "core/math.h"
#include "cpu/simd/simd.h"
#include "cpu/simd/vectors.h"

namespace otloss::cpu {
namespace {

using Vector = std::vector<double>;

// z = (t - M) per_h. Returns the largest.
OTLOSS_SIMD double exponents(int64_t k, double per_h, const double* t, const double* M, double* z) {
  double largest = std::numeric_limits<double>::lowest();
#pragma omp simd reduction(max : largest)
  for (int64_t K = 0; K < k; ++K) {
    z[K] = (t[K] - M[K]) * per_h;
    largest = z[K] > largest ? z[K] : largest;
  }
  return largest;
}

// The dual problem of the groups at a temperature h in the place of eps: the value at shifts t, and
// the plan Q there with its marginals r and c; w is what the columns want. Of a row of Q only what
// is not next to nothing is kept, one group as a rule.
class Dual {
 public:
  double value = 0;
  Vector t, r, c, w;
  std::vector<int64_t> end;    // (rows,) of each row's entries
  std::vector<int32_t> group;  // (entries,)
  Vector Q;                    // (entries,)

  Dual(const GroupProblem& p, double h, const Vector& t)
      : t(t), r(p.A.size()), c(p.k), w(p.k), end(p.A.size()) {
    // A soft side's potential is damped, which its part of the dual contains.
    const Penalty rows{p.x.rate / (1 + h * p.x.rate)};
    Vector z(p.k);
    for (size_t i = 0; i < r.size(); ++i) {
      end[i] = i > 0 ? end[i - 1] : 0;
      if (!(p.A[i] > 0)) continue;
      const int64_t begin = end[i];
      const double softmin = -h * add_row(p.k, h, t.data(), &p.M[i * p.k], z.data());
      value += p.A[i] * rows.dual(softmin);
      r[i] = p.A[i] * rows.share(softmin);
      end[i] = static_cast<int64_t>(Q.size());
      for (int64_t e = begin; e < end[i]; ++e) c[group[e]] += Q[e] *= r[i];
    }
    for (int64_t K = 0; K < p.k; ++K) {
      value += p.B[K] * p.y.dual(t[K]);
      w[K] = p.B[K] * p.y.share(t[K]);
    }
  }

 private:
  // To Q e^{(t - M) / h} over its sum. Returns the logarithm of the sum.
  double add_row(int64_t k, double h, const double* t, const double* M, double* z) {
    constexpr double kNothing = -100;  // log of a share
    const double largest = exponents(k, 1 / h, t, M, z);
    const size_t begin = Q.size();
    double sum = 0;
    for (int64_t K = 0; K < k; ++K) {
      if (z[K] - largest < kNothing) continue;
      group.push_back(static_cast<int32_t>(K)), Q.push_back(std::exp(z[K] - largest));
      sum += Q.back();
    }
    for (size_t e = begin; e < Q.size(); ++e) Q[e] /= sum;
    return largest + std::log(sum);
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
  const double damping = p.x.damping(h);
  int64_t begin = 0;
  for (size_t i = 0; i < at.r.size(); begin = at.end[i++])
    for (int64_t e = begin; e < at.end[i]; ++e) {
      const double factor = damping / at.r[i] * at.Q[e];
      for (int64_t l = begin; l <= e; ++l) H[at.group[e] * k + at.group[l]] -= factor * at.Q[l];
    }
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

// Whether the dual is higher somewhere along a direction, of this slope: `at` is then there.
bool rise(const GroupProblem& p, double h, const Vector& direction, double slope, Dual& at) {
  constexpr int kTries = 30;
  constexpr double kShrink = 0.3, kSufficient = 1e-4, kRounding = 1e-14;
  Vector trial(p.k);
  double length = 1;
  for (int i = 0; slope > 0 && i < kTries; ++i, length *= kShrink) {
    for (int64_t K = 0; K < p.k; ++K) trial[K] = at.t[K] + length * direction[K];
    Dual next(p, h, trial);
    const double rounding = kRounding * (std::abs(at.value) + h);
    if (!(next.value >= at.value + kSufficient * length * slope - rounding)) continue;
    at = std::move(next);
    return true;
  }
  return false;
}

// Raises the dual at temperature h from t on. False where its top is not reached.
bool ascend(const GroupProblem& p, double h, Vector& t) {
  constexpr int kSteps = 30;
  constexpr double kTolerance = 0.05, kNothing = 1e-300, kNoGain = 1e-6;
  const double mass = std::accumulate(p.B.begin(), p.B.end(), 0.0);
  Dual at(p, h, t);
  bool raised = true, reached = false;
  for (int step = 0; raised && step < kSteps; ++step) {
    Vector l(p.k), excess(p.k);
    for (int64_t K = 0; K < p.k; ++K) {
      l[K] = std::log(at.w[K] / std::max(at.c[K], kNothing));
      excess[K] = at.w[K] - at.c[K];
    }
    Vector direction = newton_step(p, h, at, l);
    const double slope = dot(excess, direction);
    reached = largest(l) <= kTolerance &&
              (largest(direction) <= kTolerance * h || std::abs(slope) <= kNoGain * h * mass);
    if (reached) break;
    raised = rise(p, h, direction, slope, at);
    if (raised) continue;
    for (int64_t K = 0; K < p.k; ++K) direction[K] = h * l[K];  // a plain iteration's
    raised = rise(p, h, direction, dot(excess, direction), at);
  }
  t = std::move(at.t);
  return reached;
}

// The rows that may leave the group `home`, which they send most to: of the way to each other group
// those it is shortest for, until they hold more than `mass`.
void mark_leaving(const GroupProblem& p, int64_t home, const std::vector<int64_t>& rows,
                  double mass, std::vector<uint8_t>& leaving) {
  std::vector<std::pair<double, int64_t>> ways(rows.size());
  for (int64_t K = 0; K < p.k; ++K) {
    if (K == home) continue;
    for (size_t e = 0; e < rows.size(); ++e) {
      const double* M = &p.M[rows[e] * p.k];
      ways[e] = {M[K] - M[home], rows[e]};
    }
    auto end = ways.end();
    std::make_heap(ways.begin(), end, std::greater<>());
    for (double held = 0; held <= mass && end != ways.begin(); held += p.A[end->second]) {
      std::pop_heap(ways.begin(), end--, std::greater<>());
      leaving[end->second] = 1;
    }
  }
}

// The problem with the rows lumped together that stay in their group. Of a group no more leaves
// than columns lack in all, those first that have the shortest way: twice as much may leave.
GroupProblem lump_rows(const GroupProblem& p) {
  constexpr double kSlack = 2;
  const int64_t n = static_cast<int64_t>(p.A.size());
  std::vector<std::vector<int64_t>> at(p.k);  // rows by their group
  for (int64_t i = 0; i < n; ++i) {
    const auto row = p.M.begin() + i * p.k;
    if (p.A[i] > 0) at[std::min_element(row, row + p.k) - row].push_back(i);
  }
  std::vector<uint8_t> leaving(n);
  GroupProblem lumped{p.k, {}, {}, p.B, p.lacking, p.x, p.y, p.eps};
  for (int64_t I = 0; I < p.k; ++I) {
    mark_leaving(p, I, at[I], kSlack * p.lacking, leaving);
    double held = 0;
    std::vector<OnlineLse<double>> sent(p.k);  // log2
    for (const int64_t i : at[I]) {
      const double* M = &p.M[i * p.k];
      if (leaving[i]) {
        lumped.A.push_back(p.A[i]);
        lumped.M.insert(lumped.M.end(), M, M + p.k);
        continue;
      }
      held += p.A[i];
      const double own = std::log2(p.A[i]);
      for (int64_t K = 0; K < p.k; ++K) sent[K].add(own - kLog2E / p.eps * M[K]);
    }
    if (!(held > 0)) continue;
    lumped.A.push_back(held);
    for (const auto& sum : sent)
      lumped.M.push_back(p.eps / kLog2E * (std::log2(held) - sum.value()));
  }
  return lumped;
}

// At temperatures that fall to eps.
Vector anneal(const GroupProblem& p) {
  constexpr double kRatio = 0.25;  // of one temperature to the one before
  double h = p.eps;
  for (size_t i = 0; i < p.A.size(); ++i) {
    if (!(p.A[i] > 0)) continue;
    const auto row = p.M.begin() + static_cast<int64_t>(i) * p.k;
    const auto [least, most] = std::minmax_element(row, row + p.k);
    h = std::max(h, *most - *least);
  }
  Vector t(p.k);
  ascend(p, h, t);
  while (h > p.eps) ascend(p, h = std::max(p.eps, kRatio * h), t);
  return t;
}

}  // namespace

std::vector<double> best_shifts(const GroupProblem& p) {
  const GroupProblem lumped = lump_rows(p);
  Vector t(p.k);
  if (!ascend(lumped, p.eps, t)) t = anneal(lumped);
  if (p.x.hard() && p.y.hard()) centre(p.B, t);
  return t;
}

}  // namespace otloss::cpu
