// A solve whose costs are made from points and never stored, in memory O((n + m) d): the sums of
// streamed.cuh in place of the pass over a matrix.
//
// It is one cooperative kernel that decides on the device when to stop, like that of stored
// costs, because a sequence of launches would need four per pass at 2 to 4 us, up to `max_iters` of
// them whether needed or not; a barrier takes 1 to 1.5 us. Blocks own rows and, for the column
// update, columns; what they exchange are potentials and, where they share rows, partial sums.
#pragma once

#include "cuda/pass/pack.cuh"
#include "cuda/pass/streamed.cuh"
#include "cuda/solve/state.cuh"

namespace otloss::cuda {

template <typename T>
struct MadeArguments {
  SolveArguments<T> solve;
  TileKind tiles;
  int parts[2];                      // see SolvePlan
  PackedPair<T> points[kMaxGroups];  // of the groups
  T* vectors;                        // (teams, made_vectors, vector_length)
  unsigned* group_counters;          // (teams, 2, team_size, kCounterLine), 0
};

// Vectors that the blocks of a team share: F, a, s, A, U, and those of the softmin for all parts.
OTLOSS_HOST_DEVICE int made_vectors(const int (&parts)[2]) {
  return 5 + kSoftminVectors * (parts[0] > parts[1] ? parts[0] : parts[1]);
}

template <typename T>
struct MadeState {
  TeamState sharing[2];  // the blocks that share this one's rows, or columns
  RowSums<T> sweep;      // what is the same for all sweeps
  PackedCloud<T> x, y;   // the points
  SplitCloud split_x, split_y;
  T *F, *a, *s;  // (n,) of all blocks
  T* A;          // (n,) F + log2 a, for all blocks to see
  T* U;          // (m,) k g, then k gt
  T* scratch;    // (kSoftminVectors, parts, max(n, m))
};

template <typename T, class Block, bool kTensor>
class MadeCosts {
 public:
  // Blocks have whole pieces of so many rows and columns.
  using Team = TeamSweep<T, Block, kTileRows>;
  static constexpr bool kUpdatesColumns = true;

  OTLOSS_DEVICE MadeCosts(Block& block, const MadeArguments<T>& arguments, Team& team,
                          SolverState<T>& state, MadeState<T>& made)
      : block_(block), args_(arguments), team_(team), s_(state), made_(made) {}

  // Where the blocks of the team keep what does not fit into shared memory; by one thread, once.
  OTLOSS_DEVICE void begin() {
    const int64_t length = args_.solve.vector_length;
    T* vectors = args_.vectors + team_.index() * made_vectors(args_.parts) * length;
    for (T** const v : {&made_.F, &made_.a, &made_.s, &made_.A, &made_.U, &made_.scratch})
      *v = vectors, vectors += length;
    for (int side = 0; side < 2; ++side) made_.sharing[side] = sharing(side);
    const SharedLayout& shared = args_.solve.shared;
    made_.sweep.sums = shared.sums;
    made_.sweep.tiles.made_by = args_.tiles;
    made_.sweep.tiles.stages = shared.tile;
    made_.sweep.tiles.room = shared.bytes - shared.tile;
  }

  OTLOSS_DEVICE void place(const SolveGroup<T>& p, int64_t batch) {
    const PackedPair<T>& points = args_.points[&p - args_.solve.groups.items];
    made_.sweep.tiles.kind = points.kind;
    made_.sweep.tiles.d = points.d;
    made_.sweep.tiles.symmetric = p.symmetric;
    made_.x = packed_cloud(points.x, batch, points.d, p.n);
    made_.y = packed_cloud(points.y, batch, points.d, p.m);
    made_.split_x = points.split_x.cloud(batch, points.d, p.n);
    made_.split_y = points.split_y.cloud(batch, points.d, p.m);
    const int64_t first = team_.first_row();
    s_.F = made_.F + first, s_.a = made_.a + first, s_.s = made_.s + first;
  }

  // A bound of max |C| from the largest norms, in the first place; 1 in the second if one is not
  // finite. Also fills what is read of the vectors beyond their ends.
  OTLOSS_DEVICE void load(double (&largest)[2]) {
    double norms[3] = {0, 0, 0};
    const auto look = [&](T weight, T norm, double& most) {
      if (!(weight > T(0))) return;
      if (!(norm <= std::numeric_limits<T>::max())) norms[2] = 1;
      most = Max::join(most, static_cast<double>(norm));
    };
    team_.for_rows([&](int i) { look(s_.a[i], made_.x.norm[team_.first_row() + i], norms[0]); });
    team_.for_columns([&](int j) { look(s_.b[j], made_.y.norm[j], norms[1]); });
    if (team_.first_block()) {
      const auto fill = [&](T* v, const PackedCloud<T>& cloud) {
        for (int64_t i = cloud.count + block_.thread(); i < cloud.stride; i += Team::kThreads)
          team_.store(v + i, T(0));
      };
      fill(made_.A, made_.x);
      fill(s_.G, made_.y);
    }
    team_.team().template reduce<Max>(norms);
    const CostKind kind = made_.sweep.tiles.kind;
    if (block_.thread() == 0) {
      const double k = kLog2E / args_.solve.options.eps;
      made_.sweep.tiles.repair = sizeof(T) > 4 || needs_repair(kind, k, norms[0], norms[1]);
    }
    largest[0] = cost_bound(kind, norms[0], norms[1]);
    largest[1] = norms[2];
  }

  // F exact for G, s = row sums before; then gt and q = column sums over b, of the plan of F,
  // damped where rows are.
  OTLOSS_DEVICE void pass() {
    update(false);
    if (s_.symmetric) return;
    const T damping = static_cast<T>(s_.damping), k = s_.k;
    team_.for_rows([&](int i) {
      team_.store(made_.A + team_.first_row() + i, damping * s_.F[i] + log2_weight(s_.a[i]));
    });
    team_.for_columns([&](int j) { made_.U[j] = k * s_.trial_g[j]; });
    team_.sync();
    update(true);
    team_.for_columns([&](int j) { s_.trial_gt[j] = s_.to_cost * made_.U[j]; });
  }

  OTLOSS_DEVICE void columns() {}
  OTLOSS_DEVICE void guard() {}

  // <P, C> over this thread's share, for the published G.
  OTLOSS_NOINLINE double transport() {
    Team_ rows(block_, made_.sharing[0]);
    const RowTiles<T> tiles = sweep(false).tiles;
    const T* const costs = softmin(false, rows).costs();
    double total = 0;
    for (int64_t i = tiles.first + block_.thread(); i < tiles.last; i += Team::kThreads)
      total += static_cast<double>(s_.weights[i]) * static_cast<double>(costs[i - tiles.first]);
    return total;
  }

  OTLOSS_DEVICE T entry(int64_t i, int64_t j) const {
    const RowTiles<T>& tiles = made_.sweep.tiles;
    return pair_cost(tiles.kind, tiles.d, tiles.symmetric, made_.x, i, made_.y, j);
  }

 private:
  using Team_ = cuda::Team<Block, kSolveThreads>;

  OTLOSS_DEVICE TeamState sharing(int side) const {
    TeamState group{Barrier::kBlock, 0, 1, 0, 0, nullptr, nullptr, nullptr};
    if (args_.parts[side] == 1) return group;
    const int rank = team_.team().rank(), size = team_.team().size();
    group.barrier = args_.solve.team.barrier;
    group.size = args_.parts[side];
    group.rank = rank % group.size;
    group.counter = args_.group_counters +
                    ((team_.index() * 2 + side) * size + rank - group.rank) * kCounterLine;
    return group;
  }

  // The sweep over columns for the rows of this block and those that share them, or over rows for
  // their columns: this block's part of it.
  OTLOSS_DEVICE RowSums<T> sweep(bool over_rows) const {
    const TeamState& group = made_.sharing[over_rows ? 1 : 0];
    RowSums<T> sweep = made_.sweep;
    RowTiles<T>& tiles = sweep.tiles;
    tiles.k = s_.k;
    tiles.rows = over_rows ? made_.y : made_.x, tiles.columns = over_rows ? made_.x : made_.y;
    tiles.split_rows = over_rows ? made_.split_y : made_.split_x;
    tiles.split_columns = over_rows ? made_.split_x : made_.split_y;
    const auto cut = [](int64_t count, int64_t share, int64_t from) {
      return share * from < count ? share * from : count;
    };
    const int64_t own = over_rows ? team_.share().most_columns : team_.share().most_rows;
    const int64_t before = team_.team().rank() - group.rank;
    tiles.first = cut(tiles.rows.count, own, before);
    tiles.last = cut(tiles.rows.count, own, before + group.size);
    const int64_t part = ceil_div(tiles.columns.count, group.size * kPackedAlign) * kPackedAlign;
    tiles.begin = cut(tiles.columns.count, part, group.rank);
    tiles.end = cut(tiles.columns.count, part, group.rank + 1);
    tiles.G = over_rows ? made_.A : s_.G;
    return sweep;
  }

  OTLOSS_DEVICE Softmin<T, Block, kTensor> softmin(bool over_rows, Team_& group) {
    const RowSums<T> sums = sweep(over_rows);
    const int64_t first = sums.tiles.first;
    const int own =
        static_cast<int>((over_rows ? team_.first_column() : team_.first_row()) - first);
    const int count = over_rows ? team_.columns() : team_.rows();
    const SharedRows<T> rows{(over_rows ? s_.b : s_.weights) + first,
                             (over_rows ? made_.U : made_.F) + first,
                             (over_rows ? s_.q : made_.s) + first,
                             own,
                             own + count,
                             made_.scratch + first,
                             args_.solve.vector_length};
    return {block_, group, sums, rows};
  }

  OTLOSS_NOINLINE void update(bool over_rows) {
    Team_ group(block_, made_.sharing[over_rows ? 1 : 0]);
    softmin(over_rows, group).update();
  }

  Block& block_;
  const MadeArguments<T>& args_;
  Team& team_;
  SolverState<T>& s_;
  MadeState<T>& made_;
};

}  // namespace otloss::cuda
