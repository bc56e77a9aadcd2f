// Solves and gradients without cost matrices, see streamed_launch.cuh.
#pragma once

#include <vector>

#include "kernels.h"

namespace otloss::cuda {

// As cuda::solve, for groups whose C is null.
template <typename T>
void solve_streamed(const Context& context, const std::vector<SolveGroup<T>>& groups,
                    const SolveOptions& options);

}  // namespace otloss::cuda
