// What the kernels of a solve and of its gradients have in common: a team of blocks has one
// problem, a block has a contiguous part of its rows, whose part of the matrix (the tile) stands in
// shared memory or is read from global memory, and the same share of its columns' vectors.
#pragma once

#include <algorithm>

#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"
#include "cuda/pass/pass.cuh"
#include "cuda/solve/plan.h"

namespace otloss::cuda {

constexpr int64_t kCounterLine = 32;  // counters of two teams are a cache line apart

// An entry of a plan by its base-2 exponent. A clamped exponential stands for 0, so that padding
// gets exactly 0.
template <typename T>
OTLOSS_DEVICE T plan_entry(T weight, T t) {
  return t > static_cast<T>(-kExp2Limit) ? weight * fast_exp2(t) : T(0);
}

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
  S* wide;             // (teams, 2, rows), where the matrix is wider than a panel
  double* team_parts;  // (teams, 2, team_size, kTeamValues)
  unsigned* counters;  // (teams, kCounterLine), 0
};

// One problem at a time: the team, and its block's share of the rows and columns.
template <typename S, class Block, int kBlockThreads = kSolveThreads>
class TeamShare {
 public:
  static constexpr int kThreads = kBlockThreads, kWarps = kThreads / kWarp;

  OTLOSS_DEVICE TeamShare(Block& block, const TeamArguments<S>& arguments)
      : block_(block),
        args_(arguments),
        scratch_(*block.template shared<TeamScratch>()),
        team_(block, scratch_.state) {
    if (block.thread() == 0) {
      const int64_t index = block.x() / args_.team_size;
      scratch_.share.index = index;
      scratch_.state = {args_.barrier,
                        static_cast<int>(block.x() % args_.team_size),
                        args_.team_size,
                        0,
                        0,
                        args_.counters + index * kCounterLine,
                        args_.team_parts + index * 2 * args_.team_size * kTeamValues,
                        scratch_.values};
    }
    block.sync();
  }

  // Calls function(group, batch) for the problems of this team.
  template <typename Groups, typename F>
  OTLOSS_DEVICE void for_problems(const Groups& groups, F&& function) {
    for (int64_t p = index(); p < args_.problems; p += args_.teams) {
      int64_t batch = p;
      const int group = group_of(groups, &batch);
      if (block_.thread() == 0) place(groups.items[group].n, groups.items[group].m);
      block_.sync();
      function(groups.items[group], batch);
      team_.sync();  // before the next problem takes the buffers
    }
  }

  OTLOSS_DEVICE const Share& share() const { return scratch_.share; }
  OTLOSS_DEVICE int64_t index() const { return share().index; }  // of the team
  OTLOSS_DEVICE bool first_thread() const { return team_.rank() == 0 && block_.thread() == 0; }
  OTLOSS_DEVICE int64_t first_row() const { return share().first_row; }
  OTLOSS_DEVICE int first_column() const { return share().first_column; }
  OTLOSS_DEVICE int rows() const { return share().rows; }
  OTLOSS_DEVICE int columns() const { return share().columns; }

  OTLOSS_DEVICE Team<Block, kThreads>& team() { return team_; }
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
    const int end = rows();
    for (int i = block_.thread(); i < end; i += kThreads) function(i);
  }
  template <typename F>
  OTLOSS_DEVICE void for_columns(F&& function) const {
    const int begin = first_column(), end = begin + columns();
    for (int j = begin + block_.thread(); j < end; j += kThreads) function(j);
  }

 private:
  OTLOSS_DEVICE void place(int64_t n, int64_t m) {
    Share& s = scratch_.share;
    const auto cut = [this](int64_t count, int64_t* share, int64_t* first) {
      *share = ceil_div(count, team_.size());
      *first = *share * team_.rank() < count ? *share * team_.rank() : count;
      return static_cast<int>((*first + *share < count ? *first + *share : count) - *first);
    };
    int64_t share, first;
    s.m = static_cast<int>(m);
    s.rows = cut(n, &s.most_rows, &s.first_row);
    s.columns = cut(m, &share, &first);
    s.most_columns = static_cast<int>(share), s.first_column = static_cast<int>(first);
  }

 protected:
  Block& block_;
  const TeamArguments<S>& args_;
  TeamScratch& scratch_;
  Team<Block, kThreads> team_;
};

// With the pass over a matrix in memory.
template <typename S, class Block, int kBlockThreads = kSolveThreads>
class TeamSweep : public TeamShare<S, Block, kBlockThreads> {
 public:
  using Base = TeamShare<S, Block, kBlockThreads>;
  using Base::kThreads, Base::kWarps;

  OTLOSS_DEVICE TeamSweep(Block& block, const TeamArguments<S>& arguments)
      : Base(block, arguments) {}

  // What is in shared memory after the pass's own.
  template <typename U>
  OTLOSS_DEVICE U* at(int64_t offset) const {
    return reinterpret_cast<U*>(block_.template shared<unsigned char>() + offset);
  }

  // All entries of the block's rows: a warp per row, neighbouring lanes at neighbouring columns.
  template <typename F>
  OTLOSS_DEVICE void for_entries(F&& function) const {
    const int rows = this->rows(), m = this->share().m;
    for (int i = block_.thread() / kWarp; i < rows; i += kWarps)
      for (int j = block_.thread() % kWarp; j < m; j += kWarp) function(i, j);
  }

  // A block's (m,) column sums; those of this block.
  OTLOSS_DEVICE S* part_of(int rank) const {
    return args_.column_parts + (this->index() * args_.team_size + rank) * args_.columns;
  }

  // The block's part of y goes to where join finds it.
  template <class Work>
  OTLOSS_DEVICE void pass(const Work& work, bool columns = true) {
    PassState<S> state;
    state.rows = this->rows(), state.m = this->share().m;
    state.alone = team_.size() == 1, state.columns = columns;
    state.exchange = at<S>(kShape.exchange), state.sums = at<S>(kShape.sums);
    state.part = part_of(team_.rank());
    state.wide = args_.wide + this->index() * 2 * args_.rows + 2 * this->first_row();
    run_pass<kThreads>(block_, state, work);
  }

  // After a pass and a sync: set(j, y_j) for the columns of this block, each by one thread, whose
  // writes the block may read when this returns.
  template <typename F>
  OTLOSS_DEVICE void join(F&& set) {
    // With fewer columns than threads, several threads share the blocks' parts.
    const int thread = block_.thread(), most = this->share().most_columns;
    S* const sums = at<S>(kShape.sums);
    int width = kThreads;
    while (width > kWarp && width / 2 >= most) width /= 2;
    const int groups = kThreads / width, group = thread / width;
    for (int begin = 0; begin < most; begin += width) {
      const int local = begin + thread % width;
      const bool mine = local < this->columns();
      const int j = this->first_column() + local;
      S total = S(0);
      if (mine)
        for (int rank = group; rank < team_.size(); rank += groups)
          total += this->load(part_of(rank) + j);
      sums[thread] = total;
      block_.sync();
      if (mine && group == 0) {
        for (int other = 1; other < groups; ++other) total += sums[other * width + thread];
        set(j, total);
      }
      block_.sync();
    }
  }

 private:
  using Base::args_, Base::block_, Base::team_;
  static constexpr SweepShape kShape{sizeof(S)};
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

// And what a pass over a stored one needs.
template <typename S>
void fill_sweep(const Context& context, const Shape& shape, const SolvePlan& plan,
                TeamArguments<S>* arguments) {
  fill_team(context, shape, plan, arguments);
  arguments->rows = shape.n;
  arguments->columns = plan.vector_length;
  arguments->column_parts = context.scratch<S>(plan.teams * plan.team_size * plan.vector_length);
  if (shape.m > kSolveThreads * kManyColumns<S>)
    arguments->wide = context.scratch<S>(plan.teams * 2 * shape.n);
}

inline Grid team_grid(const SolvePlan& plan, int64_t shared) {
  Grid grid;
  grid.x = plan.teams * plan.team_size;
  grid.shared = static_cast<size_t>(shared);
  grid.cluster = plan.barrier == Barrier::kCluster ? plan.team_size : 1;
  grid.cooperative = plan.barrier == Barrier::kGrid;
  return grid;
}

// Fills the arguments of a kernel for the problems of a pack. The team is the one that the solve
// would have, which moves the same entries between the same barriers.
template <class Kernel, typename T, typename Group>
Grid plan_team(const Context& context, const Pack<Group>& pack, TeamArguments<T>* arguments) {
  const Shape shape = shape_of<T>(pack);
  if (shape.problems == 0) return Grid{0};
  const Limits device = limits(context.device);
  const auto bytes = [&](const SolvePlan& plan) {  // with the tile, if that fits
    const int64_t tile = ceil_div(shape.n, plan.team_size) * shape.m * shape.element;
    const int64_t both = SweepShape(sizeof(T)).end + tile;
    const bool fits = plan.resident && both <= static_cast<int64_t>(device.shared_per_block);
    return static_cast<size_t>(fits ? both : SweepShape(sizeof(T)).end);
  };
  // Gradients of a streamed solve that need the matrices get them.
  const Regime asked = forced_regime(), forced = asked == Regime::kStreamed ? Regime::kAuto : asked;
  const SolvePlan plan = choose_plan(shape, device, forced, [&](const SolvePlan& candidate) {
    return clusters_that_fit<Kernel>(context, candidate.team_size, bytes(candidate));
  });
  fill_sweep(context, shape, plan, arguments);
  const Grid grid = team_grid(plan, static_cast<int64_t>(bytes(plan)));
  arguments->resident = grid.shared > SweepShape(sizeof(T)).end;
  return grid;
}

}  // namespace otloss::cuda
