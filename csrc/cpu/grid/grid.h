// A regular grid of up to a few axes, whose cost is the sum of one cost along each axis.
//
// e^(-C/eps) is then a product of one factor along each axis, and a softmin over all N points is
// one log-sum-exp along each axis in turn: N (n_1 + n_2 + ...) terms in place of N^2.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/grid/axis.h"
#include "grid_kernels.h"

namespace otloss::cpu::grid {

// The costs of the axes at one eps.
class Kernels {
 public:
  Kernels(const GridAxes& axes, bool transposed, double eps);

  // v (N,) to log2 sum_j 2^(v_j - k C_ij), u (channels, N) to its means with these weights; split:
  // over threads.
  void reduce(double* v, int64_t channels, double* u, bool split) const;

 private:
  std::vector<AxisKernel> kernels_;
  int64_t size_;
};

}  // namespace otloss::cpu::grid
