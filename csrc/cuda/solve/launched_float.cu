#include "cuda/solve/launched.cuh"

namespace otloss::cuda {

template void solve_launched(const Context&, const Pack<SolveGroup<float>>&, const SolveOptions&,
                             const SolvePlan&, Packer<float>&);

}  // namespace otloss::cuda
