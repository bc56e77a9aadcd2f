// Points in the order of a tree, on the device, in leaves of a warp's width and supers of as many
// leaves: csrc/cpu/multiscale/cloud.h with a lane for each point of a leaf, or leaf of a super.
//
// Coordinates are padded to kD, with zeros; everything else to whole supers, with weight 0. Points
// of weight 0 count for no box: they take the place of a neighbour.
#pragma once

#include <limits>

#include "core/multiscale.h"
#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"

namespace otloss::cuda::multiscale {

using namespace otloss::multiscale;

constexpr int kLeaf = kWarp, kSuper = kWarp;
constexpr int64_t kSuperPoints = int64_t{kLeaf} * kSuper;
constexpr int kNodeThreads = 256;  // of the blocks that make a super with its leaves

// Boxes of runs of points. at: centres.
struct Nodes {
  int64_t stride;                   // count, up to whole warps
  double* at;                       // (kD, stride)
  float* half;                      // (kD, stride) half sides
  float *radius, *mass, *log_mass;  // (stride,) about the centre; log2 of the mass
  float *mean, *inverse;            // (kD, stride), (kD, kD, stride) of the least-squares fit
};

struct Cloud {
  int64_t n, supers;
  double* X;         // (leaves, kD, kLeaf)
  double* w;         // (leaves, kLeaf)
  float *u, *log_w;  // likewise; u relative to the leaf's centre
  Nodes leaf, super;

  OTLOSS_HOST_DEVICE int64_t leaves() const { return supers * kSuper; }
};

template <int kD>
Nodes make_nodes(const Context& context, int64_t count) {
  Nodes nodes{};
  const int64_t stride = nodes.stride = ceil_div(count, kWarp) * kWarp;
  nodes.at = context.scratch<double>(kD * stride);
  nodes.half = context.scratch<float>((kD * (kD + 2) + 3) * stride);
  nodes.radius = nodes.half + kD * stride;
  nodes.mass = nodes.radius + stride, nodes.log_mass = nodes.mass + stride;
  nodes.mean = nodes.log_mass + stride, nodes.inverse = nodes.mean + kD * stride;
  return nodes;
}

template <int kD>
Cloud make_cloud(const Context& context, int64_t n) {
  Cloud cloud{};
  cloud.n = n, cloud.supers = ceil_div(n, kSuperPoints);
  const int64_t size = cloud.supers * kSuperPoints;
  cloud.X = context.scratch<double>((kD + 1) * size), cloud.w = cloud.X + kD * size;
  cloud.u = context.scratch<float>((kD + 1) * size), cloud.log_w = cloud.u + kD * size;
  cloud.leaf = make_nodes<kD>(context, cloud.leaves());
  cloud.super = make_nodes<kD>(context, cloud.supers);
  return cloud;
}

// Coordinate c of point i, or i its place in (leaves, kLeaf).
template <int kD>
OTLOSS_HOST_DEVICE int64_t offset(int64_t i, int c) {
  return (i / kLeaf * kD + c) * kLeaf + i % kLeaf;
}

// Rounded up.
OTLOSS_DEVICE float above(double value) { return static_cast<float>(value * (1 + 1e-6)); }

// What the lanes of a warp have, joined: all get it.
template <class Join, class Block, typename V>
OTLOSS_DEVICE V joined(Block& block, V value) {
  for (int mask = kWarp / 2; mask > 0; mask /= 2)
    value = Join::join(value, block.shuffle_xor(value, mask));
  return value;
}

// The inverse of a small positive matrix and a little of its trace, by a warp; 0 for 0. Lane c has
// column c of it, lane kD + c gets that of the inverse.
template <int kD, class Block>
OTLOSS_DEVICE void invert(Block& block, double trace, double (&column)[kD]) {
  constexpr double kRidge = 1e-4;
  const int lane = block.thread() % kWarp;
#pragma unroll
  for (int r = 0; r < kD; ++r)
    column[r] = lane < kD ? column[r] + (r == lane ? kRidge * trace : 0.0) : r == lane - kD;
#pragma unroll
  for (int k = 0; k < kD; ++k) {
    const double pivot = 1 / block.shuffle(column[k], k);
    column[k] *= pivot;
#pragma unroll
    for (int r = 0; r < kD; ++r) {
      if (r == k) continue;
      const double factor = block.shuffle(column[r], k);
      column[r] -= factor * column[k];
    }
  }
}

// Node I from what the lanes of a warp have: a box each, or a point, whose half sides are 0.
template <int kD, class Block>
OTLOSS_DEVICE void bound_node(Block& block, const Nodes& nodes, int64_t I, bool valid,
                              const double (&at)[kD], const double (&half)[kD], double reach,
                              double mass) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const int lane = block.thread() % kWarp;
  const double count = joined<Sum>(block, valid ? 1.0 : 0.0);
  double from[kD], square = 0, mean[kD];
#pragma unroll
  for (int c = 0; c < kD; ++c) {
    const double high = joined<Max>(block, valid ? at[c] + half[c] : -kInfinity);
    const double low = -joined<Max>(block, valid ? half[c] - at[c] : -kInfinity);
    const double centre = count > 0 ? 0.5 * (low + high) : 0.0;
    from[c] = valid ? at[c] - centre : 0.0;
    square += from[c] * from[c];
    // NaN where a coordinate is not finite.
    const double finite = joined<Sum>(block, valid ? 0 * (at[c] + half[c]) : 0.0);
    mean[c] = count > 0 ? joined<Sum>(block, from[c]) / count : 0.0;
    if (lane != 0) continue;
    nodes.at[c * nodes.stride + I] = centre;
    nodes.half[c * nodes.stride + I] = above(count > 0 ? 0.5 * (high - low) + finite : 0.0);
    nodes.mean[c * nodes.stride + I] = static_cast<float>(mean[c]);
  }
  const double radius = joined<Max>(block, valid ? sqrt(square) + reach : 0.0);
  mass = joined<Sum>(block, valid ? mass : 0.0);
  double column[kD] = {}, trace = 0;
#pragma unroll
  for (int c = 0; c < kD; ++c)
#pragma unroll
    for (int e = 0; e < kD; ++e) {
      const double product = valid ? (from[c] - mean[c]) * (from[e] - mean[e]) : 0.0;
      const double sum = joined<Sum>(block, product);
      if (lane == c) column[e] = sum;
      if (c == e) trace += sum;
    }
  invert<kD>(block, trace, column);
  constexpr double kLeast = 1e-30;
  if (lane >= kD && lane < 2 * kD)
#pragma unroll
    for (int e = 0; e < kD; ++e)
      nodes.inverse[((lane - kD) * kD + e) * nodes.stride + I] =
          trace > kLeast ? static_cast<float>(column[e]) : 0.0f;
  if (lane != 0) return;
  nodes.radius[I] = above(radius), nodes.mass[I] = above(mass);
  nodes.log_mass[I] = mass > 0 ? static_cast<float>(fast_log2(mass)) : kNone;
}

// Boxes of a cloud's leaves and supers; a block for each super, from X and w of n points.
template <int kD>
struct NodesKernel {
  static constexpr int kThreads = kNodeThreads;

  Cloud cloud;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
    for (int64_t I = block.x() * kSuper + warp; I < (block.x() + 1) * kSuper; I += kThreads / kWarp)
      bound_leaf(block, I);
    block.sync();
    if (warp > 0) return;
    const int64_t J = block.x() * kSuper + lane;
    const Nodes& leaf = cloud.leaf;
    double at[kD], half[kD];
#pragma unroll
    for (int c = 0; c < kD; ++c) {
      at[c] = leaf.at[c * leaf.stride + J];
      half[c] = static_cast<double>(leaf.half[c * leaf.stride + J]);
    }
    const double mass = static_cast<double>(leaf.mass[J]);
    bound_node<kD>(block, cloud.super, block.x(), mass > 0, at, half,
                   static_cast<double>(leaf.radius[J]), mass);
    for (int64_t S = cloud.supers + lane; block.x() == 0 && S < cloud.super.stride; S += kWarp)
      clear(cloud.super, S);
  }

 private:
  // What only fills a warp.
  OTLOSS_DEVICE static void clear(const Nodes& nodes, int64_t I) {
    for (int c = 0; c < kD; ++c)
      nodes.at[c * nodes.stride + I] = 0, nodes.half[c * nodes.stride + I] = 0;
    nodes.radius[I] = nodes.mass[I] = 0, nodes.log_mass[I] = kNone;
  }

  template <class Block>
  OTLOSS_DEVICE void bound_leaf(Block& block, int64_t I) const {
    const int lane = block.thread() % kWarp;
    const int64_t i = I * kLeaf + lane;
    const double w = i < cloud.n ? cloud.w[i] : 0.0;
    const bool valid = w > 0;
    const unsigned all = block.ballot(valid);
    int neighbour = 0;
    while (neighbour < kWarp - 1 && (all >> neighbour & 1u) == 0) ++neighbour;
    double at[kD], none[kD] = {};
#pragma unroll
    for (int c = 0; c < kD; ++c) {
      const int64_t k = offset<kD>(i, c);
      at[c] = valid ? cloud.X[k] : 0.0;
      const double other = block.shuffle(at[c], neighbour);
      if (!valid) cloud.X[k] = at[c] = other;
    }
    if (!valid) cloud.w[i] = 0;
    bound_node<kD>(block, cloud.leaf, I, valid, at, none, 0.0, w);
    block.warp_sync();
#pragma unroll
    for (int c = 0; c < kD; ++c)
      cloud.u[offset<kD>(i, c)] =
          static_cast<float>(at[c] - cloud.leaf.at[c * cloud.leaf.stride + I]);
    cloud.log_w[i] = valid ? static_cast<float>(fast_log2(w)) : kNone;
  }
};

// Each run of kPoints points becomes its centroid, with their squared distances to it in spread
// (coarse.n,); a thread for each.
template <int kD>
struct CoarserKernel {
  static constexpr int kThreads = 128;

  Cloud fine, coarse;
  double* spread;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t I = block.x() * kThreads + block.thread();
    if (I >= coarse.n) return;
    const int64_t first = I * kPoints;
    const int count = static_cast<int>(fine.n - first < kPoints ? fine.n - first : kPoints);
    double mass = 0, apart = 0;
    for (int i = 0; i < count; ++i) mass += fine.w[first + i];
    for (int c = 0; c < kD; ++c) {
      double mean = 0;
      for (int i = 0; i < count && mass > 0; ++i)
        mean += fine.w[first + i] / mass * fine.X[offset<kD>(first + i, c)];
      for (int i = 0; i < count; ++i) {
        const double delta = fine.X[offset<kD>(first + i, c)] - mean;
        apart += fine.w[first + i] > 0 ? fine.w[first + i] * delta * delta : 0.0;
      }
      coarse.X[offset<kD>(I, c)] = mean;
    }
    coarse.w[I] = mass, spread[I] = apart;
  }
};

// The sum of values (count,), to out; one block.
struct TotalKernel {
  static constexpr int kThreads = 256;

  const double* values;
  int64_t count;
  double* out;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    Team<Block, kThreads> team(block, TeamArguments{1, nullptr});
    double sum[1] = {0};
    for (int64_t i = block.thread(); i < count; i += kThreads) sum[0] += values[i];
    team.sum(sum);
    if (block.thread() == 0) *out = sum[0];
  }
};

}  // namespace otloss::cuda::multiscale
