#include "cuda/gradient/side_sums.cuh"

namespace otloss::cuda {

template void sum_sides(const Context&, const std::vector<SideItem<float, SolvedPlan<float>>>&,
                        float);
template void sum_sides(const Context&, const std::vector<SideItem<float, Iterations<float>>>&,
                        float);

}  // namespace otloss::cuda
