#include "cuda/gradient/point_sums_launch.cuh"

namespace otloss::cuda {

template void point_gradient_sums(const Context&, const std::vector<PointGradientGroup<float>>&,
                                  double);
template void implicit_sums(const Context&, const Pack<ImplicitGroup<float>>&,
                            const PlanOfPoints<float> (&)[kMaxGroups], double, Objective);
template void unrolled_sums(const Context&, const Pack<UnrolledGroup<float>>&,
                            const IterationsOfPoints<float> (&)[kMaxGroups], double, Objective);

}  // namespace otloss::cuda
