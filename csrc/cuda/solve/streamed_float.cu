#include "cuda/solve/streamed_launch.cuh"

namespace otloss::cuda {

template void solve_streamed(const Context&, const std::vector<SolveGroup<float>>&,
                             const SolveOptions&);

}  // namespace otloss::cuda
