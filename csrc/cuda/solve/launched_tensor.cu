#include "cuda/pass/sweeps.cuh"

namespace otloss::cuda {

void queue_tensor_sweep(Queue& queue, const SweepArguments<float, float>& arguments, CostKind kind,
                        TileKind made_by, const Grid& grid) {
  dispatch_tensor_tiles(kind, made_by, [&](auto tiles) {
    queue(SweepKernel<float, float, false, decltype(tiles)>{arguments}, grid);
  });
}

}  // namespace otloss::cuda
