// What the files of a solve tell each other.
#pragma once

#include "cuda/pass/pack.cuh"
#include "cuda/solve/plan.h"
#include "kernels.h"

namespace otloss::cuda {

// A solve in many launches, see launched.cu; the plan is of the pack's largest problem.
template <typename T>
void solve_launched(const Context& context, const Pack<SolveGroup<T>>& pack,
                    const SolveOptions& options, const SolvePlan& plan, Packer<T>& packer);

// Where a solve may start from in place of 0, see start.cu. starts[i] (B, m): potentials of the
// columns of group i, or null: there is no formula, or it takes longer than it saves.
template <typename T>
void propose_starts(const Context& context, const Pack<SolveGroup<T>>& pack,
                    const SolveOptions& options, const SolvePlan& plan,
                    const T* (&starts)[kMaxGroups]);

}  // namespace otloss::cuda
