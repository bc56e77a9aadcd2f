// The sweeps of a solve by launches: apart from its control, since both take long to compile.
#include "cuda/solve/launched_costs.cuh"

namespace otloss::cuda {

template <typename T>
void queue_solve_sweep(Queue& queue, const Sweeps<T>& sweeps, const PackedPair<T>& points,
                       TileKind tiles) {
  if constexpr (sizeof(T) == 4)
    if (tiles == TileKind::kTensor || tiles == TileKind::kTensorHigh)
      return dispatch_tensor_tiles(points.kind, tiles, [&](auto made) {
        queue(SweepKernel<T, T, false, decltype(made)>{sweeps}, sweeps.grid());
      });
  queue_sweep<false>(queue, sweeps, points);
}

template void queue_solve_sweep(Queue&, const Sweeps<float>&, const PackedPair<float>&, TileKind);
template void queue_solve_sweep(Queue&, const Sweeps<double>&, const PackedPair<double>&, TileKind);

}  // namespace otloss::cuda
