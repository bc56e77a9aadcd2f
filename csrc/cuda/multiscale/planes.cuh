// A potential as tiles see it: csrc/cpu/multiscale/planes.h, a warp for each leaf, or super. With
// V = factor v in base 2, over the points c + u of a leaf
//     V_i - k |u_i|^2 = base + <slope, u_i> + rest_i,  rest_i <= 0,
// the plane by least squares.
#pragma once

#include "cuda/multiscale/cloud.cuh"

namespace otloss::cuda::multiscale {

struct Planes {
  float* rest;          // (leaves, kLeaf)
  double *base, *top;   // (leaves,), and (supers,) an upper bound
  float *slope, *tilt;  // (kD, leaves), and (kD, supers)
};

template <int kD>
Planes make_planes(const Context& context, const Cloud& cloud) {
  Planes planes{};
  const int64_t leaves = cloud.leaf.stride, supers = cloud.super.stride;
  planes.base = context.scratch<double>(leaves + supers), planes.top = planes.base + leaves;
  planes.rest = context.scratch<float>(leaves * kLeaf + kD * (leaves + supers));
  planes.slope = planes.rest + leaves * kLeaf, planes.tilt = planes.slope + kD * leaves;
  return planes;
}

// A potential of a cloud's points in the solver's units, and what makes base 2 of it.
struct Potential {
  const double* v;  // (n,)
  double factor;
};

// The plane of values that lanes of a warp have at `from` the centre of node I; `left` is what
// it leaves of them.
template <int kD, class Block>
OTLOSS_DEVICE void fit_plane(Block& block, const Nodes& nodes, int64_t I, bool valid,
                             const double (&from)[kD], double& left, float (&slope)[kD]) {
  const double count = joined<Sum>(block, valid ? 1.0 : 0.0);
  const double mean = count > 0 ? joined<Sum>(block, valid ? left : 0.0) / count : 0.0;
  double sums[kD];
#pragma unroll
  for (int c = 0; c < kD; ++c) {
    const double at = from[c] - static_cast<double>(nodes.mean[c * nodes.stride + I]);
    sums[c] = joined<Sum>(block, valid ? (left - mean) * at : 0.0);
  }
#pragma unroll
  for (int c = 0; c < kD; ++c) {
    double value = 0;
#pragma unroll
    for (int e = 0; e < kD; ++e)
      value += static_cast<double>(nodes.inverse[(c * kD + e) * nodes.stride + I]) * sums[e];
    slope[c] = static_cast<float>(value);
    left -= static_cast<double>(slope[c]) * from[c];
  }
}

// Super S of a cloud, and its leaves; by all threads of a block of kNodeThreads.
template <int kD>
struct PlaneFit {
  const Cloud& cloud;
  const Planes& planes;
  const Potential potential;
  const double k;

  template <class Block>
  OTLOSS_DEVICE void run(Block& block, int64_t S) const {
    const int warp = block.thread() / kWarp;
    for (int64_t I = S * kSuper + warp; I < (S + 1) * kSuper; I += kNodeThreads / kWarp)
      fit_leaf(block, I);
    block.sync();
    if (warp == 0) fit_super(block, S);
  }

 private:
  template <class Block>
  OTLOSS_DEVICE void fit_leaf(Block& block, int64_t I) const {
    const Nodes& nodes = cloud.leaf;
    const int64_t i = I * kLeaf + block.thread() % kWarp;
    const bool valid = cloud.w[i] > 0;
    double from[kD], square = 0;
    float slope[kD];
#pragma unroll
    for (int c = 0; c < kD; ++c) {
      from[c] = cloud.X[offset<kD>(i, c)] - nodes.at[c * nodes.stride + I];
      square += from[c] * from[c];
    }
    double left = valid ? potential.factor * potential.v[i] - k * square : 0.0;
    fit_plane<kD>(block, nodes, I, valid, from, left, slope);
    const double most = joined<Max>(block, valid ? left : static_cast<double>(kNone));
    planes.rest[i] = valid ? static_cast<float>(left - most) : kNone;
    write(block, planes.base, planes.slope, nodes.stride, I, most, slope);
  }

  template <class Block>
  OTLOSS_DEVICE void fit_super(Block& block, int64_t S) const {
    const Nodes &leaf = cloud.leaf, &nodes = cloud.super;
    const int64_t I = S * kSuper + block.thread() % kWarp;
    const bool valid = leaf.mass[I] > 0;
    double from[kD], left = planes.base[I], box = 0, ball = 0;
    float slope[kD];
#pragma unroll
    for (int c = 0; c < kD; ++c) {
      from[c] = leaf.at[c * leaf.stride + I] - nodes.at[c * nodes.stride + S];
      left -= k * from[c] * from[c];
    }
    fit_plane<kD>(block, nodes, S, valid, from, left, slope);
#pragma unroll
    for (int c = 0; c < kD; ++c) {
      const double own = static_cast<double>(planes.slope[c * leaf.stride + I]);
      const double tilt = own - 2 * k * from[c] - static_cast<double>(slope[c]);
      box += fabs(tilt) * static_cast<double>(leaf.half[c * leaf.stride + I]);
      ball += tilt * tilt;
    }
    ball = sqrt(ball) * static_cast<double>(leaf.radius[I]);
    left += box < ball ? box : ball;
    const double most = joined<Max>(block, valid ? left : static_cast<double>(kNone));
    write(block, planes.top, planes.tilt, nodes.stride, S, most, slope);
  }

  template <class Block>
  OTLOSS_DEVICE static void write(Block& block, double* top, float* slopes, int64_t stride,
                                  int64_t I, double most, const float (&slope)[kD]) {
    if (block.thread() % kWarp != 0) return;
    top[I] = most;
#pragma unroll
    for (int c = 0; c < kD; ++c) slopes[c * stride + I] = slope[c];
  }
};

template <int kD>
struct FitKernel {
  static constexpr int kThreads = kNodeThreads;

  Cloud cloud;
  Planes planes;
  Potential potential;
  double k;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    PlaneFit<kD>{cloud, planes, potential, k}.run(block, block.x());
  }
};

// v at the points of a finer cloud, to first order, from the planes of the coarser one, whose
// points stand for kPoints of them; a thread for each.
template <int kD>
struct ExtendKernel {
  static constexpr int kThreads = 128;

  Cloud fine, coarse;
  Planes planes;
  double k, to_cost;
  double* out;  // (fine.n,)

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t i = block.x() * kThreads + block.thread();
    if (i >= fine.n) return;
    const int64_t parent = i / kPoints, J = parent / kLeaf;
    double value = planes.base[J] + static_cast<double>(planes.rest[parent]), square = 0;
    for (int c = 0; c < kD; ++c) {
      const double u = fine.X[offset<kD>(i, c)] - coarse.leaf.at[c * coarse.leaf.stride + J];
      value += static_cast<double>(planes.slope[c * coarse.leaf.stride + J]) * u, square += u * u;
    }
    out[i] = fine.w[i] > 0 ? to_cost * (value + k * square) : 0.0;
  }
};

}  // namespace otloss::cuda::multiscale
