// The value of a solved problem from a last row update in double.
//
// A loss whose terms cancel, as in the divergence of clouds that are close, has no digits left of
// values made from potentials in single precision. With the row update of g in double, from costs
// in double, the value is that of the semidual at g, which g's rounding enters to second order.
#pragma once

#include "kernels.h"

namespace otloss::cpu {

// Of problem `problem` of a group with points, at the potentials it has; split: over threads.
template <typename T>
double value_in_double(const SolveGroup<T>& group, int64_t problem, double eps, bool split);

}  // namespace otloss::cpu
