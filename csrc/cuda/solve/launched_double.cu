#include "cuda/solve/launched.cuh"

namespace otloss::cuda {

template void solve_launched(const Context&, const Pack<SolveGroup<double>>&, const SolveOptions&,
                             const SolvePlan&, Packer<double>&);

}  // namespace otloss::cuda
