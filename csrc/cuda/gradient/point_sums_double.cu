#include "cuda/gradient/point_sums_launch.cuh"

namespace otloss::cuda {

template void point_gradient_sums(const Context&, const std::vector<PointGradientGroup<double>>&,
                                  double);
template void implicit_sums(const Context&, const Pack<ImplicitGroup<double>>&,
                            const PlanOfPoints<double> (&)[kMaxGroups], double, Objective);
template void unrolled_sums(const Context&, const Pack<UnrolledGroup<double>>&,
                            const IterationsOfPoints<double> (&)[kMaxGroups], double, Objective);

}  // namespace otloss::cuda
