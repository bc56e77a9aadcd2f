// A pass over a matrix that uses every entry twice, for the gradients of a solve: row sums, and
// column sums weighted by what was made of them,
//     s_i = sum_j A_ij x_j,   w_i = finish(s_i),   y_j = sum_i A_ij w_i.
//
// Who has what is as in solve.cuh: a team of blocks has one problem, a block has a contiguous part
// of its rows, whose part of the matrix (the tile) stands in shared memory or is read from global
// memory, and the same share of its columns' vectors. A row team of 1 to all warps of a block takes
// kRows rows at once; lane l of its warp w has the columns
//     j = v * 32 W + 32 w + l,  v < kColumns      (W warps in the row team)
// so that kRows * kColumns entries stand in registers between their two uses and column sums stay
// there for the whole pass. With more columns than that, or where the two uses need different
// entries (Work::again), rows and columns are two sweeps: a warp per row, then a thread per column.
//
// The matrix is given by a Work, whose indices are within the block's rows and the problem's
// columns:
//     Row row(i), Column column(j)      what entries are made from
//     S entry(row, column, i, j)        A_ij for the row sum; finite
//     S again(row, column, i, j)        A_ij for the column sum, where the uses are apart
//     S factor(j)                       x_j
//     S finish(i, s, leader)            w_i; several threads ask, the leader may write
#pragma once

#include <algorithm>

#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"
#include "cuda/solve/plan.h"

namespace otloss::cuda {

constexpr int64_t kCounterLine = 32;  // counters of two teams are a cache line apart

// An entry of a plan by its base-2 exponent. A clamped exponential stands for 0, so that padding
// gets exactly 0.
template <typename T>
OTLOSS_DEVICE T plan_entry(T weight, T t) {
  return t > static_cast<T>(-kExp2Limit) ? weight * fast_exp2(t) : T(0);
}

// Sums are of type S. Offsets into shared memory, in bytes.
template <typename S>
struct SweepShape {
  static constexpr int kThreads = kSolveThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kColumns = kFewColumns;
  static constexpr int kRows = kEntries<S> / kColumns;
  static constexpr int kLanes = kWarp / kRows;  // lanes that look after one row of a step
  static_assert(kRows >= 1 && (kRows & (kRows - 1)) == 0, "scatter_reduce needs a power of two");

  static constexpr int64_t kTeam = 0;  // team_doubles doubles
  static constexpr int64_t kExchange =
      kTeam + team_doubles(kThreads) * static_cast<int64_t>(sizeof(double));
  static constexpr int64_t kColumnSums =
      kExchange + 2 * kWarps * kRows * static_cast<int64_t>(sizeof(S));
  static constexpr int64_t kTile =
      kColumnSums + int64_t{kThreads} * kColumns * static_cast<int64_t>(sizeof(S));
  static_assert(kExchange % 16 == 0 && kColumnSums % 16 == 0 && kTile % 16 == 0, "aligned");
};

template <typename S>
struct TeamArguments {
  Barrier barrier;
  int team_size;       // blocks per problem
  bool resident;       // the tile stands in shared memory
  int64_t teams;       // team t has problems t, t + teams, ...
  int64_t problems;    // of all groups
  int64_t rows;        // at least every n
  int64_t columns;     // at least every m, and a multiple of 32
  S* column_parts;     // (teams, team_size, columns)
  S* row_factors;      // (teams, rows) w, where rows and columns are apart
  double* team_parts;  // (teams, 2, team_size, kTeamValues)
  unsigned* counters;  // (teams, kCounterLine), 0
};

// Memory that other blocks of the team write, past L1; a block alone has no need of that.
template <class Block>
struct TeamMemory {
  Block block;
  bool alone;

  template <typename U>
  OTLOSS_DEVICE U load(const U* p) const {
    return alone ? *p : block.load(p);
  }
  template <typename U>
  OTLOSS_DEVICE void store(U* p, U value) const {
    if (alone)
      *p = value;
    else
      block.store(p, value);
  }
};

// What a pass needs to know of its block.
template <typename S>
struct PassState {
  int rows, m;
  int warps;  // of a row team
  bool two_sweeps;
  bool alone;      // the team is this block
  S* exchange;     // (2, kWarps, kRows) shared
  S* sums;         // (row_teams, columns of a row team) shared
  S* part;         // (m,) out: column sums over the block's rows
  S* row_factors;  // (rows,) w, where rows and columns are apart
};

template <typename S, class Block, class Work>
class Pass {
 public:
  OTLOSS_DEVICE Pass(Block& block, const PassState<S>& state, const Work& work)
      : block_(block),
        state_(state),
        work_(work),
        memory_{block, state.alone},
        thread_(block.thread()),
        lane_(block.thread() % kWarp),
        warp_(block.thread() / kWarp) {}

  // Rows and columns past the end repeat the last one; nothing is made of their sums.
  OTLOSS_DEVICE void one_sweep() {
    const int rows = state_.rows, m = state_.m, warps = state_.warps;
    const int row_teams = kWarps / warps, row_team = warp_ / warps, warp = warp_ % warps;
    const int chunk = warps * kWarp;         // columns between v and v + 1
    const int first = warp * kWarp + lane_;  // column of v = 0
    const int own = lane_ / kLanes;          // the row of a step that this lane looks after
    typename Work::Column column[kColumns];
    S x[kColumns], y[kColumns], e[kRows][kColumns];
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      const int j = v * chunk + first;
      column[v] = work_.column(j < m ? j : m - 1);
      x[v] = j < m ? work_.factor(j) : S(0);
      y[v] = S(0);
    }
    const int steps = (rows + row_teams * kRows - 1) / (row_teams * kRows);
    for (int step = 0; step < steps; ++step) {
      const int base = (step * row_teams + row_team) * kRows;
      S partial[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int i = base + r < rows ? base + r : rows - 1;
        const typename Work::Row row = work_.row(i);
        partial[r] = S(0);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          e[r][v] = S(0);
          if (v * chunk + warp * kWarp >= m) continue;  // the same for all lanes
          const int j = v * chunk + first < m ? v * chunk + first : m - 1;
          e[r][v] = work_.entry(row, column[v], i, j);
          partial[r] += e[r][v] * x[v];
        }
      }
      const S sum = over_row_team(partial, row_team);
      const int i = base + own;
      const bool leader = warp == 0 && lane_ % kLanes == 0;
      const S w = i < rows ? work_.finish(i, sum, leader) : S(0);
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const S wr = block_.shuffle(w, r * kLanes);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) y[v] += wr * e[r][v];
      }
    }
    if (row_teams == 1) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (v * chunk + first < m) memory_.store(state_.part + v * chunk + first, y[v]);
      return;
    }
#pragma unroll
    for (int v = 0; v < kColumns; ++v)
      state_.sums[row_team * chunk * kColumns + v * chunk + first] = y[v];
    block_.sync();
    for (int j = thread_; j < m; j += kThreads) {
      S total = S(0);
      for (int t = 0; t < row_teams; ++t) total += state_.sums[t * chunk * kColumns + j];
      memory_.store(state_.part + j, total);
    }
  }

  OTLOSS_DEVICE void two_sweeps() {
    const int rows = state_.rows, m = state_.m;
    for (int i = warp_; i < rows; i += kWarps) {
      const typename Work::Row row = work_.row(i);
      S sum[1] = {S(0)};
      for (int j = lane_; j < m; j += kWarp)
        sum[0] += work_.entry(row, work_.column(j), i, j) * work_.factor(j);
      warp_sum(block_, sum);
      const S w = work_.finish(i, sum[0], lane_ == 0);
      if (lane_ == 0) state_.row_factors[i] = w;
    }
    block_.sync();
    for (int j = thread_; j < m; j += kThreads) {
      const typename Work::Column column = work_.column(j);
      S total = S(0);
      for (int i = 0; i < rows; ++i)
        total += state_.row_factors[i] * work_.again(work_.row(i), column, i, j);
      memory_.store(state_.part + j, total);
    }
  }

 private:
  using Shape = SweepShape<S>;
  static constexpr int kThreads = Shape::kThreads, kWarps = Shape::kWarps;
  static constexpr int kColumns = Shape::kColumns, kRows = Shape::kRows, kLanes = Shape::kLanes;

  // The sum, over all warps of a row team, of the row that this lane looks after.
  OTLOSS_DEVICE S over_row_team(S (&partial)[kRows], int row_team) {
    const int own = lane_ / kLanes;
    const S joined = scatter_reduce<Sum>(block_, partial);
    S* exchange = state_.exchange + parity_ * kWarps * kRows;
    parity_ ^= 1;
    if (lane_ % kLanes == 0) exchange[warp_ * kRows + own] = joined;
    if (state_.warps > 1)
      block_.sync();
    else
      block_.warp_sync();
    S sum = S(0);
    for (int w = lane_ % kLanes; w < state_.warps; w += kLanes)
      sum += exchange[(row_team * state_.warps + w) * kRows + own];
    for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += block_.shuffle_xor(sum, mask);
    return sum;
  }

  Block& block_;
  const PassState<S>& state_;
  const Work& work_;
  const TeamMemory<Block> memory_;
  const int thread_, lane_, warp_;
  int parity_ = 0;
};

// Not inlined: the loops over entries have all registers to themselves.
template <typename S, class Block, class Work>
OTLOSS_NOINLINE void run_pass(Block block, PassState<S> state, Work work) {
  Pass<S, Block, Work> pass(block, state, work);
  if (state.two_sweeps)
    pass.two_sweeps();
  else
    pass.one_sweep();
}

// One problem at a time for one thread: its team, and its block's share of the rows and columns, in
// pieces of kShare.
template <typename S, class Block, int kShare>
class TeamShare {
 public:
  static constexpr int kThreads = kSolveThreads, kWarps = kThreads / kWarp;

  // The team's scratch is at the start of shared memory.
  OTLOSS_DEVICE TeamShare(Block& block, const TeamArguments<S>& arguments)
      : block_(block),
        args_(arguments),
        thread_(block.thread()),
        index_(block.x() / arguments.team_size),
        team_(block,
              TeamState{arguments.barrier, static_cast<int>(block.x() % arguments.team_size),
                        arguments.team_size, 0, 0, arguments.counters + index_ * kCounterLine,
                        arguments.team_parts + index_ * 2 * arguments.team_size * kTeamValues,
                        block.template shared<double>()}) {}

  // Calls function(group, batch) for the problems of this team.
  template <typename Groups, typename F>
  OTLOSS_DEVICE void for_problems(const Groups& groups, F&& function) {
    for (int64_t p = index_; p < args_.problems; p += args_.teams) {
      int64_t batch = p;
      int group = 0;
      while (batch >= groups.items[group].batch) batch -= groups.items[group++].batch;
      place(groups.items[group].n, groups.items[group].m);
      function(groups.items[group], batch);
      team_.sync();  // before the next problem takes the buffers
    }
  }

  OTLOSS_DEVICE int64_t index() const { return index_; }  // of the team
  OTLOSS_DEVICE bool first_block() const { return team_.rank() == 0; }
  OTLOSS_DEVICE bool first_thread() const { return first_block() && thread_ == 0; }
  OTLOSS_DEVICE int64_t first_row() const { return first_row_; }
  OTLOSS_DEVICE int first_column() const { return first_column_; }
  OTLOSS_DEVICE int rows() const { return rows_; }
  OTLOSS_DEVICE int columns() const { return column_count_; }

  OTLOSS_DEVICE void sync() { team_.sync(); }
  OTLOSS_DEVICE void block_sync() { block_.sync(); }
  OTLOSS_DEVICE TeamMemory<Block> memory() const { return {block_, team_.size() == 1}; }
  template <typename U>
  OTLOSS_DEVICE U load(const U* p) const {
    return memory().load(p);
  }
  template <typename U>
  OTLOSS_DEVICE void store(U* p, U value) const {
    memory().store(p, value);
  }
  template <int kCount>
  OTLOSS_DEVICE void sum(double (&values)[kCount]) {
    team_.template reduce<Sum>(values);
  }

  // Rows i < rows of the block, each by one thread, and the block's columns, each by one thread.
  template <typename F>
  OTLOSS_DEVICE void for_rows(F&& function) const {
    for (int i = thread_; i < rows_; i += kThreads) function(i);
  }
  template <typename F>
  OTLOSS_DEVICE void for_columns(F&& function) const {
    for (int j = first_column_ + thread_; j < first_column_ + column_count_; j += kThreads)
      function(j);
  }

 protected:
  OTLOSS_DEVICE void place(int64_t n, int64_t m) {
    m_ = static_cast<int>(m);
    const int64_t rows = ceil_div(n, team_.size() * kShare) * kShare;
    first_row_ = rows * team_.rank() < n ? rows * team_.rank() : n;
    rows_ = static_cast<int>((first_row_ + rows < n ? first_row_ + rows : n) - first_row_);
    column_share_ = static_cast<int>(ceil_div(m, team_.size() * kShare) * kShare);
    first_column_ = column_share_ * team_.rank() < m_ ? column_share_ * team_.rank() : m_;
    column_count_ =
        (first_column_ + column_share_ < m_ ? first_column_ + column_share_ : m_) - first_column_;
  }

  Block& block_;
  const TeamArguments<S>& args_;
  const int thread_;
  const int64_t index_;
  Team<Block, kThreads> team_;
  int64_t first_row_;
  int m_, rows_, first_column_, column_count_, column_share_;
};

// With the pass over a matrix in memory.
template <typename T, typename S, class Block>
class TeamSweep : public TeamShare<S, Block, 1> {
 public:
  using Base = TeamShare<S, Block, 1>;
  using Shape = SweepShape<S>;
  using Base::kThreads, Base::kWarps;

  OTLOSS_DEVICE TeamSweep(Block& block, const TeamArguments<S>& arguments)
      : Base(block, arguments),
        sums_(at<S>(Shape::kColumnSums)),
        parts_(arguments.column_parts + index_ * arguments.team_size * arguments.columns) {
    static_assert(Shape::kTeam == 0, "where the team's scratch is");
  }

  // The tile's place in shared memory, or `global`.
  OTLOSS_DEVICE T* tile(T* global) const { return args_.resident ? at<T>(Shape::kTile) : global; }

  // All entries of the block's rows: a warp per row, neighbouring lanes at neighbouring columns.
  template <typename F>
  OTLOSS_DEVICE void for_entries(F&& function) const {
    for (int i = thread_ / kWarp; i < rows_; i += kWarps)
      for (int j = thread_ % kWarp; j < m_; j += kWarp) function(i, j);
  }

  // The block's part of y goes to where join finds it.
  template <class Work>
  OTLOSS_DEVICE void pass(const Work& work, bool apart = false) {
    PassState<S> state;
    state.m = m_, state.rows = rows_;
    state.warps = 1;
    while (state.warps < kWarps && state.warps * kWarp * Shape::kColumns < m_) state.warps *= 2;
    state.two_sweeps = apart || kThreads * Shape::kColumns < m_;
    state.alone = team_.size() == 1;
    state.exchange = at<S>(Shape::kExchange);
    state.sums = sums_;
    state.part = parts_ + team_.rank() * args_.columns;
    state.row_factors = args_.row_factors + index_ * args_.rows + first_row_;
    run_pass(block_, state, work);
  }

  // After a pass and a sync: set(j, y_j) for the columns of this block, each by one thread, whose
  // writes the block may read when this returns.
  template <typename F>
  OTLOSS_DEVICE void join(F&& set) {
    // With fewer columns than threads, several threads share the blocks' parts.
    int width = kThreads;
    while (width > kWarp && width / 2 >= column_share_) width /= 2;
    const int groups = kThreads / width, group = thread_ / width;
    for (int begin = 0; begin < column_share_; begin += width) {
      const int local = begin + thread_ % width;
      const bool mine = local < column_count_;
      const int j = first_column_ + local;
      S total = S(0);
      if (mine)
        for (int rank = group; rank < team_.size(); rank += groups)
          total += this->load(parts_ + rank * args_.columns + j);
      sums_[thread_] = total;
      block_.sync();
      if (mine && group == 0) {
        for (int other = 1; other < groups; ++other) total += sums_[other * width + thread_];
        set(j, total);
      }
      block_.sync();
    }
  }

 private:
  using Base::args_, Base::block_, Base::column_count_, Base::column_share_, Base::first_column_;
  using Base::first_row_, Base::index_, Base::m_, Base::rows_, Base::team_, Base::thread_;

  template <typename U>
  OTLOSS_DEVICE U* at(int64_t offset) const {
    return reinterpret_cast<U*>(block_.template shared<unsigned char>() + offset);
  }

  S* const sums_;   // (kThreads,)
  S* const parts_;  // (team_size, columns)
};

// ----------------------------------------------------------------------------------- host side

// What does not depend on where the matrix is.
template <typename S>
void fill_team(const Context& context, const Shape& shape, const SolvePlan& plan,
               TeamArguments<S>* arguments) {
  arguments->barrier = plan.barrier;
  arguments->team_size = plan.team_size;
  arguments->teams = plan.teams;
  arguments->problems = shape.problems;
  arguments->team_parts = context.scratch<double>(plan.teams * 2 * plan.team_size * kTeamValues);
  arguments->counters = context.scratch<unsigned>(plan.teams * kCounterLine);
  if (plan.barrier == Barrier::kGrid)
    clear(context, arguments->counters, plan.teams * kCounterLine * sizeof(unsigned));
}

// Fills the arguments of a kernel for the problems of a pack. The team is the one that the solve
// would have, which moves the same entries between the same barriers.
template <class Kernel, typename T, typename S, typename Group>
Grid plan_team(const Context& context, const Pack<Group>& pack, TeamArguments<S>* arguments) {
  const Shape shape = shape_of<T>(pack);
  if (shape.problems == 0) return Grid{0};
  const Limits device = limits(context.device);
  const auto bytes = [&](const SolvePlan& plan) {  // with the tile, if that fits
    const int64_t tile = ceil_div(shape.n, plan.team_size) * shape.m * shape.element;
    const int64_t both = SweepShape<S>::kTile + tile;
    const bool fits = plan.resident && both <= static_cast<int64_t>(device.shared_per_block);
    return static_cast<size_t>(fits ? both : SweepShape<S>::kTile);
  };
  // Gradients of a streamed solve that need the matrices get them.
  const Regime asked = forced_regime(), forced = asked == Regime::kStreamed ? Regime::kAuto : asked;
  const SolvePlan plan = choose_plan(shape, device, forced, [&](const SolvePlan& candidate) {
    return cluster_fits<Kernel>(context, candidate.team_size, bytes(candidate));
  });
  Grid grid;
  grid.x = plan.teams * plan.team_size;
  grid.shared = bytes(plan);
  grid.cluster = plan.barrier == Barrier::kCluster ? plan.team_size : 1;
  grid.cooperative = plan.barrier == Barrier::kGrid;
  fill_team(context, shape, plan, arguments);
  arguments->resident = grid.shared > SweepShape<S>::kTile;
  arguments->rows = shape.n;
  arguments->columns = plan.vector_length;
  arguments->column_parts = context.scratch<S>(plan.teams * plan.team_size * plan.vector_length);
  arguments->row_factors = context.scratch<S>(plan.teams * shape.n);
  return grid;
}

}  // namespace otloss::cuda
