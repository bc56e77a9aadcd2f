// One side of a problem: its weights, and how the plan's marginal is held to them.
//
// A penalty rho KL(marginal | w) makes a point of potential v add w rho (1 - e^{-v/rho}) to the
// dual, and take the part e^{-v/rho} of its weight in the plan. An infinite rho is a constraint:
// the two are w v and 1. What depends on rho is here, exact in that limit.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "math.h"
#include "sweep.h"

namespace otloss::cpu {

// A mean that adds up as the dual does: mass dual(mean) = sum_i w_i dual(v_i).
struct SoftMean {
  double mean;       // -rho log(sum_i w_i e^{-v_i/rho} / mass), the plain mean for a constraint
  double magnitude;  // mean of |v_i| in the plan's marginal
};

template <typename T>
struct Side {
  int64_t count;
  const T* weight;  // (count,)
  double rate;      // 1 / rho, 0 for a constraint
  double mass = 0;  // total weight

  Side(int64_t count, const T* weight, double rho) : count(count), weight(weight), rate(1 / rho) {
    for (int64_t i = 0; i < count; ++i) mass += static_cast<double>(weight[i]);
  }

  bool hard() const { return rate == 0; }
  // The factor of a softmin in the update of a potential.
  double damping(double eps) const { return 1 / (1 + eps * rate); }
  double dual(double v) const { return hard() ? v : -std::expm1(-v * rate) / rate; }
  double share(double v) const { return std::exp(-v * rate); }

  // dOT/dw of a point of potential v at the solution, unless the problem is balanced.
  double weight_gradient(double eps, double other_mass, double v) const {
    return dual(v) + eps * (other_mass - share(v));
  }

  // Of `unit` times v.
  SoftMean soft_mean(const T* v, double unit) const {
    if (hard()) return plain_mean(v, unit);
    T least = std::numeric_limits<T>::max();
    for (int64_t i = 0; i < count; ++i)
      if (weight[i] > T(0)) least = std::min(least, v[i]);
    const double k = unit * rate * kLog2E;
    double lost = 0, kept = 0, size = 0;
    for (int64_t i = 0; i < count; ++i) {
      const double raised = static_cast<double>(v[i]) - static_cast<double>(least);
      const double w = static_cast<double>(weight[i]), change = fast_exp2m1(-k * raised);
      const double part = w * fast_exp2(-k * raised);
      lost += w * change;
      kept += part;
      size += part * std::abs(static_cast<double>(v[i]));
    }
    // Where little is lost only the small differences from 1 keep all digits, elsewhere the rest.
    const double log_kept = lost > -0.5 * mass ? std::log1p(lost / mass) : std::log(kept / mass);
    return {unit * static_cast<double>(least) - log_kept / rate, unit * size / kept};
  }

  // On entry q is the plan's marginal over the weights and `next` the softmin that follows on v.
  // On return q is the marginal over what is asked for, w e^{-v/rho}, and `asked` the latter,
  // scaled to the total of the weights. 2^log2_shift: by how much the plan has grown since q was
  // made.
  void ask(double eps, double log2_shift, const T* v, const T* next, double mean, T* q,
           T* asked) const {
    const T k = static_cast<T>(kLog2E / eps), per_rho = static_cast<T>(rate * kLog2E);
    const T shift = static_cast<T>(log2_shift), centre = static_cast<T>(mean);
#pragma omp simd
    for (int64_t j = 0; j < count; ++j) {
      const T direct = q[j] * fast_exp2(shift + per_rho * v[j]);
      const T clamped = fast_exp2(k * (v[j] - next[j]) + per_rho * v[j]);
      q[j] = trusted(q[j]) ? direct : clamped;
      asked[j] = weight[j] * fast_exp2(per_rho * (centre - v[j]));
    }
  }

 private:
  SoftMean plain_mean(const T* v, double unit) const {
    const SumAndSize all = sum_and_size(count, weight, v);
    return {unit * all.sum / mass, unit * all.size / mass};
  }
};

// The regularized value where a side is soft. The plan's column sums are those that g asks for.
template <typename T>
double soft_value(const Side<T>& x, const Side<T>& y, double eps, const T* f, const T* g) {
  const double mean_f = x.soft_mean(f, 1).mean, mean_g = y.soft_mean(g, 1).mean;
  return x.mass * x.dual(mean_f) + y.mass * y.dual(mean_g) -
         eps * y.mass * (y.share(mean_g) - x.mass);
}

}  // namespace otloss::cpu
