// Solves of problems whose costs are made from points and never stored, in memory O((n + m) d): the
// whole solve (solve.cuh) on the sums of streamed.cuh.
//
// It is one cooperative kernel that decides on the device when to stop, like that of stored
// costs, because a sequence of launches would need four per pass at 2 to 4 us, up to `max_iters` of
// them whether needed or not; a barrier takes 1 to 1.5 us. Blocks own rows and, for the column
// update, columns; what they exchange are potentials and, where they share rows, partial sums.
#include "cuda/solve/streamed.h"

#include <algorithm>

#include "cuda/pass/pack.cuh"
#include "cuda/pass/streamed.cuh"
#include "cuda/solve/solve.cuh"

namespace otloss::cuda {

template <typename T>
void solve_streamed(const Context& context, const std::vector<SolveGroup<T>>& groups,
                    const SolveOptions& options) {
  if (groups.empty()) return;
  const Limits device = limits(context.device);
  const int64_t d = groups[0].points.d;
  const TileKind tiles = tiles_of(context, groups[0].points);
  Packer<T> packer(context, tiles);
  for_each_pack(groups, [&](const Pack<SolveGroup<T>>& pack) {
    const Shape shape = shape_of<T>(pack);
    if (shape.problems == 0) return;
    const SolvePlan plan = choose_streamed_plan(shape, d, device, forced_regime(), tiles);
    StreamedKernel<T> kernel{solve_arguments(context, pack, options, shape, plan)};
    SolveArguments<T>& arguments = kernel.arguments;
    for (int i = 0; i < pack.count; ++i) {
      const SolveGroup<T>& p = pack.items[i];
      arguments.points[i] = packer(p.batch, p.n, p.m, p.points);
    }
    launch(context, kernel, solve_grid(plan));
  });
}

template void solve_streamed(const Context&, const std::vector<SolveGroup<float>>&,
                             const SolveOptions&);
template void solve_streamed(const Context&, const std::vector<SolveGroup<double>>&,
                             const SolveOptions&);

}  // namespace otloss::cuda
