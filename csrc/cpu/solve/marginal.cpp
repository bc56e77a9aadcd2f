#include "cpu/solve/marginal.h"

#include <algorithm>
#include <limits>

#include "core/rounding.h"
#include "core/step_control.h"
#include "cpu/simd/sweep.h"

namespace otloss::cpu {

// Compensated (Kahan): the rounding of a long sum would pass for a total that is not 1.
template <typename T>
double total(int64_t count, const T* w) {
  double sum = 0, excess = 0;
  for (int64_t i = 0; i < count; ++i) {
    const double term = static_cast<double>(w[i]) - excess, next = sum + term;
    excess = (next - sum) - term;
    sum = next;
  }
  return sum;
}

template <typename T>
Side<T>::Side(int64_t count, const T* weight, double rho)
    : Penalty{1 / rho},
      count(count),
      weight(weight),
      mass(snapped_total(total(count, weight), std::numeric_limits<T>::epsilon())),
      points(equal_points(mass, dot(count, weight, weight))) {}

template <typename T>
SoftMean Side<T>::soft_mean(const T* v, double unit) const {
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

template <typename T>
void Side<T>::set_target(double eps, double log2_shift, const T* v, const T* next, double mean,
                         T* q, T* target) const {
  const TargetMarginal<T> rule(*this, eps, log2_shift, mean);
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    q[j] = rule.ratio(q[j], v[j], next[j]);
    target[j] = rule.of(weight[j], v[j]);
  }
}

template <typename T>
std::vector<int64_t> Side<T>::sample(int64_t most) const {
  std::vector<int64_t> chosen;
  const int64_t wanted = std::min(count, most);
  for (int64_t i = 0; i < wanted; ++i) {
    const int64_t index = i * count / wanted;
    if (weight[index] > T(0)) chosen.push_back(index);
  }
  return chosen;
}

template <typename T>
std::vector<T> column_weights(const Penalties& penalties, int64_t n, const T* a, int64_t m,
                              const T* b) {
  std::vector<T> weights(b, b + m);
  if (!penalties.balanced) return weights;
  const double ratio = total(n, a) / total(m, b);
  for (T& weight : weights) weight = static_cast<T>(static_cast<double>(weight) * ratio);
  return weights;
}

#define OTLOSS_INSTANTIATE(T) \
  template struct Side<T>;    \
  template std::vector<T> column_weights(const Penalties&, int64_t, const T*, int64_t, const T*);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
