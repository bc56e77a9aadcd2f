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

// An entry of a loss: the sum of its terms, those of its problems, and of their sizes.
struct LossTerms {
  double sum = 0, size = 0;

  OTLOSS_HOST_DEVICE void add(double term) { sum += term, size += term < 0 ? -term : term; }
  // 0 where it is negative by less than the rounding of its terms. roundoff: of what they were made
  // from.
  OTLOSS_HOST_DEVICE double clamped(double roundoff) const {
    return sum < 0 && sum >= -kRounding * roundoff * size ? 0.0 : sum;
  }
  // Whether little is left of the digits of terms in single precision.
  OTLOSS_HOST_DEVICE bool cancel() const {
    constexpr double kCancelled = 1e-3;
    return (sum < 0 ? -sum : sum) < kCancelled * size;
  }
};

}  // namespace otloss
