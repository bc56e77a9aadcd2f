// The penalty on the plan's marginal of one side: scalar rules, for host and device.
//
// A penalty rho KL(marginal | w) makes a point of potential v add w rho (1 - e^{-v/rho}) to the
// dual, and have the target marginal w e^{-v/rho}. An infinite rho is a constraint:
// the two are w v and w. What depends on rho is here, exact in that limit.
#pragma once

#include <cmath>

#include "core/math.h"

namespace otloss {

struct Penalty {
  double rate;  // 1 / rho, 0 for a constraint

  OTLOSS_HOST_DEVICE bool hard() const { return rate == 0; }
  // The factor of a softmin in the update of a potential.
  OTLOSS_HOST_DEVICE double damping(double eps) const { return 1 / (1 + eps * rate); }
  OTLOSS_HOST_DEVICE double dual(double v) const {
    return hard() ? v : -std::expm1(-v * rate) / rate;
  }
  OTLOSS_HOST_DEVICE double share(double v) const { return hard() ? 1.0 : std::exp(-v * rate); }

  // dOT/dw of a point of potential v at the solution, unless the problem is balanced: the share is
  // in the dual's term, where it does not cancel the mass.
  OTLOSS_HOST_DEVICE double weight_gradient(double eps, double other_mass, double v) const {
    return (1 + eps * rate) * dual(v) + eps * (other_mass - 1);
  }
};

// A mean that adds up as the dual does: mass dual(mean) = sum_i w_i dual(v_i).
struct SoftMean {
  double mean;       // -rho log(sum_i w_i e^{-v_i/rho} / mass), the plain mean for a constraint
  double magnitude;  // mean of |v_i| in the plan's marginal
};

// The soft mean of values unit * v_i, from sums over the points of positive weight; `least`: the
// least v_i, by which they are shifted so that nothing overflows.
struct SoftSums {
  double lost = 0, kept = 0, size = 0;  // for a constraint: sum w v, unused, sum w |v|

  OTLOSS_HOST_DEVICE void add(const Penalty& side, double unit, double least, double w, double v) {
    const double magnitude = v < 0 ? -v : v;
    if (side.hard()) {
      lost += w * v, size += w * magnitude;
      return;
    }
    const double t = -unit * side.rate * kLog2E * (v - least), part = w * fast_exp2(t);
    lost += w * fast_exp2m1(t);
    kept += part;
    size += part * magnitude;
  }

  OTLOSS_HOST_DEVICE SoftMean mean(const Penalty& side, double unit, double least,
                                   double mass) const {
    if (side.hard()) return {unit * lost / mass, unit * size / mass};
    // Where little is lost only the small differences from 1 keep all digits, elsewhere the rest.
    const double log_kept = lost > -0.5 * mass ? std::log1p(lost / mass) : std::log(kept / mass);
    return {unit * least - log_kept / side.rate, unit * size / kept};
  }
};

// The target marginal of a soft side at potentials v: w e^{-v/rho}, scaled to the total of the
// weights w.
template <typename T>
struct TargetMarginal {
  T k, per_rho, shift, centre;

  // mean: the soft mean of v. log2_shift: by how much the plan has grown since q was made.
  OTLOSS_HOST_DEVICE TargetMarginal(const Penalty& side, double eps, double log2_shift, double mean)
      : k(static_cast<T>(kLog2E / eps)),
        per_rho(static_cast<T>(side.rate * kLog2E)),
        shift(static_cast<T>(log2_shift)),
        centre(static_cast<T>(mean)) {}

  OTLOSS_HOST_DEVICE T of(T weight, T v) const {
    return weight * fast_exp2(per_rho * (centre - v));
  }

  // The plan's marginal over its target, from q, the marginal over the weights, or, where
  // that is out of range, from the softmin `next` that follows on v.
  OTLOSS_HOST_DEVICE T ratio(T q, T v, T next) const {
    constexpr T kLimit = static_cast<T>(kExp2Limit);
    const T grown = shift + per_rho * v, whole = k * (v - next) + per_rho * v;
    const T direct = q * fast_exp2(grown < kLimit ? grown : kLimit);
    const T clamped = fast_exp2(whole < kLimit ? whole : kLimit);
    return trusted(q) ? direct : clamped;
  }
};

// Where a side is soft: the best translation (f + damping t, g - t) of an evaluated point, means of
// f and g included, and the value that the solver compares.
//
// With both sides soft the dual is a constant less (rho_x + rho_y + eps) M, M the plan's total,
// which rounding hides where M is small. So `value` is -log M times what makes <target (1 - q), p>
// its derivative along p; written in the mean of the side that is held more, it has the limit
// <b, g> (or <a, f>) of a constraint.
struct Translation {
  double t, mean_f, mean_g;
  double value, noise;  // noise: the rounding error of `value`

  // roundoff: the machine epsilon of the potentials.
  OTLOSS_HOST_DEVICE Translation(const Penalty& x, const Penalty& y, double mass_x, double mass_y,
                                 double eps, double roundoff, const SoftMean& f,
                                 const SoftMean& g) {
    const double damping = x.damping(eps);
    const double excess = std::log(mass_x / mass_y) - x.rate * f.mean + y.rate * g.mean;
    t = excess / (y.rate + damping * x.rate);
    mean_f = f.mean + damping * t, mean_g = g.mean - t;
    const bool by_x = x.rate < y.rate;
    const double held = by_x ? x.rate : y.rate, soft = by_x ? y.rate : x.rate;
    const double mean = (1 + held / soft + eps * held) * (by_x ? mean_f : mean_g);
    constexpr double kDouble = 2.220446049250313e-16;
    value = mass_y * mean;
    noise = mass_y *
            (4 * roundoff * (f.magnitude + g.magnitude) + 4 * kDouble * (mean < 0 ? -mean : mean));
  }
};

// The regularized value where a side is soft, from the soft means of f and g. The plan's column
// sums are those that g asks for; its total is left in the dual's terms, where it does not cancel
// those of the weights.
OTLOSS_HOST_DEVICE double soft_value(const Penalty& x, const Penalty& y, double mass_x,
                                     double mass_y, double eps, double mean_f, double mean_g) {
  return mass_x * x.dual(mean_f) + (1 + eps * y.rate) * mass_y * y.dual(mean_g) +
         eps * mass_y * (mass_x - 1);
}

}  // namespace otloss
