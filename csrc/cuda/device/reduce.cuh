// Sums over warps and blocks, in a fixed order: no atomics, so results repeat bit for bit. Also how
// the groups of a call travel to a kernel.
#pragma once

#include <limits>
#include <vector>

#include "cuda/device/block.cuh"

namespace otloss::cuda {

// ------------------------------------------------------------------------------------- groups

constexpr int kMaxGroups = 8;  // the xy, xx, yy of a divergence, the six of a minibatch loss

template <typename Group>
struct Pack {
  int count;
  Group items[kMaxGroups];
};

// Calls function(pack) with all groups, kMaxGroups at a time.
template <typename Group, typename F>
void for_each_pack(const std::vector<Group>& groups, F&& function) {
  for (size_t begin = 0; begin < groups.size(); begin += kMaxGroups) {
    Pack<Group> pack{};
    for (size_t i = begin; i < groups.size() && pack.count < kMaxGroups; ++i)
      pack.items[pack.count++] = groups[i];
    function(pack);
  }
}

// The group that has problem `number` of all groups; `number` becomes that in its batch.
template <typename Group>
OTLOSS_DEVICE int group_of(const Pack<Group>& pack, int64_t* number) {
  int group = 0;
  while (*number >= pack.items[group].batch) *number -= pack.items[group++].batch;
  return group;
}

// Calls function(group, batch, block of the problem) for the problem of this block, of a launch
// that has so many blocks for each.
template <class Block, typename Group, typename F>
OTLOSS_DEVICE void with_problem(Block& block, const Pack<Group>& pack, int64_t blocks,
                                F&& function) {
  int64_t batch = block.x() / blocks;
  const Group& group = pack.items[group_of(pack, &batch)];
  function(group, batch, block.x() % blocks);
}

template <typename Group>
int64_t problems_of(const Pack<Group>& pack) {
  int64_t problems = 0;
  for (int i = 0; i < pack.count; ++i) problems += pack.items[i].batch;
  return problems;
}

// --------------------------------------------------------------------------------------- sums

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

// Over `width` neighbouring lanes (a power of two), all of which get the result.
template <class Join, class Block, typename T>
OTLOSS_DEVICE T warp_join(Block& block, T value, int width = kWarp) {
  for (int mask = width / 2; mask > 0; mask /= 2)
    value = Join::join(value, block.shuffle_xor(value, mask));
  return value;
}

// Joins function(k) over first, first + step, ... < count, with several of its loads on their way.
template <class Join, typename S, typename F>
OTLOSS_DEVICE S join_over(int first, int step, int count, S start, F&& function) {
  constexpr int kAhead = 8;
  S total = start;
  int k = first;
  for (; k + (kAhead - 1) * step < count; k += kAhead * step) {
    S part[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) part[u] = function(k + u * step);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) total = Join::join(total, part[u]);
  }
  for (; k < count; k += step) total = Join::join(total, function(k));
  return total;
}

// kCount values of each lane, joined over kLanes neighbouring lanes with few shuffles: at each step
// a lane gives away half of its values and takes over half of its neighbour's. Returns, in lane l
// of them, value number l / (kLanes / kCount).
template <class Join, int kLanes = kWarp, class Block, typename T, int kCount>
OTLOSS_DEVICE T scatter_reduce(Block& block, T (&values)[kCount]) {
  static_assert(kCount <= kLanes && (kCount & (kCount - 1)) == 0, "a power of two");
  const int lane = block.thread() % kWarp;
  int mask = kLanes / 2;
#pragma unroll
  for (int half = kCount / 2; half > 0; half /= 2, mask /= 2) {
    const bool upper = (lane & mask) != 0;
#pragma unroll
    for (int v = 0; v < kCount / 2; ++v) {
      if (v >= half) break;
      const T kept = upper ? values[v + half] : values[v];
      const T given = upper ? values[v] : values[v + half];
      values[v] = Join::join(kept, block.shuffle_xor(given, mask));
    }
  }
  T result = values[0];
  for (; mask > 0; mask /= 2) result = Join::join(result, block.shuffle_xor(result, mask));
  return result;
}

}  // namespace otloss::cuda
