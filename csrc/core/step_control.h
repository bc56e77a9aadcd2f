// How the solver decides: all of its rules and constants, on scalars, for host and device.
//
// A solver evaluates points of the semidual, a pass over the cost each, and asks StepControl what
// to evaluate next. So the CPU and the GPU take the same decisions; docs/solver.md explains them.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/math.h"

namespace otloss {

// ------------------------------------------------------------------------------------- stages

// Whether the iterations can start at a point. error: its marginal error; residual: its largest
// |gt - g|. The error alone does not see a few outliers, whose mass is small but whose potentials
// are far off.
OTLOSS_HOST_DEVICE bool is_near(double error, double residual, double eps) {
  constexpr double kNearError = 0.6, kNearResidual = 10;
  return error <= kNearError && residual <= kNearResidual * eps;
}

// eps goes first, first * ratio, ..., eps in `count` steps; count 0: eps at once.
struct Stages {
  int count;
  double first, eps;

  OTLOSS_HOST_DEVICE double at(int stage) const {
    return stage >= count ? eps : first * fast_exp2(stage * fast_log2(eps / first) / count);
  }
};

// Stages where a cold start would be slow. sigma: how varied the cost is.
OTLOSS_HOST_DEVICE Stages make_stages(double eps, double sigma) {
  constexpr double kEasyEps = 0.077, kFirst = 0.1, kLog2Ratio = -2;
  const double first = kFirst * sigma;
  if (!(eps < kEasyEps * sigma)) return {0, eps, eps};
  const int count = static_cast<int>(fast_log2(eps / first) / kLog2Ratio + 0.5);
  return {count > 1 ? count : 1, first, eps};
}

// -------------------------------------------------------------------------------- step lengths

// A change of the residual whose squared norm is smaller is only rounding, and would be taken for a
// curvature of any size. noise: the rounding error of a value over points of total `mass`;
// roundoff: the machine epsilon of the potentials.
OTLOSS_HOST_DEVICE double least_change(double noise, double mass, double roundoff, double eps) {
  const double rounding = 4 * (noise / mass + 4 * roundoff * eps);
  return rounding * rounding * mass;
}

// How far the first try along a direction goes. Where clusters are many eps apart the semidual is
// nearly a plane until they exchange mass, and its gradient does not tell how far to go: so a step
// is at most a few times as long as the one before, and longer after one that left the residual
// unchanged. All lengths are squared.
struct StepLength {
  double stretch = 1;
  double reach = std::numeric_limits<double>::infinity();

  // The factor of a direction.
  OTLOSS_HOST_DEVICE double first(double direction) const {
    const double most = std::sqrt(reach / direction);
    return most < stretch ? most : stretch;
  }

  // step: the one taken; change: of the residual; residual: before the step; least: see
  // least_change.
  OTLOSS_HOST_DEVICE void accepted(double step, double change, double residual, double least) {
    constexpr double kFlat = 1e-2, kFlatButForRounding = 0.3;
    const double flat = change > least ? kFlat : kFlatButForRounding;
    stretch = change < flat * flat * residual ? 2 * stretch : 1;
    reach = kReach * kReach * step;
  }

  // After a plain iteration, a step along the residual.
  OTLOSS_HOST_DEVICE void plain(double residual) {
    stretch = 1;
    reach = kReach * kReach * residual;
  }

 private:
  static constexpr double kReach = 10;
};

// Points whose target marginal is below 1e-20 of the total mass are left out of directions and
// inner products; they move by plain Sinkhorn updates. Soft marginals make such points of outliers.
OTLOSS_HOST_DEVICE bool has_mass(double target, double mass) {
  constexpr double kNothing = 1e-20;
  return target > kNothing * mass;
}

// The scalars of an evaluated point.
struct PointScalars {
  double value = 0;  // what the iterations ascend
  double noise = 0;  // rounding error of `value`
  double error = 0;  // L1 marginal error over the total mass, but for the rounding of potentials
  double sums = 0;   // what the rounding of sums over the plan typically adds to it
};

// ------------------------------------------------------------------------------ where to stop

// The number of points of equal weight whose mean fluctuates as that of weights of this total and
// sum of squares.
OTLOSS_HOST_DEVICE double equal_points(double total, double squares) {
  return total * total / squares;
}

// The part of a plan's rounding error, were all of its potentials off by their rounding, that is to
// be counted on: a mean over points, which fluctuates the more the fewer there are. points: of
// equal weight, of the side that has fewer.
OTLOSS_HOST_DEVICE double rounding_share(double points) {
  constexpr double kMean = 0.3, kSpread = 1;
  return kMean + kSpread / std::sqrt(points);
}

// When iterations end. A sweep measures the marginal error before it rounds the potentials, which
// may be far less than that of the plan they give. So what they are rounded by counts as well, and
// where it hides all progress the iterations end although they are not within the tolerance.
class StopRule {
 public:
  StopRule() = default;
  // share: see rounding_share.
  OTLOSS_HOST_DEVICE StopRule(double tol, double share) : tol_(tol), share_(share) {}

  // A point, after `passes` passes. scale: the mean sizes of f and of g times the machine epsilon,
  // over eps: the error of a plan whose potentials are each off by their rounding. sums: what the
  // rounding of sums typically adds.
  OTLOSS_HOST_DEVICE void see(double error, double scale, double sums, int64_t passes) {
    constexpr double kProgress = 0.8;
    error_ = error, rounding_ = share_ * scale + sums, near_ = kNear * (scale + sums);
    keeps_ = error <= near_ && error < least_;
    if (keeps_) least_ = error;
    if (error <= kProgress * mark_) mark_ = error, marked_ = passes;
    idle_ = passes - marked_;
  }

  // Of the plan of the potentials as they are stored.
  OTLOSS_HOST_DEVICE double error() const { return with_rounding(error_); }
  OTLOSS_HOST_DEVICE bool reached() const { return error() <= tol_; }
  // Whether iterations end; at a NaN, too.
  OTLOSS_HOST_DEVICE bool ends() const { return !(error() > tol_) || stuck(); }

  // Where rounding may be what ends the iterations, the best point so far is kept, and returned if
  // none is within the tolerance.
  OTLOSS_HOST_DEVICE bool keeps() const { return keeps_; }
  OTLOSS_HOST_DEVICE bool returns_kept() const { return !reached() && least_ < error_; }
  // Whether rounding hides all progress.
  OTLOSS_HOST_DEVICE bool stuck() const {
    return error_ <= rounding_ || (error_ <= near_ && idle_ >= kPatience);
  }
  // Of the point that is returned.
  OTLOSS_HOST_DEVICE double final_error() const {
    return returns_kept() ? with_rounding(least_) : error();
  }

 private:
  // Within kNear of the scales, kPatience passes that bring no progress are the last.
  static constexpr double kNear = 10;
  static constexpr int64_t kPatience = 8;

  OTLOSS_HOST_DEVICE double with_rounding(double error) const { return error + rounding_; }

  double tol_ = 0, share_ = 0;
  double error_ = std::numeric_limits<double>::quiet_NaN();
  double rounding_ = 0, near_ = 0;  // to be counted on; where it may be what hides progress
  // The least error of points that were kept; the last error that was clearly less than before.
  double least_ = std::numeric_limits<double>::infinity(), mark_ = least_;
  int64_t marked_ = 0, idle_ = 0;  // passes until then and since
  bool keeps_ = false;
};

// ------------------------------------------------------------------ small mass that goes far

// The marginal error does not see small mass that has to go far: clusters far apart whose masses
// differ by less than the tolerance. A bound of the error of the value does. Where it is suspicious
// a point within the tolerance has not converged before the duality gap proves it, and the groups
// that the plan falls into are shifted against each other by the best constants. Errors of values
// are relative to `value`, and not asked to be smaller than the tolerance warrants.
class FarMassRule {
 public:
  OTLOSS_HOST_DEVICE static bool suspicious(double bound, double error, double tol, double value) {
    constexpr double kSuspicious = 10;
    return bound > kSuspicious * (error > tol ? error : tol) * value;
  }
  OTLOSS_HOST_DEVICE static bool proves(double gap, double tol, double value) {
    constexpr double kProof = 20;
    return gap <= kProof * tol * value;
  }
  OTLOSS_HOST_DEVICE static bool is_much(double gain, double tol, double value) {
    constexpr double kMuch = 0.1;
    return gain > kMuch * tol * value;
  }
  // Whether a shift by at most `largest` is one: rounding aside, the value may stay where it is.
  OTLOSS_HOST_DEVICE static bool is_shift(double largest, double eps) { return largest > eps / 2; }

  // Whether to look at a point: it ends the iterations, or these stall.
  OTLOSS_HOST_DEVICE bool looks(const StopRule& stop, double error, int64_t sweeps) {
    constexpr double kProgress = 0.5;
    constexpr int64_t kPatience = 5;
    if (error <= kProgress * mark_) mark_ = error, marked_ = sweeps;
    return stop.ends() || sweeps - marked_ >= kPatience;
  }

  // Whether to examine a point that is suspicious, ever more rarely: points within the tolerance,
  // which may be proven, and others on their own.
  OTLOSS_HOST_DEVICE bool examines(const StopRule& stop, int64_t sweeps) {
    if (sweeps < (stop.reached() ? next_reached_ : next_) && !stop.stuck()) return false;
    if (stop.reached())
      next_reached_ = sweeps + wait_, wait_ *= 2;
    else
      next_ = 2 * sweeps;
    return true;
  }

  OTLOSS_HOST_DEVICE void shifted(bool much, int64_t sweeps) {
    constexpr int64_t kSoon = 3;
    if (next_ < 2 * sweeps) next_ = 2 * sweeps;
    if (much) next_ = next_reached_ = sweeps + kSoon;
    mark_ = std::numeric_limits<double>::infinity();
  }

 private:
  double mark_ = std::numeric_limits<double>::infinity();  // the last error that was clearly less
  int64_t marked_ = 0, next_ = 2, next_reached_ = 2, wait_ = 3;  // sweeps
};

// ---------------------------------------------------------------------------------- decisions

// What to evaluate next.
enum class Next {
  kStep,   // a point along the direction
  kPlain,  // the Sinkhorn iterate gt, which always ascends
  kStage,  // the Sinkhorn iterate at the next stage's eps
  kShift,  // a point with groups shifted against each other
  kDone,   // nothing
};

class StepControl {
 public:
  StepControl() = default;
  // mass: the total of b; points: see rounding_share.
  OTLOSS_HOST_DEVICE StepControl(double eps, double tol, int64_t max_iters, double mass,
                                 double points)
      : stages_{0, eps, eps},
        tol_(tol),
        mass_(mass),
        share_(rounding_share(points)),
        max_iters_(max_iters),
        limit_(max_iters),
        stop_(tol, share_) {}

  OTLOSS_HOST_DEVICE void count_passes(int64_t count) { passes_ += count; }
  OTLOSS_HOST_DEVICE int64_t passes() const { return passes_; }
  // Whether the stage may take `count` passes and more.
  OTLOSS_HOST_DEVICE bool may_pass(int64_t count) const { return passes_ + count < limit_; }
  OTLOSS_HOST_DEVICE double eps() const { return stages_.at(stage_); }
  OTLOSS_HOST_DEVICE int64_t passes_left() const { return limit_ - passes_; }
  OTLOSS_HOST_DEVICE bool at_last_stage() const { return stage_ >= stages_.count; }
  OTLOSS_HOST_DEVICE const PointScalars& point() const { return point_; }
  OTLOSS_HOST_DEVICE const StopRule& stop() const { return stop_; }

  // The start was evaluated at the problem's eps: whether a second one is worth a pass. The one of
  // the larger value is kept.
  OTLOSS_HOST_DEVICE bool wants_other_start(bool near) const { return !near && max_iters_ > 2; }

  // The start is chosen; sigma: of the cost, not read where the start is near. True: it is to be
  // evaluated again, at the eps of the first stage.
  OTLOSS_HOST_DEVICE bool begin_stages(bool near, double sigma) {
    staged_ = !near;
    if (!near) stages_ = make_stages(stages_.eps, sigma);
    if (stages_.count > 0) enter(0);
    return stage_ < stages_.count;
  }
  // Iterations that began without stages, near the solution as it seemed, and are not near after so
  // many passes: whether stages can still begin.
  OTLOSS_HOST_DEVICE bool may_begin_stages(bool near) const {
    constexpr int64_t kPatience = 20;
    return !staged_ && !near && passes_ >= kPatience && may_pass(2);
  }

  // The value rises by `slope` per unit of the new direction, to first order. length: of the first
  // try.
  OTLOSS_HOST_DEVICE void aim(double slope, double length) { slope_ = slope, length_ = length; }
  // The factor of the direction to try.
  OTLOSS_HOST_DEVICE double length() const { return length_; }

  // Whether a point along the direction becomes the point.
  OTLOSS_HOST_DEVICE bool accepts(const PointScalars& trial) const {
    constexpr double kSufficient = 1e-4;
    return trial.value >= point_.value + kSufficient * (length_ * slope_) - point_.noise;
  }

  // After a point along the direction that was not accepted.
  OTLOSS_HOST_DEVICE Next shorten() {
    constexpr int kTries = 5;
    constexpr double kShrink = 0.3;
    length_ *= kShrink;
    return ++attempt_ < kTries && may_pass(1) ? Next::kStep : Next::kPlain;
  }

  // Judges an evaluated point, of which `value` is not read.
  OTLOSS_HOST_DEVICE void observe(const PointScalars& point) {
    stop_.see(point.error, point.noise / (4 * mass_ * eps()), point.sums, passes_);
  }

  // The evaluated point becomes the point. The last pass that is allowed is a plain iteration.
  OTLOSS_HOST_DEVICE Next move_to(const PointScalars& trial) {
    point_ = trial;
    attempt_ = 0;
    observe(trial);
    if (!stop_.ends() && may_pass(0)) return may_pass(1) ? Next::kStep : Next::kPlain;
    if (at_last_stage()) return Next::kDone;
    enter(stage_ + 1);
    return Next::kStage;
  }

  // After a point that is within the tolerance, but not enough.
  OTLOSS_HOST_DEVICE Next go_on() const {
    if (stop_.stuck() || !may_pass(0)) return Next::kDone;
    return may_pass(1) ? Next::kStep : Next::kPlain;
  }

  // A point follows that was reached by no iteration.
  OTLOSS_HOST_DEVICE void restart() { stop_ = StopRule(tol_, share_); }

 private:
  // Stages that leave no pass for the last one are skipped.
  OTLOSS_HOST_DEVICE void enter(int stage) {
    constexpr double kStageTol = 0.01;  // the marginal error that ends a stage but the last
    stage_ = stage < stages_.count && passes_ + 1 < max_iters_ - 1 ? stage : stages_.count;
    const bool last = at_last_stage();
    limit_ = max_iters_ - (last ? 0 : 1);
    stop_ = StopRule(last || tol_ > kStageTol ? tol_ : kStageTol, share_);
  }

  Stages stages_{};
  double tol_ = 0, mass_ = 1, share_ = 0;
  int64_t max_iters_ = 0, passes_ = 0;
  int64_t limit_ = 0;  // of passes, at the end of the stage
  int stage_ = 0, attempt_ = 0;
  bool staged_ = false;
  PointScalars point_;
  StopRule stop_;
  double slope_ = 0, length_ = 0;
};

// A cloud against itself has one potential: f <- f + relaxation (T(f) - f), from
// T(0) - centre <a, T(0)> / <a, 1>. The error contracts by p / (2 + p) per pass whatever eps, p the
// damping of T. What is returned is f + last (T(f) - f), a further step: first order errors of the
// value cancel there, as constants do in the start.
struct SymmetricRule {
  double relaxation, centre, last;

  OTLOSS_HOST_DEVICE explicit SymmetricRule(double damping)
      : relaxation(2 / (2 + damping)), centre(damping / (1 + damping)), last(1 / (1 + damping)) {}
};

}  // namespace otloss
