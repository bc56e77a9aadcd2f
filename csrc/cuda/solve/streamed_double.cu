#include "cuda/solve/streamed_launch.cuh"

namespace otloss::cuda {

template void solve_streamed(const Context&, const std::vector<SolveGroup<double>>&,
                             const SolveOptions&);

}  // namespace otloss::cuda
