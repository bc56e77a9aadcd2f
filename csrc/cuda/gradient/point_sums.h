// What the gradients of costs and points take of a solution, see point_sums_launch.cuh.
#pragma once

#include "cuda/device/reduce.cuh"
#include "cuda/pass/pack.cuh"
#include "kernels.h"

namespace otloss::cuda {

// The plan of a group and the solution of its linear system, left by implicit.cu.
template <typename T>
struct PlanOfPoints {
  PackedPair<T> points;
  T* F;      // (B, packed_stride(n)) k f + log2 a, kLog2Zero past the end
  T* G;      // (B, packed_stride(m)) k g + log2 b
  T* alpha;  // (B, n)
  T* beta;   // (B, m)
};

// The gradients of the costs, or the sums that the points want.
template <typename T>
void implicit_sums(const Context& context, const Pack<ImplicitGroup<T>>& pack,
                   const PlanOfPoints<T> (&plans)[kMaxGroups], double eps, Objective objective);

// The vectors of all iterations of a group, left by unrolled.cu, in its notation.
template <typename T>
struct IterationsOfPoints {
  PackedPair<T> points;
  T* F;      // (B, packed_stride(n)) k f + log2 a of the last iteration
  T* G;      // (B, packed_stride(m)) k g + log2 b
  T* R;      // (B, L, n) f_bar times the damping of f
  T* g_bar;  // (B, L, m) times the damping of g
  T* H;      // (B, L, m) k g' + log2 b
};

template <typename T>
void unrolled_sums(const Context& context, const Pack<UnrolledGroup<T>>& pack,
                   const IterationsOfPoints<T> (&iterations)[kMaxGroups], double eps,
                   Objective objective);

}  // namespace otloss::cuda
