#include "cpu/simd/vectors.h"

#include <cmath>

#include "core/math.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu {

template <typename T>
OTLOSS_SIMD void subtract_log2(int64_t count, const T* x, T* y) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) y[j] -= fast_log2(x[j]);
}

template <typename T>
OTLOSS_SIMD void absorb_weights(int64_t count, T k, const T* g, const T* b, T* G) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const T safe = b[j] > T(0) ? b[j] : T(1);
    const T value = k * g[j] + fast_log2(safe);
    G[j] = b[j] > T(0) ? value : static_cast<T>(kLog2Zero);
  }
}

template <typename T>
OTLOSS_SIMD void add_sums(int64_t count, const T* c, double* total) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) total[j] += static_cast<double>(c[j]);
}

template <typename T>
OTLOSS_SIMD bool column_ratios(int64_t count, const double* c, const T* b, double least, T* q) {
  int bad = 0;
#pragma omp simd reduction(+ : bad)
  for (int64_t j = 0; j < count; ++j) {
    const bool counts = b[j] > T(0);
    const double weight = counts ? static_cast<double>(b[j]) : 1.0, sum = counts ? c[j] : 1.0;
    const T ratio = static_cast<T>(sum / weight);
    q[j] = ratio;
    bad += static_cast<int>(!trusted(ratio)) + static_cast<int>(counts && !(c[j] > least));
  }
  return bad == 0;
}

// In vector lanes: the two dozen sums of a quasi-Newton step, added up one by one, would take as
// long as a sweep over a few hundred rows.
template <typename T>
OTLOSS_SIMD double dot(int64_t count, const T* x, const T* y) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return sum;
}

template <typename T>
OTLOSS_SIMD double dot(int64_t count, const T* w, const T* x, const T* y) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i)
    sum += static_cast<double>(w[i]) * static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return sum;
}

template <typename T>
OTLOSS_SIMD double marginal_error(int64_t count, const T* w, const T* q) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j)
    sum += static_cast<double>(w[j]) * std::abs(static_cast<double>(q[j]) - 1.0);
  return sum;
}

template <typename T>
OTLOSS_SIMD SumAndSize sum_and_size(int64_t count, const T* w, const T* v) {
  double sum = 0, size = 0;
#pragma omp simd reduction(+ : sum, size)
  for (int64_t i = 0; i < count; ++i) {
    const double term = static_cast<double>(w[i]) * static_cast<double>(v[i]);
    sum += term;
    size += std::abs(term);
  }
  return {sum, size};
}

#define OTLOSS_INSTANTIATE(T)                                                \
  template void subtract_log2(int64_t, const T*, T*);                        \
  template void absorb_weights(int64_t, T, const T*, const T*, T*);          \
  template void add_sums(int64_t, const T*, double*);                        \
  template bool column_ratios(int64_t, const double*, const T*, double, T*); \
  template double dot(int64_t, const T*, const T*);                          \
  template double dot(int64_t, const T*, const T*, const T*);                \
  template double marginal_error(int64_t, const T*, const T*);               \
  template SumAndSize sum_and_size(int64_t, const T*, const T*);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
