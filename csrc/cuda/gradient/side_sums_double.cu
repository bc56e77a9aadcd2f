#include "cuda/gradient/side_sums.cuh"

namespace otloss::cuda {

template void sum_sides(const Context&, const std::vector<SideItem<double, SolvedPlan<double>>>&,
                        double);
template void sum_sides(const Context&, const std::vector<SideItem<double, Iterations<double>>>&,
                        double);

}  // namespace otloss::cuda
