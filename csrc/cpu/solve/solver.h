// The solver: which potentials to try next. It sees the problem only through an Engine, which reads
// the cost (stored or recomputed) once per pass:
//
//     int64_t n, m;  const T *a, *b;  Side x, y;       sizes, weights, strength of the marginals
//     void iterate(eps, g, F, gt, q)                   one pass: F = softmin over rows of g (F is
//                                                      also the guess on entry), gt = softmin over
//                                                      columns of f, q = column sums of the plan
//                                                      (f, g) over b; f = damping F
//     void update_rows(eps, g, F, s)                   rows only; s = row sums before, over a
//     double sigma()                                   how varied the cost is
//     bool propose(sweeps, eps, g)                     where to begin better than at 0
//     bool find_large(...), entry_values(...)          large entries of the plan (sparse_newton.h)
//
// F is in units of 1 / k, k = log2(e) / eps; g and gt are in units of cost. The updates are the
// softmins times x.damping and y.damping, which are 1 unless a marginal is soft.
//
// Method (docs/solver.md): Sinkhorn's iteration is a fixed-point map g -> gt whose residual
// r = gt - g is the semidual's gradient, preconditioned. L-BFGS on r in the inner product weighted
// by the column sums asked for (b, or b e^{-g/rho}) needs a fraction of the passes, and falls back
// to the plain iteration, which always ascends. Where that is slow and the plan has few large
// entries, Newton's step takes the place of its first guess (sparse_newton.h).
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/lbfgs.h"
#include "core/math.h"
#include "cpu/parallel.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"
#include "cpu/solve/sparse_newton.h"
#include "kernels.h"

namespace otloss::cpu {

struct Outcome {
  int64_t iterations = 0;
  double error = std::numeric_limits<double>::quiet_NaN();
  bool converged = false;
};

template <typename T>
double total(int64_t count, const T* w) {
  double sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(w[i]);
  return sum;
}

// b scaled to the total of a. Weights that were normalised in a lower precision differ by rounding,
// and the marginal error could not fall below that.
template <typename T>
std::vector<T> with_mass_of(int64_t n, const T* a, int64_t m, const T* b) {
  const double ratio = total(n, a) / total(m, b);
  std::vector<T> scaled(b, b + m);
  for (T& weight : scaled) weight = static_cast<T>(static_cast<double>(weight) * ratio);
  return scaled;
}

// The weights b that a problem is solved with.
template <typename T>
std::vector<T> column_weights(const Strength& strength, int64_t n, const T* a, int64_t m,
                              const T* b) {
  return strength.balanced ? with_mass_of(n, a, m, b) : std::vector<T>(b, b + m);
}

// ----------------------------------------------------------------- exactly n_iters iterations

// f then g, from the potentials given, at one eps: what papers write as "L iterations".
template <typename T, typename Engine>
Outcome solve_fixed(Engine& engine, const SolveOptions& options, T* F, T* g, T* trace) {
  const int64_t n = engine.n, m = engine.m;
  const double eps = options.eps;
  const T to_cost = static_cast<T>(eps / kLog2E * engine.x.damping(eps));
  const T damping = static_cast<T>(engine.y.damping(eps));
  std::vector<T> gt(m), q(m), asked(engine.b, engine.b + m);
  Outcome outcome;
  for (int64_t it = 0; it < options.n_iters && !interrupted(); ++it) {
    engine.iterate(eps, g, F, gt.data(), q.data());
    if (it + 1 == options.n_iters && !engine.y.hard())
      engine.y.ask(eps, 0, g, gt.data(), engine.y.soft_mean(g, 1).mean, q.data(), asked.data());
    for (int64_t j = 0; j < m; ++j) g[j] = damping * gt[j];
    if (trace) {
      for (int64_t i = 0; i < n; ++i) trace[i] = to_cost * F[i];
      std::copy(g, g + m, trace + n);
      trace += n + m;
    }
    ++outcome.iterations;
  }
  outcome.error = marginal_error(m, asked.data(), q.data()) / engine.y.mass;
  outcome.converged = outcome.error <= options.tol;
  return outcome;
}

// -------------------------------------------------------------------- a cloud against itself

// One potential, f <- f + 2/3 (T(f) - f) from T(0) - <a, T(0)> / 2: the error contracts by 1/3 or
// more per pass whatever eps. Returns the mean of f and T(f), which is a further step towards the
// solution and makes 2 <a, f> the semidual value <a, f> + <a, T(f)>, exact to second order.
// With damping p, T becomes p T, 2/3 becomes 2 / (2 + p), the contraction p / (2 + p), and the two
// halves, of the start and of the mean, p / (1 + p) and 1 / (1 + p): what takes constants and first
// order errors of the value to 0.
template <typename T, typename Engine>
Outcome solve_symmetric(Engine& engine, const SolveOptions& options, T* F) {
  const int64_t n = engine.n;
  const double damping = engine.x.damping(options.eps), mass = engine.x.mass;
  const T to_cost = static_cast<T>(damping * options.eps / kLog2E);
  const T to_base2 = static_cast<T>(kLog2E / options.eps);
  const T step = static_cast<T>(2 / (2 + damping)), last = static_cast<T>(1 / (1 + damping));
  const T undamped = static_cast<T>(options.eps / kLog2E);
  std::vector<T> f(n), s(n), softmin(n), asked(engine.a, engine.a + n);
  Outcome outcome;
  if (options.warm_start) {
    for (int64_t i = 0; i < n; ++i) f[i] = F[i] / to_base2;
  } else {
    engine.update_rows(options.eps, f.data(), F, s.data());
    ++outcome.iterations;
    const double half_mean = damping / (1 + damping) * dot(n, engine.a, F) / mass;
    for (int64_t i = 0; i < n; ++i)
      f[i] = engine.a[i] > 0 ? to_cost * static_cast<T>(F[i] - half_mean) : T(0);
  }
  while (true) {
    for (int64_t i = 0; i < n; ++i) F[i] = to_base2 * f[i];
    engine.update_rows(options.eps, f.data(), F, s.data());
    ++outcome.iterations;
    if (!engine.x.hard()) {
      for (int64_t i = 0; i < n; ++i) softmin[i] = undamped * F[i];
      engine.x.ask(options.eps, 0, f.data(), softmin.data(), engine.x.soft_mean(f.data(), 1).mean,
                   s.data(), asked.data());
    }
    outcome.error = marginal_error(n, asked.data(), s.data()) / mass;
    outcome.converged = outcome.error <= options.tol;
    if (outcome.converged || outcome.iterations >= options.max_iters || interrupted()) break;
    for (int64_t i = 0; i < n; ++i) f[i] += step * (to_cost * F[i] - f[i]);
  }
  for (int64_t i = 0; i < n; ++i) F[i] = to_base2 * (f[i] + last * (to_cost * F[i] - f[i]));
  return outcome;
}

// ------------------------------------------------------------------------------- general pairs

// The last few steps and residual changes, and the product of the inverse Hessian they imply.
template <typename T>
class LbfgsMemory {
 public:
  LbfgsMemory(int64_t size, const T* weight) : size_(size), weight_(weight) {}

  void clear() { pairs_.clear(); }

  // From here on the inner product is that of `weight`; pairs of no curvature in it are dropped.
  void weigh(const T* weight) {
    weight_ = weight;
    std::vector<Pair> old;
    std::swap(old, pairs_);
    for (Pair& pair : old) push(std::move(pair.step), std::move(pair.change));
  }

  // step = change of g, change = old residual - new residual.
  void push(std::vector<T> step, std::vector<T> change) {
    const double sy = inner(step, change), ss = inner(step, step), yy = inner(change, change);
    if (!is_curved(sy, ss, yy)) return;
    if (pairs_.size() == kMemory) pairs_.erase(pairs_.begin());
    pairs_.push_back({std::move(step), std::move(change), sy, sy / yy});
  }

  // Two-loop recursion. Between the loops `precondition`, the initial inverse Hessian, is applied
  // if there is one, else the scale of the last pair.
  template <typename Precondition>
  std::vector<T> direction(const std::vector<T>& residual, const Precondition* precondition) const {
    std::vector<T> p = residual;
    std::vector<double> alpha(pairs_.size());
    for (size_t i = pairs_.size(); i-- > 0;) {
      alpha[i] = inner(pairs_[i].step, p) / pairs_[i].sy;
      add(p, -alpha[i], pairs_[i].change);
    }
    if (precondition)
      (*precondition)(p);
    else if (!pairs_.empty())
      for (T& value : p) value *= static_cast<T>(pairs_.back().scale);
    for (size_t i = 0; i < pairs_.size(); ++i)
      add(p, alpha[i] - inner(pairs_[i].change, p) / pairs_[i].sy, pairs_[i].step);
    return p;
  }

 private:
  static constexpr size_t kMemory = 8;
  struct Pair {
    std::vector<T> step, change;
    double sy, scale;
  };

  double inner(const std::vector<T>& x, const std::vector<T>& y) const {
    return dot(size_, weight_, x.data(), y.data());
  }
  void add(std::vector<T>& x, double factor, const std::vector<T>& y) const {
    const T scale = static_cast<T>(factor);
    for (int64_t j = 0; j < size_; ++j) x[j] += scale * y[j];
  }

  int64_t size_;
  const T* weight_;
  std::vector<Pair> pairs_;
};

// A point of the semidual and what one pass tells about it.
template <typename T>
struct SemidualPoint {
  std::vector<T> g, gt, q;  // q: the plan's column sums over those asked for
  std::vector<T> asked;     // the column sums asked for, scaled to the total of b
  double value = 0;         // <a, f> + <b, g>; see settle() where a side is soft
  double noise = 0;         // rounding error of `value`
  double error = 0;         // L1 marginal error over the total mass

  explicit SemidualPoint(int64_t m, const T* b) : g(m), gt(m), q(m), asked(b, b + m) {}
};

// Where a side is soft: the best translation (F + t, g - t) of a point that was passed over, taken
// at once, and what it makes of the point. Softmins are only shifted by it, so that the pass holds
// good, and the plan's total becomes the M that both potentials ask for. Without it a large rho
// would take some rho / eps passes to find M (Séjourné, Vialard, Peyré 2022).
template <typename T, typename Engine>
void settle(const Engine& engine, double eps, T* F, SemidualPoint<T>& point) {
  const Side<T>&x = engine.x, &y = engine.y;
  const double damping = x.damping(eps), to_cost = eps / kLog2E;
  const Translation best(x, y, x.mass, y.mass, eps,
                         static_cast<double>(std::numeric_limits<T>::epsilon()),
                         x.soft_mean(F, damping * to_cost), y.soft_mean(point.g.data(), 1));
  const T on_F = static_cast<T>(best.t / to_cost), on_g = static_cast<T>(best.t);
  const T on_gt = static_cast<T>(damping * best.t), damp = static_cast<T>(y.damping(eps));
  for (int64_t i = 0; i < engine.n; ++i) F[i] += engine.a[i] > T(0) ? on_F : T(0);
  for (int64_t j = 0; j < engine.m; ++j) {
    point.g[j] -= engine.b[j] > T(0) ? on_g : T(0);
    point.gt[j] -= engine.b[j] > T(0) ? on_gt : T(0);
  }
  y.ask(eps, -kLog2E * x.rate * damping * best.t, point.g.data(), point.gt.data(), best.mean_g,
        point.q.data(), point.asked.data());
  for (T& value : point.gt) value *= damp;
  point.value = best.value;
  point.noise = best.noise;
}

template <typename T, typename Engine>
void evaluate(Engine& engine, double eps, T* F, SemidualPoint<T>& point) {
  engine.iterate(eps, point.g.data(), F, point.gt.data(), point.q.data());
  const Side<T>&x = engine.x, &y = engine.y;
  if (x.hard() && y.hard()) {
    const SoftMean f = x.soft_mean(F, eps / kLog2E), g = y.soft_mean(point.g.data(), 1);
    point.value = x.mass * f.mean + y.mass * g.mean;
    point.noise = 4 * static_cast<double>(std::numeric_limits<T>::epsilon()) *
                  (x.mass * f.magnitude + y.mass * g.magnitude);
  } else {
    settle(engine, eps, F, point);
  }
  point.error = marginal_error(engine.m, point.asked.data(), point.q.data()) / y.mass;
}

// Residual gt - g without its mean, which the semidual does not see.
template <typename T, typename Engine>
std::vector<T> residual(const Engine& engine, const SemidualPoint<T>& point) {
  std::vector<T> r(engine.m);
  for (int64_t j = 0; j < engine.m; ++j) r[j] = point.gt[j] - point.g[j];
  const T mean = static_cast<T>(dot(engine.m, point.asked.data(), r.data()) / engine.y.mass);
  for (int64_t j = 0; j < engine.m; ++j) r[j] = engine.b[j] > T(0) ? r[j] - mean : T(0);
  return r;
}

// Ascends the semidual at one eps until the error is at most `tol`. On entry `point` is evaluated.
template <typename T, typename Engine>
void ascend(Engine& engine, double eps, double tol, int64_t max_iters, T* F,
            SemidualPoint<T>& point, SparseNewton<T, Engine>& newton, int64_t& iterations) {
  const int64_t m = engine.m;
  const int64_t begun = iterations - 1;  // with the pass over `point`
  newton.reset();
  LbfgsMemory<T> memory(m, point.asked.data());
  SemidualPoint<T> trial(m, engine.b);
  std::vector<T> r = residual(engine, point), excess(m);
  StepLength length;
  const auto squared = [&](const std::vector<T>& v) {
    return dot(m, point.asked.data(), v.data(), v.data());
  };
  const auto newton_step = [&](std::vector<T>& v) { newton.step(point.error, v); };
  while (point.error > tol && iterations < max_iters && !interrupted()) {
    const bool by_newton =
        iterations + 2 < max_iters && newton.prepare(eps, F, point, iterations - begun, iterations);
    std::vector<T> p = memory.direction(r, by_newton ? &newton_step : nullptr);
    for (int64_t j = 0; j < m; ++j)
      if (!takes_part(static_cast<double>(point.asked[j]), engine.y.mass)) p[j] = r[j];
    for (int64_t j = 0; j < m; ++j) excess[j] = T(1) - point.q[j];
    const auto slope_along = [&](const std::vector<T>& v) {  // <b - P^T 1, v>
      return dot(m, point.asked.data(), excess.data(), v.data());
    };
    double slope = slope_along(p);
    if (!(slope > 0)) {
      memory.clear();
      p = r;
      slope = slope_along(p);
    }
    bool accepted = false;
    double t = length.first(squared(p));
    // The last pass that is allowed is a plain iteration.
    for (int attempt = 0; attempt < kTries && iterations + 1 < max_iters && !accepted; ++attempt) {
      for (int64_t j = 0; j < m; ++j) trial.g[j] = point.g[j] + static_cast<T>(t) * p[j];
      evaluate(engine, eps, F, trial);
      ++iterations;
      accepted = ascends(trial.value, point.value, t * slope, point.noise);
      t *= kShrink;
    }
    if (!accepted) {
      memory.clear();
      trial.g = point.gt;
      evaluate(engine, eps, F, trial);
      ++iterations;
    }
    std::vector<T> next = residual(engine, trial);
    if (accepted) {
      std::vector<T> step(m), change(m);
      for (int64_t j = 0; j < m; ++j) {
        step[j] = engine.b[j] > T(0) ? trial.g[j] - point.g[j] : T(0);
        change[j] = r[j] - next[j];
      }
      const double changed = squared(change);
      const double roundoff = static_cast<double>(std::numeric_limits<T>::epsilon());
      length.accepted(squared(step), changed, squared(r));
      if (changed > least_change(point.noise, engine.y.mass, roundoff, eps))
        memory.push(std::move(step), std::move(change));
    } else {
      length.plain(squared(r));
    }
    r = std::move(next);
    std::swap(point, trial);
    if (!engine.y.hard()) memory.weigh(point.asked.data());
  }
}

template <typename T>
bool is_near(double eps, const SemidualPoint<T>& point) {
  double residual = 0;
  for (size_t j = 0; j < point.g.size(); ++j)
    residual = std::max(residual, static_cast<double>(std::abs(point.gt[j] - point.g[j])));
  return otloss::is_near(point.error, residual, eps);
}

// Evaluates where to begin, at `point`; returns the passes that took. A proposal that costs next to
// nothing comes first and 0 second, another the other way round; the second is only tried if the
// iterations cannot start at the first, and the one of the higher dual value is kept.
template <typename T, typename Engine>
int64_t begin(Engine& engine, const SolveOptions& options, T* F, SemidualPoint<T>& point) {
  constexpr double kCheapSweeps = 1,
                   kWorthSweeps = 10;  // what a good start saves, at least and at most
  const double eps = options.eps;
  const bool cheap = !options.warm_start && engine.propose(kCheapSweeps, eps, point.g.data());
  evaluate(engine, eps, F, point);
  if (options.warm_start || options.max_iters <= 2 || is_near(eps, point)) return 1;
  SemidualPoint<T> other(engine.m, engine.b);
  if (!cheap && !engine.propose(kWorthSweeps, eps, other.g.data())) return 1;
  std::vector<T> other_F(engine.n);
  evaluate(engine, eps, other_F.data(), other);
  if (other.value > point.value) {
    std::swap(point, other);
    std::copy(other_F.begin(), other_F.end(), F);
  }
  return 2;
}

template <typename T, typename Engine>
Outcome solve_pair(Engine& engine, const SolveOptions& options, T* F, T* g) {
  const int64_t n = engine.n, m = engine.m;
  Outcome outcome;
  SemidualPoint<T> point(m, engine.b);
  std::copy(g, g + m, point.g.begin());
  outcome.iterations = begin(engine, options, F, point);
  const Stages stages = is_near(options.eps, point) ? Stages{0, options.eps, options.eps}
                                                    : make_stages(options.eps, engine.sigma());
  SparseNewton<T, Engine> newton(engine);
  double at = options.eps;
  for (int stage = 0; stage <= stages.count; ++stage) {
    const double eps = stages.at(stage);
    const bool last = stage == stages.count;
    const int64_t max_iters = last ? options.max_iters : options.max_iters - 1;
    if (!last && outcome.iterations + 1 >= max_iters) continue;
    if (eps != at) {
      for (int64_t i = 0; i < n; ++i) F[i] *= static_cast<T>(at / eps);
      evaluate(engine, eps, F, point);
      ++outcome.iterations;
      at = eps;
    }
    const double tol = last ? options.tol : std::max(kStageTol, options.tol);
    ascend(engine, eps, tol, max_iters, F, point, newton, outcome.iterations);
    point.g = last ? point.g : point.gt;
  }
  // F is the row update of point.g; gt, the column update of F, is one half step further.
  std::copy(point.gt.begin(), point.gt.end(), g);
  outcome.error = point.error;
  outcome.converged = point.error <= options.tol;
  return outcome;
}

}  // namespace otloss::cpu
