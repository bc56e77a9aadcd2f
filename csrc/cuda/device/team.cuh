// A team: the blocks that work on one problem, their barrier, sums over all their threads, and a
// block's share of the rows and columns: a contiguous part of each.
//
// A team is one block, or a thread-block cluster, whose hardware barrier it meets at. Blocks
// exchange vectors and partial sums through global memory, which the barrier orders; such memory is
// read and written past L1 (load, store), which is not coherent between multiprocessors.
#pragma once

#include <algorithm>

#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/solve/plan.h"

namespace otloss::cuda {

template <class Block>
OTLOSS_DEVICE void team_sync(Block& block, const TeamState& team) {
  if (team.size == 1)
    block.sync();
  else
    block.cluster_sync();
}

// Joins `count` values, of which each warp of each block has left a part in the scratch, to its
// end. Not inlined: it is called in many places, and never in an inner loop.
template <class Join, int kThreads, class Block>
OTLOSS_NOINLINE void team_reduce(Block block, TeamState& team, int count) {
  constexpr int kWarps = kThreads / kWarp;
  static_assert(kWarps <= kWarp, "a warp joins the results of all warps at once");
  const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
  double* const result = team.scratch + kReduced * kWarps;
  block.sync();
  double* const mine = team.partial + (team.parity * team.size + team.rank) * kTeamValues;
#pragma unroll 1
  for (int v = warp; v < count; v += kWarps) {
    const double total = warp_join<Join>(block, team.scratch[v * kWarps + lane % kWarps], kWarps);
    if (lane != 0) continue;
    if (team.size == 1)
      result[v] = total;
    else
      block.store(mine + v, total);
  }
  if (team.size > 1) {
    team_sync(block, team);
    const double* const all = team.partial + team.parity * team.size * kTeamValues;
#pragma unroll 1
    for (int v = warp; v < count; v += kWarps) {
      double total = Join::identity();
      for (int r = lane; r < team.size; r += kWarp)
        total = Join::join(total, block.load(all + r * kTeamValues + v));
      total = warp_join<Join>(block, total);
      if (lane == 0) result[v] = total;
    }
  }
  block.sync();
  if (block.thread() == 0) team.parity ^= 1;  // the next call has a barrier before it is read
}

// What a kernel knows of its teams; problem t is that of team t.
struct TeamArguments {
  int size;       // blocks per problem
  double* parts;  // (problems, 2, size, kTeamValues), if there are several
};

template <class Block, int kBlockThreads>
class Team {
 public:
  static constexpr int kThreads = kBlockThreads, kWarps = kThreads / kWarp;

  OTLOSS_DEVICE Team(Block& block, const TeamArguments& arguments)
      : block_(block), state_(block.template shared<TeamScratch>()->state) {
    if (block.thread() == 0) {
      state_.index = block.x() / arguments.size;
      state_.rank = static_cast<int>(block.x() % arguments.size);
      state_.size = arguments.size;
      state_.parity = 0;
      state_.partial = arguments.parts + state_.index * 2 * arguments.size * kTeamValues;
      state_.scratch = block.template shared<TeamScratch>()->values;
    }
    block.sync();
  }

  // Calls function(group, batch) for the problem of this team.
  template <typename Groups, typename F>
  OTLOSS_DEVICE void with_problem(const Groups& groups, F&& function) {
    int64_t batch = index();
    const auto& group = groups.items[group_of(groups, &batch)];
    if (block_.thread() == 0) place(group.n, group.m);
    block_.sync();
    function(group, batch);
  }

  OTLOSS_DEVICE int rank() const { return state_.rank; }
  OTLOSS_DEVICE int size() const { return state_.size; }
  OTLOSS_DEVICE int64_t index() const { return state_.index; }
  OTLOSS_DEVICE bool first_thread() const { return rank() == 0 && block_.thread() == 0; }
  OTLOSS_DEVICE int m() const { return state_.m; }
  OTLOSS_DEVICE int64_t first_row() const { return state_.first_row; }
  OTLOSS_DEVICE int first_column() const { return state_.first_column; }
  OTLOSS_DEVICE int rows() const { return state_.rows; }
  OTLOSS_DEVICE int columns() const { return state_.columns; }

  // What is in shared memory at an offset of the layout.
  template <typename U>
  OTLOSS_DEVICE U* at(int64_t offset) const {
    return reinterpret_cast<U*>(block_.template shared<unsigned char>() + offset);
  }

  // All threads of all blocks arrive before one leaves; what they wrote before is seen after.
  OTLOSS_DEVICE void sync() { team_sync(block_, state_); }

  template <typename U>
  OTLOSS_DEVICE U load(const U* p) const {
    return size() == 1 ? *p : block_.load(p);
  }
  template <typename U>
  OTLOSS_DEVICE void store(U* p, U value) const {
    if (size() == 1)
      *p = value;
    else
      block_.store(p, value);
  }

  // By one thread of each block; all see what it writes, and none reads what is there before.
  template <typename F>
  OTLOSS_DEVICE void one(F&& function) const {
    block_.sync();
    if (block_.thread() == 0) function();
    block_.sync();
  }

  // Rows i < rows of the block, each by one thread, the block's columns, each by one thread, and
  // all entries of its rows: a warp per row, neighbouring lanes at neighbouring columns.
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
  template <typename F>
  OTLOSS_DEVICE void for_side(int side, F&& function) const {  // 0: rows
    side == 0 ? for_rows(function) : for_columns(function);
  }
  template <typename F>
  OTLOSS_DEVICE void for_entries(F&& function) const {
    const int rows = this->rows(), m = this->m();
    for (int i = block_.thread() / kWarp; i < rows; i += kWarps)
      for (int j = block_.thread() % kWarp; j < m; j += kWarp) function(i, j);
  }

  // Each value joined over all threads of the team; every thread gets the results. The order is
  // fixed, whatever the timing. All threads arrive before one leaves, as in sync().
  template <class Join, int kCount>
  OTLOSS_DEVICE void reduce(double (&values)[kCount]) {
    static_assert(kCount <= kReduced, "raise kReduced");
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const double part = warp_join<Join>(block_, values[v]);
      if (block_.thread() % kWarp == 0) state_.scratch[v * kWarps + block_.thread() / kWarp] = part;
    }
    team_reduce<Join, kThreads>(block_, state_, kCount);
#pragma unroll
    for (int v = 0; v < kCount; ++v) values[v] = state_.scratch[kReduced * kWarps + v];
  }
  template <int kCount>
  OTLOSS_DEVICE void sum(double (&values)[kCount]) {
    reduce<Sum>(values);
  }

  // Over the rows, and over the columns; or a pair over the columns.
  template <typename F, typename G>
  OTLOSS_DEVICE TwoSums sums(F&& of_row, G&& of_column) {
    double sums[2] = {0, 0};
    for_rows([&](int i) { sums[0] += of_row(i); });
    for_columns([&](int j) { sums[1] += of_column(j); });
    sum(sums);
    return {sums[0], sums[1]};
  }
  template <typename F>
  OTLOSS_DEVICE TwoSums column_sums(F&& function) {
    double sums[2] = {0, 0};
    for_columns([&](int j) {
      const TwoSums terms = function(j);
      sums[0] += terms.first, sums[1] += terms.second;
    });
    sum(sums);
    return {sums[0], sums[1]};
  }

  // Up to kTeamValues values of which each block has a part: each is summed by one warp, that of
  // the lanes that call. First all blocks show() their parts, then all threads sync(), then total()
  // gives the sum to all lanes of the warp. After the last total() and a barrier of the block
  // flip() the buffers; another barrier follows before they are used again.
  OTLOSS_DEVICE void show(int value, double part) const {
    store(state_.partial + (state_.parity * size() + rank()) * kTeamValues + value, part);
  }
  OTLOSS_DEVICE double total(int value) const {
    const double* const all = state_.partial + state_.parity * size() * kTeamValues + value;
    double sum = 0;
    for (int r = block_.thread() % kWarp; r < size(); r += kWarp)
      sum += load(all + r * kTeamValues);
    return warp_join<Sum>(block_, sum);
  }
  OTLOSS_DEVICE void flip() {
    if (block_.thread() == 0) state_.parity ^= 1;
  }

 private:
  OTLOSS_DEVICE void place(int64_t n, int64_t m) {
    TeamState& s = state_;
    const auto cut = [&s](int64_t count, int64_t* first) {
      const int64_t share = ceil_div(count, s.size);
      *first = share * s.rank < count ? share * s.rank : count;
      return static_cast<int>((*first + share < count ? *first + share : count) - *first);
    };
    int64_t first;
    s.m = static_cast<int>(m);
    s.rows = cut(n, &s.first_row);
    s.columns = cut(m, &first);
    s.first_column = static_cast<int>(first);
  }

  Block& block_;
  TeamState& state_;
};

// The largest problem of a pack.
template <typename T, typename Group>
Shape shape_of(const Pack<Group>& pack) {
  Shape shape;
  shape.element = sizeof(T);
  for (int i = 0; i < pack.count; ++i) {
    const Group& p = pack.items[i];
    shape.problems += p.batch;
    shape.n = std::max(shape.n, p.n);
    shape.m = std::max(shape.m, p.m);
  }
  return shape;
}

}  // namespace otloss::cuda
