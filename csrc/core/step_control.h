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

  // step: the one taken; change: of the residual; residual: before the step.
  OTLOSS_HOST_DEVICE void accepted(double step, double change, double residual) {
    constexpr double kFlat = 1e-2;
    stretch = change < kFlat * kFlat * residual ? 2 * stretch : 1;
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

// ---------------------------------------------------------------------------------- decisions

// The scalars of an evaluated point.
struct PointScalars {
  double value = 0;  // what the iterations ascend
  double noise = 0;  // rounding error of `value`
  double error = 0;  // L1 marginal error over the total mass
};

// What to evaluate next.
enum class Next {
  kStep,   // a point along the direction
  kPlain,  // the Sinkhorn iterate gt, which always ascends
  kStage,  // the Sinkhorn iterate at the next stage's eps
  kDone,   // nothing
};

class StepControl {
 public:
  StepControl() = default;
  OTLOSS_HOST_DEVICE StepControl(double eps, double tol, int64_t max_iters)
      : stages_{0, eps, eps}, tol_(tol), max_iters_(max_iters) {}

  OTLOSS_HOST_DEVICE void count_passes(int64_t count) { passes_ += count; }
  OTLOSS_HOST_DEVICE int64_t passes() const { return passes_; }
  // Whether the stage may take so many passes and more.
  OTLOSS_HOST_DEVICE bool may_pass(int64_t count) const { return passes_ + count < limit_; }
  OTLOSS_HOST_DEVICE double eps() const { return stages_.at(stage_); }
  OTLOSS_HOST_DEVICE const PointScalars& point() const { return point_; }

  // The start was evaluated at the problem's eps: whether a second one is worth a pass. The one of
  // the larger value is kept.
  OTLOSS_HOST_DEVICE bool wants_other_start(bool near) const { return !near && max_iters_ > 2; }

  // The start is chosen; sigma: of the cost, not read where the start is near. True: it is to be
  // evaluated again, at the eps of the first stage.
  OTLOSS_HOST_DEVICE bool begin_stages(bool near, double sigma) {
    if (!near) stages_ = make_stages(stages_.eps, sigma);
    enter(0);
    return stage_ < stages_.count;
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

  // The evaluated point becomes the point. The last pass that is allowed is a plain iteration.
  OTLOSS_HOST_DEVICE Next move_to(const PointScalars& trial) {
    constexpr double kStageTol = 0.01;  // the marginal error that ends a stage but the last
    const bool last = stage_ >= stages_.count;
    point_ = trial;
    attempt_ = 0;
    if (point_.error > (last || tol_ > kStageTol ? tol_ : kStageTol) && may_pass(0))
      return may_pass(1) ? Next::kStep : Next::kPlain;
    if (last) return Next::kDone;
    enter(stage_ + 1);
    return Next::kStage;
  }

 private:
  // Stages that leave no pass for the last one are skipped.
  OTLOSS_HOST_DEVICE void enter(int stage) {
    stage_ = stage < stages_.count && passes_ + 1 < max_iters_ - 1 ? stage : stages_.count;
    limit_ = max_iters_ - (stage_ < stages_.count ? 1 : 0);
  }

  Stages stages_{};
  double tol_ = 0;
  int64_t max_iters_ = 0, passes_ = 0;
  int64_t limit_ = 0;  // of passes, at the end of the stage
  int stage_ = 0, attempt_ = 0;
  PointScalars point_;
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
