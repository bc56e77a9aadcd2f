// Points in the order of a tree, in leaves that are contiguous, with what bounds on leaves need.
//
// Order: each node is cut at the median of its box's widest side, down to a few points, at whole
// multiples of these, so that every aligned run of points is a compact set. A leaf is a run of L
// points, a super a run of kSuper leaves. Within a leaf coordinates are single precision, relative
// to the centre of its box; centres and weights are double: clouds far apart cost no digits.
#pragma once

#include <cstdint>
#include <vector>

#include "core/multiscale.h"
#include "cpu/simd/blocks.h"
#include "kernels.h"

namespace otloss::cpu::multiscale {

using namespace otloss::multiscale;

constexpr int64_t kSuper = 16;       // leaves of a super: one vector of single precision
constexpr int64_t kMostLeaf = 1024;  // points of a leaf

// Boxes of runs of points, padded to whole supers with boxes of mass 0.
struct Nodes {
  int64_t count = 0, stride = 0;
  std::vector<double> centre;                 // (count, d)
  BlockVector<double> at;                     // (d, stride) centres too
  BlockVector<float> half;                    // (d, stride) half sides
  BlockVector<float> radius, mass, log_mass;  // (stride,) about the centre; log2 of the mass
  std::vector<float> mean, inverse;           // (count, d), (count, d, d) of the least-squares fit

  void resize(int64_t nodes, int64_t d);
};

struct Cloud {
  int64_t d = 0, n = 0;
  int64_t L = 0;                // points of a leaf
  int64_t size = 0;             // n up to whole leaves, with points of weight 0
  std::vector<double> X;        // (size, d)
  std::vector<double> w;        // (size,)
  BlockVector<float> u, log_w;  // (leaves, d, L) relative to the leaf's centre; (size,)
  Nodes leaf, super;

  // Of points that are in order: their leaves.
  void build(int64_t leaf_size, bool split);

  // Each run of `points` points becomes its centroid. spread: their mean squared distance to it.
  Cloud coarser(int64_t points, double& spread) const;

  // Of some runs of this number of points, about their box's centre.
  std::vector<double> squared_radii(int64_t points) const;

 private:
  void bound(Nodes& nodes, int64_t I, int64_t points, bool leaves);
};

// The largest squared distance of points of the two, at most; NaN if a coordinate is not finite.
double largest_square(const Cloud& X, const Cloud& Y);

// In double, of all points of y: log2 of the sum of w 2^(scale G - k |x_i - y|^2). parts (n,) out:
// what share of it each is.
double log2_sum_of_all(const Cloud& x, int64_t i, const Cloud& y, double k, double scale,
                       const double* G, std::vector<double>& parts);

// The cloud of the points of positive weight, in the order of the tree; radius > 0: on the sphere
// of it, in their directions. split: over threads. index (n,) out: where each is in z. The orders
// of the clouds that came last are kept: a gradient finds those of its solve, and a target that
// stays is not ordered again.
template <typename T>
Cloud ordered_cloud(int64_t count, int64_t d, const T* z, const T* weight, double radius,
                    bool split, std::vector<int32_t>& index);

}  // namespace otloss::cpu::multiscale
