// Sums that rounding takes off by a few units in the last place: scalar rules, for host and device.
#pragma once

#include "core/math.h"

namespace otloss {

constexpr double kRounding = 8;  // in machine epsilons

// A total of weights, 1 where it is 1 but for rounding, which eps would multiply. roundoff: the
// machine epsilon of the weights.
OTLOSS_HOST_DEVICE double snapped_total(double total, double roundoff) {
  const double apart = total > 1 ? total - 1 : 1 - total;
  return apart <= kRounding * roundoff ? 1.0 : total;
}

// A loss, 0 where it is negative by less than the rounding of its terms. size: their absolute sum;
// roundoff: of what they were made from.
OTLOSS_HOST_DEVICE double clamped_loss(double loss, double size, double roundoff) {
  return loss < 0 && loss >= -kRounding * roundoff * size ? 0.0 : loss;
}

}  // namespace otloss
