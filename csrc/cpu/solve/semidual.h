// A point of the semidual and what one pass tells about it.
#pragma once

#include <vector>

#include "core/step_control.h"

namespace otloss::cpu {

template <typename T>
struct SemidualPoint : PointScalars {
  std::vector<T> g, gt, q;  // q: the plan's column sums over their target
  std::vector<T> target;    // the target marginal, of the total of b

  SemidualPoint(int64_t m, const T* b) : g(m), gt(m), q(m), target(b, b + m) {}
};

}  // namespace otloss::cpu
