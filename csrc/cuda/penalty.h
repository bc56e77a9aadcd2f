// How a marginal is held to its weights, for one point: the device's part of csrc/cpu/marginal.h.
//
// A penalty rho KL(marginal | w) makes a point of potential v add w rho (1 - e^{-v/rho}) to the
// dual, and take the part e^{-v/rho} of its weight in the plan; for a constraint they are w v and
// 1.
#pragma once

#include <cmath>

#include "math.h"

namespace otloss::cuda {

struct Penalty {
  double rate;  // 1 / rho, 0 for a constraint

  OTLOSS_HOST_DEVICE bool hard() const { return rate == 0; }
  // The factor of a softmin in the update of a potential.
  OTLOSS_HOST_DEVICE double damping(double eps) const { return 1 / (1 + eps * rate); }
  OTLOSS_HOST_DEVICE double dual(double v) const {
    return hard() ? v : -std::expm1(-v * rate) / rate;
  }
  OTLOSS_HOST_DEVICE double share(double v) const { return hard() ? 1.0 : std::exp(-v * rate); }
};

}  // namespace otloss::cuda
