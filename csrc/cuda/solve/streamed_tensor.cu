#include "cuda/pass/sweeps.cuh"

namespace otloss::cuda {

void queue_tensor_sweep(Queue& queue, const SweepArguments<RowSums<float>>& arguments,
                        CostKind kind, TileKind made_by, const Grid& grid) {
  dispatch_tensor_tiles(kind, made_by, [&](auto cost, auto low) {
    using Tiles = TensorTiles<decltype(cost), decltype(low)::value>;
    queue(SweepKernel<float, float, SolveSums, Tiles>{arguments}, grid);
  });
}

}  // namespace otloss::cuda
