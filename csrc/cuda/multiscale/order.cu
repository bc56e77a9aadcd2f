// The order of a tree: each node is cut at the median of its box's widest side, at whole multiples
// of runs of points (core/multiscale.h), so that every aligned run is a compact set. Down to leaves
// a level is a sort of all points by node and then by that coordinate; within leaves lanes count
// who is before them. Points of weight 0 come last.
#include <algorithm>
#include <limits>
#include <numeric>
#include <type_traits>

#include "core/rounding.h"
#include "cuda/multiscale/multiscale.h"

#if defined(__CUDACC__)
#include <cub/device/device_radix_sort.cuh>
#endif

namespace otloss::cuda::multiscale {
namespace {

// index sorted by the `bits` low bits of keys; what is equal stays in order.
void sort_by_keys(const Context& context, int64_t count, int bits, const uint64_t* keys,
                  uint64_t* sorted_keys, const int32_t* index, int32_t* sorted) {
#if defined(__CUDACC__)
  check(cudaSetDevice(context.device), "selecting the device", "the device of the tensors");
  size_t bytes = 0;
  const auto run = [&](void* memory) {
    check(cub::DeviceRadixSort::SortPairs(memory, bytes, keys, sorted_keys, index, sorted,
                                          static_cast<int>(count), 0, bits,
                                          static_cast<cudaStream_t>(context.stream)),
          "sorting points", "a working CUDA device");
  };
  run(nullptr);
  run(context.scratch<unsigned char>(static_cast<int64_t>(bytes)));
#else
  static_cast<void>(context), static_cast<void>(bits), static_cast<void>(sorted_keys);
  std::vector<int32_t> order(static_cast<size_t>(count));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int32_t i, int32_t j) { return keys[i] < keys[j]; });
  std::transform(order.begin(), order.end(), sorted, [&](int32_t i) { return index[i]; });
#endif
}

template <typename T>
struct Given {
  int64_t n, d;
  const T *points, *weights;

  OTLOSS_HOST_DEVICE bool counts(int64_t i) const { return weights[i] > T(0); }
  OTLOSS_HOST_DEVICE T at(int64_t i, int64_t c) const { return points[i * d + c]; }
};

// Where a value is between the ends of a box, in 32 bits.
template <typename T>
OTLOSS_HOST_DEVICE uint64_t part_of(T value, T low, T high) {
  constexpr T kParts = 4294967040;
  const T part = (value - low) / (high - low);
  return part > 0 ? static_cast<uint64_t>((part < 1 ? part : T(1)) * kParts) : 0;
}

// Keys of the points of each node of a level; a block for each. Nodes are numbered by the way from
// the root, a bit for each half.
template <typename T>
struct KeysKernel {
  static constexpr int kThreads = 256, kWarps = kThreads / kWarp;
  static constexpr int kDims = static_cast<int>(kMultiscaleDims);

  Given<T> given;
  int level;
  const int32_t* index;
  uint64_t* keys;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    int64_t first = 0, count = given.n;
    for (int bit = level - 1; bit >= 0; --bit) {
      const bool second = (block.x() >> bit & 1) != 0;
      const int64_t half = count > kLeaf ? first_half(count) : count;
      first += second ? half : 0, count = second ? count - half : half;
    }
    if (count == 0) return;
    constexpr T kMost = std::numeric_limits<T>::max();
    T ends[2 * kDims];
#pragma unroll
    for (int e = 0; e < 2 * kDims; ++e) ends[e] = -kMost;
    for (int64_t i = first + block.thread(); i < first + count; i += kThreads) {
      const int32_t point = index[i];
      if (!given.counts(point)) continue;
#pragma unroll
      for (int c = 0; c < kDims; ++c) {
        const T value = c < given.d ? given.at(point, c) : T(0);
        ends[2 * c] = Max::join(ends[2 * c], value);
        ends[2 * c + 1] = Max::join(ends[2 * c + 1], -value);
      }
    }
    T* const shared = block.template shared<T>();
    const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
#pragma unroll
    for (int e = 0; e < 2 * kDims; ++e) {
      const T most = joined<Max>(block, ends[e]);
      if (lane == 0) shared[e * kWarps + warp] = most;
    }
    block.sync();
    T low = 0, high = 0, widest = -1;
    int axis = 0;
    for (int c = 0; c < given.d; ++c) {
      T most = -kMost, least = -kMost;
      for (int w = 0; w < kWarps; ++w) {
        most = Max::join(most, shared[2 * c * kWarps + w]);
        least = Max::join(least, shared[(2 * c + 1) * kWarps + w]);
      }
      if (most + least > widest) widest = most + least, axis = c, low = -least, high = most;
    }
    constexpr uint64_t kLast = 0xffffffffu;
    for (int64_t i = first + block.thread(); i < first + count; i += kThreads) {
      const int32_t point = index[i];
      const uint64_t part = given.counts(point) ? part_of(given.at(point, axis), low, high) : kLast;
      keys[i] = static_cast<uint64_t>(block.x()) << 32 | (part < kLast ? part : kLast);
    }
  }
};

// Within each leaf, halves of 16, of 8, and of 4; a warp for each. Then the points themselves.
template <int kD, typename T>
struct LeafKernel {
  static constexpr int kThreads = 128;

  Given<T> given;
  CostKind kind;
  Cloud cloud;
  const int32_t* index;
  int32_t* ordered;            // (n,) out
  const double *mass, *total;  // (1,) of the weights: what it is to be, and what it is

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t i = block.x() * kThreads + block.thread();
    const bool inside = i < given.n;
    int32_t point = inside ? index[i] : -1;
    for (int size = kLeaf; size > kPoints; size /= 2) point = halved(block, point, size);
    if (!inside) return;
    ordered[i] = point;
    const double w = static_cast<double>(given.weights[point]);
    cloud.w[i] = w * (*mass / *total);
    double square = 0;
    for (int c = 0; c < given.d; ++c) {
      const double x = static_cast<double>(given.points[point * given.d + c]);
      square += x * x;
    }
    const double scale = kind == CostKind::kCosine ? scale_of(kind) / sqrt(square) : 1.0;
    for (int c = 0; c < kD; ++c)
      cloud.X[offset<kD>(i, c)] =
          c < given.d ? scale * static_cast<double>(given.points[point * given.d + c]) : 0.0;
  }

 private:
  // The points of each run of `size` lanes in the order of their widest side.
  template <class Block>
  OTLOSS_DEVICE int32_t halved(Block& block, int32_t point, int size) const {
    constexpr T kMost = std::numeric_limits<T>::max();
    const int lane = block.thread() % kWarp;
    const bool counts = point >= 0 && given.counts(point);
    T widest = -1, own = 0;
    for (int c = 0; c < given.d; ++c) {
      const T value = counts ? given.at(point, c) : T(0);
      T most = counts ? value : -kMost, least = counts ? -value : -kMost;
      for (int mask = size / 2; mask > 0; mask /= 2) {
        most = Max::join(most, block.shuffle_xor(most, mask));
        least = Max::join(least, block.shuffle_xor(least, mask));
      }
      if (most + least > widest) widest = most + least, own = value;
    }
    if (!(counts && own == own)) own = kMost;
    if (point < 0) own = std::numeric_limits<T>::infinity();
    int before = 0;
    for (int h = 0; h < size; ++h) {
      const int other = lane / size * size + h;
      const T value = block.shuffle(own, other);
      before += value < own || (value == own && other < lane) ? 1 : 0;
    }
    // Where each goes: the lane that comes to this one.
    int from = lane;
    for (int h = 0; h < size; ++h) {
      const int other = lane / size * size + h;
      if (block.shuffle(before, other) == lane % size) from = other;
    }
    return block.shuffle(point, from);
  }
};

// The total of weights, and what it is taken for.
template <typename T>
struct MassKernel {
  static constexpr int kThreads = 256;

  int64_t n;
  const T* weights;
  double *total, *mass;  // (1,) out; mass may be null

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    Team<Block, kThreads> team(block, TeamArguments{1, nullptr});
    double sum[1] = {0};
    for (int64_t i = block.thread(); i < n; i += kThreads)
      sum[0] += static_cast<double>(weights[i]);
    team.sum(sum);
    if (block.thread() != 0) return;
    *total = sum[0];
    if (mass) *mass = snapped_total(sum[0], static_cast<double>(std::numeric_limits<T>::epsilon()));
  }
};

struct CountKernel {
  static constexpr int kThreads = 256;

  int32_t* index;
  int64_t n;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t i = block.x() * kThreads + block.thread();
    if (i < n) index[i] = static_cast<int32_t>(i);
  }
};

}  // namespace

template <int kD, typename T>
Ordered ordered_cloud(const Context& context, CostKind kind, int64_t n, int64_t d, const T* points,
                      const T* weights, const double* mass, double* out) {
  const Given<T> given{n, d, points, weights};
  int32_t *index = context.scratch<int32_t>(2 * n), *next = index + n;
  uint64_t* const keys = context.scratch<uint64_t>(2 * n);
  Grid grid;
  grid.x = ceil_div(n, CountKernel::kThreads);
  launch(context, CountKernel{index, n}, grid);
  int level = 0;
  for (int64_t most = n; most > kLeaf; ++level) {  // of both halves
    const int64_t half = first_half(most);
    grid = Grid{int64_t{1} << level};
    grid.shared = 2 * kMultiscaleDims * KeysKernel<T>::kWarps * sizeof(T);
    launch(context, KeysKernel<T>{given, level, index, keys}, grid);
    sort_by_keys(context, n, 32 + level, keys, keys + n, index, next);
    std::swap(index, next);
    most = std::max(half, most - half);
  }
  double* const total = context.scratch<double>(1);
  grid = Grid{};
  grid.shared = sizeof(TeamScratch);
  launch(context, MassKernel<T>{n, weights, total, mass ? nullptr : out}, grid);
  Ordered result{make_cloud<kD>(context, n), next};
  using Leaves = LeafKernel<kD, T>;
  launch(context, Leaves{given, kind, result.cloud, index, next, mass ? mass : out, total},
         Grid{ceil_div(n, Leaves::kThreads)});
  return result;
}

#define OTLOSS_INSTANTIATE(D, T)                                                             \
  template Ordered ordered_cloud<D, T>(const Context&, CostKind, int64_t, int64_t, const T*, \
                                       const T*, const double*, double*);
OTLOSS_INSTANTIATE(3, float)
OTLOSS_INSTANTIATE(3, double)
OTLOSS_INSTANTIATE(8, float)
OTLOSS_INSTANTIATE(8, double)

}  // namespace otloss::cuda::multiscale
