// The value of a solved problem from a last row update in double, core/last_update.h.
#pragma once

#include "kernels.h"

namespace otloss::cpu {

// Of problem `problem` of a group with points, at the potentials it has; split: over threads.
template <typename T>
double value_in_double(const SolveGroup<T>& group, int64_t problem, double eps, bool split);

}  // namespace otloss::cpu
