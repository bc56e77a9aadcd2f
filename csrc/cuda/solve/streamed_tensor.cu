#include "cuda/solve/streamed_launch.cuh"

namespace otloss::cuda {

template void launch_streamed<float, true>(const Context&, const MadeArguments<float>&,
                                           const Grid&);

}  // namespace otloss::cuda
