// One side of a problem: its weights, and the penalty on the plan's marginal (core/penalty.h).
#pragma once

#include <cstdint>
#include <vector>

#include "core/penalty.h"
#include "kernels.h"

namespace otloss::cpu {

// k = log2(e) / eps: potentials and costs times k are in the kernels' base-2 units.
template <typename T>
T factor(double eps) {
  return static_cast<T>(kLog2E / eps);
}

template <typename T>
struct Side : Penalty {
  int64_t count;
  const T* weight;    // (count,)
  double mass = 0;    // total weight, 1 where it is 1 but for rounding
  double points = 0;  // see equal_points

  Side(int64_t count, const T* weight, double rho);

  // A row's column sums are of the plan of (1 + tilt) F, see RowSweep.
  T tilt(double eps) const { return static_cast<T>(-eps * rate * damping(eps)); }

  // Of `unit` times v.
  SoftMean soft_mean(const T* v, double unit) const;

  // On entry q is the plan's marginal over the weights and `next` the softmin that follows on v.
  // On return q is the marginal over its target, and `target` is set.
  void set_target(double eps, double log2_shift, const T* v, const T* next, double mean, T* q,
                  T* target) const;

  // At most `most` points of positive weight, evenly spread.
  std::vector<int64_t> sample(int64_t most) const;
};

// The weights b that a problem is solved with. A balanced one has them scaled to the total of a:
// weights that were normalised in a lower precision differ by rounding, and the marginal error
// could not fall below that.
template <typename T>
std::vector<T> column_weights(const Penalties& penalties, int64_t n, const T* a, int64_t m,
                              const T* b);

}  // namespace otloss::cpu
