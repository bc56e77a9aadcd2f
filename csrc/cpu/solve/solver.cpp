#include "cpu/solve/solver.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/math.h"
#include "cpu/grid/engine.h"
#include "cpu/multiscale/group_newton.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/far_mass.h"
#include "cpu/solve/lbfgs_memory.h"
#include "cpu/solve/sparse_newton.h"

namespace otloss::cpu {
namespace {

template <typename T>
constexpr double kRoundoff = static_cast<double>(std::numeric_limits<T>::epsilon());

template <typename E>
class PairSolver {
  using T = typename E::Value;

 public:
  PairSolver(E& engine, const SolveOptions& options, T* F, T* g)
      : engine_(engine), options_(options), F_(F), kept_gt_(g) {
    std::copy(g, g + m_, trial_.g.begin());
  }

  void run() {
    start();
    while (next_ != Next::kDone && !interrupted()) {
      propose();
      evaluate(trial_, F_);
      if (next_ == Next::kStep && !control_.accepts(trial_))
        next_ = control_.shorten();
      else
        move();
    }
  }

  // Both potentials of the best point. F is the row update of its g; gt, the column update of F, is
  // one half step further.
  Outcome finish() {
    if (control_.stop().returns_kept())
      std::copy(kept_F_.begin(), kept_F_.end(), F_);
    else
      std::copy(point_.gt.begin(), point_.gt.end(), kept_gt_);
    Outcome outcome = outcome_of(control_);
    outcome.converged = outcome.converged && !doubtful_;
    return outcome;
  }

 private:
  // Where to begin. A proposal that costs next to nothing comes first and 0 second, another the
  // other way round; the second is only tried if the iterations cannot start at the first.
  void start() {
    constexpr double kCheapSweeps = 1,
                     kWorthSweeps = 10;  // what a good start saves, at least and at most
    const bool warm = options_.warm_start;
    const bool cheap = !warm && engine_.propose(kCheapSweeps, eps_, trial_.g.data());
    evaluate(trial_, F_);
    bool near = near_enough(trial_);
    if (!warm && control_.wants_other_start(near) &&
        (cheap || engine_.propose(kWorthSweeps, eps_, point_.g.data()))) {
      std::vector<T> other_F(n_);
      evaluate(point_, other_F.data());
      if (point_.value > trial_.value) {
        std::swap(point_, trial_);
        std::copy(other_F.begin(), other_F.end(), F_);
        near = near_enough(trial_);
      }
    }
    if (control_.begin_stages(near, near ? 0 : engine_.sigma())) {
      point_.gt = trial_.g;
    } else {
      begin_stage(control_.passes() - 1);
      move();
    }
  }

  // Sets the point to evaluate next.
  void propose() {
    if (next_ == Next::kStep) {
      const T t = static_cast<T>(control_.length());
      for (int64_t j = 0; j < m_; ++j) trial_.g[j] = point_.g[j] + t * p_[j];
      return;
    }
    trial_.g = point_.gt;
    memory_.clear();
    if (next_ != Next::kStage) return;
    for (int64_t i = 0; i < n_; ++i) F_[i] *= static_cast<T>(eps_ / control_.eps());
    eps_ = control_.eps();
    begin_stage(control_.passes());
  }

  // passes: before its first point.
  void begin_stage(int64_t passes) {
    begun_ = passes;
    newton_.reset();
    length_ = StepLength();
    far_rule_ = FarMassRule();
    last_shift_ = 0, shift_wait_ = 1;
  }

  bool near_enough(const SemidualPoint<T>& point) const {
    double residual = 0;
    for (int64_t j = 0; j < m_; ++j)
      residual = std::max(residual, static_cast<double>(std::abs(point.gt[j] - point.g[j])));
    return is_near(point.error, residual, eps_);
  }

  void evaluate(SemidualPoint<T>& point, T* F) {
    engine_.iterate(eps_, point.g.data(), F, point.gt.data(), point.q.data());
    control_.count_passes(1);
    if (x_.hard() && y_.hard()) {
      const SoftMean f = x_.soft_mean(F, eps_ / kLog2E), g = y_.soft_mean(point.g.data(), 1);
      point.value = x_.mass * f.mean + y_.mass * g.mean;
      point.noise = 4 * kRoundoff<T> * (x_.mass * f.magnitude + y_.mass * g.magnitude);
    } else {
      translate(point, F);
    }
    point.sums = engine_.rounding();
    point.noise += point.sums * eps_ * y_.mass;
    point.error =
        marginal_error(m_, point.target.data(), point.q.data()) / y_.mass + engine_.left_out();
    report(control_.passes(), point.error);
  }

  // Where a side is soft: the best translation (F + t, g - t) of an evaluated point, taken at once,
  // and what it makes of the point. Softmins are only shifted by it, so that the pass holds good,
  // and the plan's total becomes the M that both potentials imply. Without it a large rho would
  // take some rho / eps passes to find M (Séjourné, Vialard, Peyré 2022).
  void translate(SemidualPoint<T>& point, T* F) const {
    const double damping = x_.damping(eps_), to_cost = eps_ / kLog2E;
    const Translation best(x_, y_, x_.mass, y_.mass, eps_, kRoundoff<T>,
                           x_.soft_mean(F, damping * to_cost), y_.soft_mean(point.g.data(), 1));
    const T on_F = static_cast<T>(best.t / to_cost), on_g = static_cast<T>(best.t);
    const T on_gt = static_cast<T>(damping * best.t), damp = static_cast<T>(y_.damping(eps_));
    for (int64_t i = 0; i < n_; ++i) F[i] += x_.weight[i] > T(0) ? on_F : T(0);
    for (int64_t j = 0; j < m_; ++j) {
      point.g[j] -= y_.weight[j] > T(0) ? on_g : T(0);
      point.gt[j] -= y_.weight[j] > T(0) ? on_gt : T(0);
    }
    y_.set_target(eps_, -kLog2E * x_.rate * damping * best.t, point.g.data(), point.gt.data(),
                  best.mean_g, point.q.data(), point.target.data());
    for (T& value : point.gt) value *= damp;
    point.value = best.value;
    point.noise = best.noise;
  }

  // The trial becomes the point, and after it every shifted one.
  void move() {
    do take_trial();
    while (next_ != Next::kStage && control_.at_last_stage() && shifts());
    if (next_ != Next::kDone && strays()) next_ = Next::kStage;
    if (next_ == Next::kStep) aim();
  }

  // Whether the iterations, which began near the solution as it seemed, go to the first stage after
  // all: a marginal error that much mass has to go far for can grow before it falls.
  bool strays() {
    return control_.may_begin_stages(near_enough(point_)) &&
           control_.begin_stages(false, engine_.sigma());
  }

  // Looks for small mass that has to go far, see FarMassRule. True: by a shift that moves it, the
  // trial. Else the solve goes on where the point does not prove that there is none.
  bool shifts() {
    const StopRule& stop = control_.stop();
    const int64_t sweeps = control_.passes() - begun_;
    doubtful_ = false;
    const double tol = options_.tol, error = point_.error;
    if (!far_rule_.looks(stop, error, sweeps)) return false;
    const double value = far_.size(eps_, F_, point_);
    doubtful_ = FarMassRule::suspicious(far_.cheap_bound(point_), error, tol, value);
    if (!doubtful_) return false;
    if (far_rule_.examines(stop, sweeps)) {
      if (stop.reached() && control_.may_pass(0)) {
        control_.count_passes(1);
        doubtful_ = !FarMassRule::proves(far_.gap(eps_, F_, point_), tol, value);
        if (!doubtful_) return false;
      }
      if (sweeps >= last_shift_ + shift_wait_ * engine_.shift_passes() && shift(value, sweeps))
        return true;
    }
    next_ = control_.go_on();
    return false;
  }

  // Whether shifting the groups of the plan makes a better point, the trial.
  bool shift(double value, int64_t sweeps) {
    last_shift_ = sweeps, shift_wait_ = std::max<int64_t>(1, 2 * shift_wait_);
    const auto found = far_.shift(eps_, F_, point_, control_.passes_left() - 1);
    control_.count_passes(found.readings);
    const double tol = options_.tol;
    // Where rounding hides all progress only a gain is one.
    const bool is_shift = FarMassRule::is_shift(found.largest, eps_) && !control_.stop().stuck();
    if (found.g.empty() || !(is_shift || FarMassRule::is_much(found.gain, tol, value)))
      return false;
    for (int64_t j = 0; j < m_; ++j) trial_.g[j] = point_.g[j] + found.g[j];
    const std::vector<T> F(F_, F_ + n_);
    evaluate(trial_, F_);
    const double gain = trial_.value - point_.value;
    const bool much = FarMassRule::is_much(far_.mass(point_) * gain, tol, value);
    if (!much && !(is_shift && gain > -point_.noise)) {
      std::copy(F.begin(), F.end(), F_);
      return false;
    }
    if (much) shift_wait_ = 0;
    far_rule_.shifted(much, sweeps);
    control_.restart();
    memory_.clear();
    length_ = StepLength();
    next_ = Next::kShift;
    return true;
  }

  void take_trial() {
    std::vector<T> next = residual(trial_);
    if (next_ == Next::kStep) {
      std::vector<T> step(m_), change(m_);
      for (int64_t j = 0; j < m_; ++j) {
        step[j] = y_.weight[j] > T(0) ? trial_.g[j] - point_.g[j] : T(0);
        change[j] = r_[j] - next[j];
      }
      const double changed = squared(change);
      const double least = least_change(point_.noise, y_.mass, kRoundoff<T>, eps_);
      length_.accepted(squared(step), changed, squared(r_), least);
      if (changed > least) memory_.push(std::move(step), std::move(change));
    } else if (next_ == Next::kPlain) {
      length_.plain(squared(r_));
    }
    r_ = std::move(next);
    std::swap(point_, trial_);
    memory_.weigh(point_.target.data(), y_.hard());
    next_ = control_.move_to(point_);
    if (control_.stop().keeps()) {
      kept_F_.assign(F_, F_ + n_);
      std::copy(point_.gt.begin(), point_.gt.end(), kept_gt_);
    }
  }

  // Residual gt - g without its mean, which the semidual does not see.
  std::vector<T> residual(const SemidualPoint<T>& point) const {
    std::vector<T> r(m_);
    for (int64_t j = 0; j < m_; ++j) r[j] = point.gt[j] - point.g[j];
    const T mean = static_cast<T>(dot(m_, point.target.data(), r.data()) / y_.mass);
    for (int64_t j = 0; j < m_; ++j) r[j] = y_.weight[j] > T(0) ? r[j] - mean : T(0);
    return r;
  }

  double squared(const std::vector<T>& v) const {
    return dot(m_, point_.target.data(), v.data(), v.data());
  }

  // <b - P^T 1, v>
  double slope_along(const std::vector<T>& v) const {
    return dot(m_, point_.target.data(), excess_.data(), v.data());
  }

  // The direction from the point, p_.
  void aim() {
    bool by_newton = false;
    if (control_.may_pass(2)) {
      int64_t readings = 0;
      by_newton = newton_.prepare(eps_, F_, point_, control_.passes() - begun_, readings);
      control_.count_passes(readings);
    }
    const auto newton_step = [&] { newton_.step(point_.error, p_); };
    const FunctionRef<void()> precondition(newton_step);
    p_ = r_;
    memory_.direction(p_, by_newton ? &precondition : nullptr);
    for (int64_t j = 0; j < m_; ++j)
      if (!has_mass(static_cast<double>(point_.target[j]), y_.mass)) p_[j] = r_[j];
    for (int64_t j = 0; j < m_; ++j) excess_[j] = T(1) - point_.q[j];
    double slope = slope_along(p_);
    if (!(slope > 0)) {
      memory_.clear();
      p_ = r_;
      slope = slope_along(p_);
    }
    control_.aim(slope, length_.first(squared(p_)));
  }

  E& engine_;
  const SolveOptions& options_;
  T* const F_;             // (n,) of the point that was evaluated last
  T* const kept_gt_;       // (m,) of the best point, where rounding may end the solve,
  std::vector<T> kept_F_;  // (n,) and its F
  const Side<T>&x_ = engine_.x, &y_ = engine_.y;
  const int64_t n_ = x_.count, m_ = y_.count;
  double eps_ = options_.eps;  // of the stage
  StepControl control_{options_.eps, options_.tol, options_.max_iters, y_.mass,
                       std::min(x_.points, y_.points)};
  Next next_ = Next::kStage;  // what the trial is
  SemidualPoint<T> point_{m_, y_.weight}, trial_{m_, y_.weight};
  std::vector<T> r_ = std::vector<T>(m_), p_ = r_, excess_ = r_;  // residual; direction; 1 - q
  LbfgsMemory<T> memory_;
  StepLength length_;
  typename E::Newton newton_{engine_};
  typename E::Far far_{engine_};
  FarMassRule far_rule_;
  bool doubtful_ = false;  // whether small mass may have to go far
  int64_t begun_ = 0;      // passes before the stage
  // In sweeps; the next shift waits until these took so many times as long as a shift, more often
  // after each that gained little.
  int64_t last_shift_ = 0, shift_wait_ = 1;
};

}  // namespace

template <typename E, typename T>
Outcome solve_pair(E& engine, const SolveOptions& options, T* F, T* g) {
  PairSolver<E> solver(engine, options, F, g);
  solver.run();
  return solver.finish();
}

template <typename E, typename T>
Outcome solve_symmetric(E& engine, const SolveOptions& options, T* F) {
  const Side<T>& x = engine.x;
  const int64_t n = x.count;
  const double eps = options.eps, damping = x.damping(eps);
  const SymmetricRule rule(damping);
  const T to_cost = static_cast<T>(damping * eps / kLog2E), to_base2 = factor<T>(eps);
  const T relaxation = static_cast<T>(rule.relaxation), last = static_cast<T>(rule.last);
  const T undamped = static_cast<T>(eps / kLog2E);
  std::vector<T> f(n), s(n), softmin(n), target(x.weight, x.weight + n);
  StepControl control(eps, options.tol, options.max_iters, x.mass, x.points);
  if (options.warm_start) {
    for (int64_t i = 0; i < n; ++i) f[i] = F[i] / to_base2;
  } else {
    engine.update_rows(eps, f.data(), F, s.data());
    control.count_passes(1);
    const double centre = rule.centre * dot(n, x.weight, F) / x.mass;
    for (int64_t i = 0; i < n; ++i)
      f[i] = x.weight[i] > 0 ? to_cost * static_cast<T>(F[i] - centre) : T(0);
  }
  while (true) {
    for (int64_t i = 0; i < n; ++i) F[i] = to_base2 * f[i];
    engine.update_rows(eps, f.data(), F, s.data());
    control.count_passes(1);
    const SoftMean mean = x.soft_mean(f.data(), 1);
    if (!x.hard()) {
      for (int64_t i = 0; i < n; ++i) softmin[i] = undamped * F[i];
      x.set_target(eps, 0, f.data(), softmin.data(), mean.mean, s.data(), target.data());
    }
    const double error = marginal_error(n, target.data(), s.data()) / x.mass + engine.left_out();
    control.observe({0, 8 * kRoundoff<T> * x.mass * mean.magnitude, error, engine.rounding()});
    report(control.passes(), error);
    if (control.stop().ends() || !control.may_pass(0) || interrupted()) break;
    for (int64_t i = 0; i < n; ++i) f[i] += relaxation * (to_cost * F[i] - f[i]);
  }
  for (int64_t i = 0; i < n; ++i) F[i] = to_base2 * (f[i] + last * (to_cost * F[i] - f[i]));
  return outcome_of(control);
}

template <typename T>
double regularized_value(const Side<T>& x, const Side<T>& y, double eps, bool balanced, const T* f,
                         const T* g) {
  if (!balanced)
    return soft_value(x, y, x.mass, y.mass, eps, x.soft_mean(f, 1).mean, y.soft_mean(g, 1).mean);
  return dot(x.count, x.weight, f) + dot(y.count, y.weight, g);
}

template <typename E, typename T>
double value_of(E& engine, const SolveOptions& options, bool balanced, const T* f, const T* g) {
  const Side<T>&x = engine.x, &y = engine.y;
  if (options.objective == Objective::kRegularized)
    return regularized_value(x, y, options.eps, balanced, f, g);
  std::vector<T> F(f, f + x.count);
  for (T& value : F) value *= factor<T>(options.eps);
  return engine.transport(options.eps, F.data(), g);
}

#define OTLOSS_INSTANTIATE(E, T)                                 \
  template Outcome solve_pair(E&, const SolveOptions&, T*, T*);  \
  template Outcome solve_symmetric(E&, const SolveOptions&, T*); \
  template double value_of(E&, const SolveOptions&, bool, const T*, const T*);
OTLOSS_INSTANTIATE(Engine<float>, float)
OTLOSS_INSTANTIATE(Engine<double>, double)
OTLOSS_INSTANTIATE(multiscale::Engine, double)
#undef OTLOSS_INSTANTIATE
template Outcome solve_pair(grid::Engine&, const SolveOptions&, double*, double*);
template Outcome solve_symmetric(grid::Engine&, const SolveOptions&, double*);
#define OTLOSS_INSTANTIATE(T)                                                               \
  template double regularized_value(const Side<T>&, const Side<T>&, double, bool, const T*, \
                                    const T*);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
