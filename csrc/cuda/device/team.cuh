// A team: the blocks that work on one problem, their barrier, and sums over all their threads.
//
// The barrier is the only thing that tells the regimes apart: __syncthreads for one block, the
// hardware barrier of a thread-block cluster, or a counter in global memory for blocks of a
// cooperative launch (all of them resident, so that waiting ends). Blocks exchange vectors and
// partial sums through global memory, which all three barriers order; such memory is read and
// written past L1 (load, store), which is not coherent between multiprocessors.
#pragma once

#include <algorithm>
#include <limits>

#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/solve/plan.h"

namespace otloss::cuda {

struct Sum {
  static OTLOSS_HOST_DEVICE double identity() { return 0; }
  template <typename T>
  static OTLOSS_HOST_DEVICE T join(T x, T y) {
    return x + y;
  }
};

struct Max {
  static OTLOSS_HOST_DEVICE double identity() { return -std::numeric_limits<double>::infinity(); }
  template <typename T>
  static OTLOSS_HOST_DEVICE T join(T x, T y) {
    return x > y ? x : y;
  }
};

template <class Block>
OTLOSS_DEVICE void team_sync(Block& block, TeamState& team) {
  if (team.barrier == Barrier::kBlock) {
    block.sync();
  } else if (team.barrier == Barrier::kCluster) {
    block.cluster_sync();
  } else {
    block.sync();
    if (block.thread() == 0) {
      team.arrivals += static_cast<unsigned>(team.size);
      block.arrive_and_wait(team.counter, team.arrivals);
    }
    block.sync();
  }
}

template <class Join, class Block>
OTLOSS_DEVICE double warp_join(Block& block, double value, int width) {
  for (int mask = width / 2; mask > 0; mask /= 2)
    value = Join::join(value, block.shuffle_xor(value, mask));
  return value;
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
      total = warp_join<Join>(block, total, kWarp);
      if (lane == 0) result[v] = total;
    }
  }
  block.sync();
  if (block.thread() == 0) team.parity ^= 1;  // the next call has a barrier before it is read
}

template <class Block, int kThreads>
class Team {
 public:
  OTLOSS_DEVICE Team(Block& block, TeamState& state) : block_(block), state_(state) {}

  OTLOSS_DEVICE int rank() const { return state_.rank; }
  OTLOSS_DEVICE int size() const { return state_.size; }

  // All threads of all blocks arrive before one leaves; what they wrote before is seen after.
  OTLOSS_DEVICE void sync() { team_sync(block_, state_); }

  template <typename T>
  OTLOSS_DEVICE T load(const T* p) const {
    return state_.size == 1 ? *p : block_.load(p);
  }
  template <typename T>
  OTLOSS_DEVICE void store(T* p, T value) const {
    if (state_.size == 1)
      *p = value;
    else
      block_.store(p, value);
  }

  // Each value joined over all threads of the team; every thread gets the results. The order is
  // fixed, whatever the timing. All threads arrive before one leaves, as in sync().
  template <class Join, int kCount>
  OTLOSS_DEVICE void reduce(double (&values)[kCount]) {
    static_assert(kCount <= kReduced, "raise kReduced");
    constexpr int kWarps = kThreads / kWarp;
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const double part = warp_join<Join>(block_, values[v], kWarp);
      if (block_.thread() % kWarp == 0) state_.scratch[v * kWarps + block_.thread() / kWarp] = part;
    }
    team_reduce<Join, kThreads>(block_, state_, kCount);
#pragma unroll
    for (int v = 0; v < kCount; ++v) values[v] = state_.scratch[kReduced * kWarps + v];
  }

  // Up to kTeamValues values of which each block has a part: each is summed by one warp, that of
  // the lanes that call. First all blocks show() their parts, then all threads sync(), then total()
  // gives the sum to all lanes of the warp. After the last total() and a barrier of the block
  // flip() the buffers; another barrier follows before they are used again.
  OTLOSS_DEVICE void show(int value, double part) const {
    store(state_.partial + (state_.parity * state_.size + state_.rank) * kTeamValues + value, part);
  }
  OTLOSS_DEVICE double total(int value) const {
    const double* const all = state_.partial + state_.parity * state_.size * kTeamValues + value;
    double sum = 0;
    for (int r = block_.thread() % kWarp; r < state_.size; r += kWarp)
      sum += load(all + r * kTeamValues);
    return warp_join<Sum>(block_, sum, kWarp);
  }
  OTLOSS_DEVICE void flip() {
    if (block_.thread() == 0) state_.parity ^= 1;
  }

 private:
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
    shape.entries = std::max(shape.entries, p.n * p.m);
  }
  return shape;
}

}  // namespace otloss::cuda
