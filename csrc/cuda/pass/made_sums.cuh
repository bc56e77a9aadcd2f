// Sums over the rows of a plan that is made from points on the way,
//     out_i = sum_j P_ij x_j,  P_ij = exp2(F_i + G_j - k C_ij),
// for the gradients of a solve without cost matrices: products with x in place of the plain sums of
// streamed.cuh, which says who has what.
#pragma once

#include "cuda/pass/pack.cuh"
#include "cuda/pass/streamed.cuh"
#include "cuda/pass/team_sweep.cuh"

namespace otloss::cuda {

template <typename T, typename S, class Block>
OTLOSS_DEVICE void made_sums(Block& block, const RowSums<T, S>& given) {
  const RowSums<T, S>& args = share_arguments(block, given, given.sums - kArgumentBytes);
  dispatch_tiles(args.tiles.kind, args.tiles.d, [&](auto cost, auto difference) {
    using Maker = TileMaker<decltype(cost), decltype(difference)::value, T, Block>;
    sum_rows<Maker, ProductTerms<T, S>>(block, args);
  });
}

// ------------------------------------------------------------------------------ both sides

// Where sums and stages are in shared memory, after the team's scratch.
struct MadeLayout {
  int64_t sums, stages, room;  // bytes

  static MadeLayout of(const Limits& limits) {
    MadeLayout layout;
    layout.sums = SweepShape(sizeof(double)).exchange + kArgumentBytes;
    layout.stages =
        layout.sums + streamed_sums(TileKind::kFma) * static_cast<int64_t>(sizeof(double));
    layout.room = static_cast<int64_t>(limits.shared_per_block) - layout.stages;
    return layout;
  }
  size_t bytes() const { return static_cast<size_t>(stages + room); }
};

// Sums over both sides of a problem for a team whose blocks have some rows and some columns each.
template <typename T, typename S, class Block>
class MadeSides {
 public:
  using Team = TeamShare<S, Block, kTileRows>;

  OTLOSS_DEVICE MadeSides(Block& block, Team& team, const MadeLayout& layout)
      : block_(block), team_(team), layout_(layout) {}

  OTLOSS_DEVICE void place(const PackedPair<T>& points, int64_t batch, int64_t n, int64_t m,
                           bool symmetric, double eps) {
    points_ = points;
    symmetric_ = symmetric;
    k_ = static_cast<T>(kLog2E / eps);
    x_ = packed_cloud(points.x, batch, points.d, n);
    y_ = packed_cloud(points.y, batch, points.d, m);
  }

  OTLOSS_DEVICE const PackedCloud<T>& x() const { return x_; }
  OTLOSS_DEVICE const PackedCloud<T>& y() const { return y_; }

  // Exponents of the block's own rows, set(i), and columns, set(j); all see them after a sync.
  template <typename Set>
  OTLOSS_DEVICE void fill_rows(T* F, Set&& set) {
    team_.for_rows([&](int i) { team_.store(F + team_.first_row() + i, set(i)); });
    pad(F, x_);
  }
  template <typename Set>
  OTLOSS_DEVICE void fill_columns(T* G, Set&& set) {
    team_.for_columns([&](int j) { team_.store(G + j, set(j)); });
    pad(G, y_);
  }

  // (rows,) sums over all columns; F (n,) and G (m,) padded, x (m,) or null.
  OTLOSS_DEVICE void over_columns(const T* F, const T* G, const S* x, bool of_costs, S* out) {
    sums(x_, y_, team_.first_row(), team_.rows(), F, G, x, of_costs, out);
  }
  // (columns,) sums over all rows.
  OTLOSS_DEVICE void over_rows(const T* F, const T* G, const S* x, bool of_costs, S* out) {
    sums(y_, x_, team_.first_column(), team_.columns(), G, F, x, of_costs, out);
  }

 private:
  OTLOSS_DEVICE void pad(T* exponents, const PackedCloud<T>& cloud) {
    if (!team_.first_block()) return;
    for (int64_t i = cloud.count + block_.thread(); i < cloud.stride; i += kSolveThreads)
      team_.store(exponents + i, static_cast<T>(kLog2Zero));
  }

  OTLOSS_NOINLINE void sums(const PackedCloud<T>& rows, const PackedCloud<T>& columns,
                            int64_t first, int count, const T* F, const T* G, const S* x,
                            bool of_costs, S* out) {
    RowTiles<T> tiles{};
    tiles.kind = points_.kind, tiles.d = points_.d, tiles.symmetric = symmetric_, tiles.k = k_;
    tiles.repair = true;
    tiles.rows = rows, tiles.columns = columns;
    tiles.first = first, tiles.last = first + count;
    tiles.begin = 0, tiles.end = columns.count;
    tiles.F = F + first, tiles.G = G;
    tiles.stages = layout_.stages, tiles.room = layout_.room;
    const RowSum what = of_costs ? RowSum::kCost : RowSum::kPlan;
    made_sums(block_, RowSums<T, S>{tiles, what, 0, x, out, layout_.sums});
  }

  Block& block_;
  Team& team_;
  const MadeLayout& layout_;
  PackedPair<T> points_;
  PackedCloud<T> x_, y_;
  bool symmetric_;
  T k_;
};

// Fills the arguments of a kernel for the problems of a pack.
template <typename T, typename S, typename Group>
Grid plan_made_team(const Context& context, const Pack<Group>& pack, TeamArguments<S>* arguments,
                    MadeLayout* layout) {
  const Shape shape = shape_of<T>(pack);
  if (shape.problems == 0) return Grid{0};
  const Limits device = limits(context.device);
  SolvePlan plan{};
  const int64_t each = std::max<int64_t>(1, device.multiprocessors / shape.problems);
  plan.team_size = static_cast<int>(
      std::min(each, ceil_div(std::max(shape.n, shape.m), kTileRows)));
  plan.teams = std::min<int64_t>(shape.problems, device.multiprocessors / plan.team_size);
  plan.barrier = plan.team_size > 1 ? Barrier::kGrid : Barrier::kBlock;
  *layout = MadeLayout::of(device);
  fill_team(context, shape, plan, arguments);
  arguments->rows = packed_stride(shape.n);
  arguments->columns = packed_stride(shape.m);
  return team_grid(plan, static_cast<int64_t>(layout->bytes()));
}

}  // namespace otloss::cuda
