// Passes over a plan in memory, vectorised along rows. They are few and bandwidth-bound; sums are
// taken in double whatever the plan's dtype, because the linear system of the implicit gradient is
// a graph Laplacian whose smallest eigenvalues are differences of these sums.
#include "cpu/gradient/plan_passes.h"

#include "cpu/simd/simd.h"

namespace otloss::cpu {
template <typename T>
OTLOSS_SIMD void plan_sums(const PlanSums<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const T* P = p.P + i * p.m;
    double sum = 0;
    if (p.C) {
      const T* C = p.C + i * p.m;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < p.m; ++j) {
        const T c = P[j] != T(0) ? C[j] : T(0);
        const double value = static_cast<double>(P[j]) * static_cast<double>(c);
        sum += value;
        p.col[j] += value;
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < p.m; ++j) {
        const double value = static_cast<double>(P[j]);
        sum += value;
        p.col[j] += value;
      }
    }
    p.row[i] = sum;
  }
}

template <typename T>
OTLOSS_SIMD void weigh_plan(const WeighPlan<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const T *P = p.P + i * p.m, *C = p.C + i * p.m;
    T* out = p.out + i * p.m;
    const T shift = p.s + p.alpha[i];
#pragma omp simd
    for (int64_t j = 0; j < p.m; ++j) {
      const T value = P[j] * (shift + p.t * C[j] + p.beta[j]);
      out[j] = P[j] != T(0) ? value : T(0);
    }
  }
}

template <typename T>
OTLOSS_SIMD void plan_product(const PlanProduct<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const T* P = p.P + i * p.m;
    double w = p.base ? p.base[i] : 0.0;
    if (p.x) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < p.m; ++j) sum += static_cast<double>(P[j]) * p.x[j];
      w += p.factor[i] * sum;
    }
    p.w[i] = w;
    if (p.y) {
#pragma omp simd
      for (int64_t j = 0; j < p.m; ++j) p.y[j] += w * static_cast<double>(P[j]);
    }
  }
}

#define OTLOSS_INSTANTIATE(T)                    \
  template void plan_sums(const PlanSums<T>&);   \
  template void weigh_plan(const WeighPlan<T>&); \
  template void plan_product(const PlanProduct<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss::cpu
