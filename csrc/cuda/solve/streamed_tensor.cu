#include "cuda/solve/sweeps.cuh"

namespace otloss::cuda {

template void queue_tensor_sweep(Queue&, const SweepArguments<float>&, CostKind, TileKind,
                                 const Grid&);

}  // namespace otloss::cuda
