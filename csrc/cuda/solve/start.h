// Where a solve may start from in place of 0, see start.cu.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/solve/plan.h"
#include "kernels.h"

namespace otloss::cuda {

// starts[i] (B, m): potentials of the columns of group i, or null: there is no formula, or it takes
// longer than it saves.
template <typename T>
void propose_starts(const Context& context, const Pack<SolveGroup<T>>& pack,
                    const SolveOptions& options, const SolvePlan& plan,
                    const T* (&starts)[kMaxGroups]);

}  // namespace otloss::cuda
