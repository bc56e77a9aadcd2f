// What the launches of the unrolled gradient share, see unrolled.cu.
#pragma once

#include "core/math.h"
#include "core/penalty.h"
#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"

namespace otloss::cuda {

template <typename T>
struct AdjointGroup : UnrolledGroup<T> {
  T* R;            // (B, L, n) f_bar times the damping
  T* g_bar;        // (B, L, m)
  T* H;            // (B, L, m) k g' + log2 b
  double* masses;  // (B, 2) of a and b
};

// The totals of the weights a, and of the weights b that the iterations ran with: if balanced,
// those given, scaled to the total of a.
struct Masses {
  double a, b, ratio;

  Masses() = default;
  OTLOSS_HOST_DEVICE Masses(double of_a, double given_b, bool balanced)
      : a(of_a), b(balanced ? of_a : given_b), ratio(balanced ? of_a / given_b : 1.0) {}

  template <typename T>
  OTLOSS_HOST_DEVICE T scaled(T b_j) const {
    return static_cast<T>(static_cast<double>(b_j) * ratio);
  }
};

template <typename T>
OTLOSS_DEVICE Penalty row_penalty(const AdjointGroup<T>& p) {
  return {1 / p.penalties.rho_x};
}
template <typename T>
OTLOSS_DEVICE Penalty column_penalty(const AdjointGroup<T>& p) {
  return {1 / p.penalties.rho_y};
}

// f of iteration l, and g; g' is null for 0.
template <typename T>
OTLOSS_DEVICE const T* trace_f(const AdjointGroup<T>& p, int64_t batch, int64_t l) {
  return p.trace + (batch * p.L + l) * (p.n + p.m);
}
template <typename T>
OTLOSS_DEVICE const T* trace_g(const AdjointGroup<T>& p, int64_t batch, int64_t l) {
  return trace_f(p, batch, l) + p.n;
}
template <typename T>
OTLOSS_DEVICE const T* g_before(const AdjointGroup<T>& p, int64_t batch, int64_t l) {
  if (l > 0) return trace_g(p, batch, l - 1);
  return p.start ? p.start + batch * p.m : nullptr;
}

// C_bar of the groups that want it, from the vectors of all iterations.
template <typename T>
void accumulate_costs(const Context& context, const Pack<AdjointGroup<T>>& pack, double eps,
                      Objective objective);

}  // namespace otloss::cuda
