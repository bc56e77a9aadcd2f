// One side of a problem: its weights, and how the plan's marginal is held to them
// (csrc/core/penalty.h).
#pragma once

#include <algorithm>
#include <limits>

#include "core/penalty.h"
#include "cpu/simd/sweep.h"

namespace otloss::cpu {

template <typename T>
struct Side : Penalty {
  int64_t count;
  const T* weight;  // (count,)
  double mass = 0;  // total weight

  Side(int64_t count, const T* weight, double rho)
      : Penalty{1 / rho}, count(count), weight(weight) {
    for (int64_t i = 0; i < count; ++i) mass += static_cast<double>(weight[i]);
  }

  // Of `unit` times v.
  SoftMean soft_mean(const T* v, double unit) const {
    if (hard()) {
      const SumAndSize all = sum_and_size(count, weight, v);
      return {unit * all.sum / mass, unit * all.size / mass};
    }
    T least = std::numeric_limits<T>::max();
    for (int64_t i = 0; i < count; ++i)
      if (weight[i] > T(0)) least = std::min(least, v[i]);
    SoftSums sums;
    for (int64_t i = 0; i < count; ++i)
      sums.add(*this, unit, static_cast<double>(least), static_cast<double>(weight[i]),
               static_cast<double>(v[i]));
    return sums.mean(*this, unit, static_cast<double>(least), mass);
  }

  // On entry q is the plan's marginal over the weights and `next` the softmin that follows on v.
  // On return q is the marginal over what is asked for, which is in `asked`.
  void ask(double eps, double log2_shift, const T* v, const T* next, double mean, T* q,
           T* asked) const {
    const Asked<T> rule(*this, eps, log2_shift, mean);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      q[j] = rule.ratio(q[j], v[j], next[j]);
      asked[j] = rule.of(weight[j], v[j]);
    }
  }
};

// The regularized value where a side is soft.
template <typename T>
double soft_value(const Side<T>& x, const Side<T>& y, double eps, const T* f, const T* g) {
  return otloss::soft_value(x, y, x.mass, y.mass, eps, x.soft_mean(f, 1).mean,
                            y.soft_mean(g, 1).mean);
}

}  // namespace otloss::cpu
