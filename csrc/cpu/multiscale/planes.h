// A potential as tiles see it. With k = log2(e) / eps and V = k v, over the points c + u of a leaf
//     V_i - k |u_i|^2 = base + <slope, u_i> + rest_i,  rest_i <= 0,
// the plane by least squares. Where the plan has mass the slopes of the two potentials and that of
// the cost cancel, so that single precision keeps all digits of what remains.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/multiscale/cloud.h"

namespace otloss::cpu::multiscale {

struct Planes {
  BlockVector<float> rest;                    // (size,)
  std::vector<double> base;                   // (leaves,)
  BlockVector<float> top, slope;              // (stride,) base, (d, stride) of leaves
  BlockVector<float> super_top, super_slope;  // likewise of supers: an upper bound of their leaves

  void resize(const Cloud& cloud);
  // V (size,)
  void fit_leaf(const Cloud& cloud, double k, const double* V, int64_t I);
  void fit_super(const Cloud& cloud, double k, int64_t S);
  void fit(const Cloud& cloud, double k, const double* V, bool split);
};

// V at the points of a finer cloud, to first order, from the planes of the coarser one whose points
// stand for `points` of them.
std::vector<double> extended(const Cloud& fine, const Cloud& coarse, const Planes& planes, double k,
                             int64_t points);

}  // namespace otloss::cpu::multiscale
