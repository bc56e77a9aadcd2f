// What the kernels of the implicit gradient are given, and what is kept of a problem between them.
#pragma once

#include "core/penalty.h"
#include "cuda/gradient/side_sums.h"
#include "cuda/pass/sweeps.cuh"

namespace otloss::cuda {

// Of a problem, in double.
struct ImplicitVectors {
  static constexpr int kCount = 16;

  double *f, *g;                          // (n,) (m,) the solution with <a, f> = <b, g>
  double *f_bar, *g_bar, *a_bar, *b_bar;  // (n,) (m,) (n,) (m,)
  double *row_mass, *c;                   // (n,) (m,) sums of P over the dampings
  double *inverse_r, *inverse_c;          // (n,) (m,) 0 for padding
  double *base, *w;                       // (n,) f_bar / r; row sums, products, alpha
  double *beta, *rest, *q, *direction;    // (m,)

  OTLOSS_DEVICE ImplicitVectors(double* memory, int64_t length) {
    for (double** const v : {&f, &g, &f_bar, &g_bar, &a_bar, &b_bar, &row_mass, &c, &inverse_r,
                             &inverse_c, &base, &w, &beta, &rest, &q, &direction})
      *v = memory, memory += length;
  }
};

// The plan of a group and the solution of its linear system.
template <typename T>
struct PlanOfPoints {
  PackedPair<T> points;
  T* F;      // (B, packed_stride(n)) k f + log2 a, kLog2Zero past the end
  T* G;      // (B, packed_stride(m)) k g + log2 b
  T* alpha;  // (B, n)
  T* beta;   // (B, m)
};

template <typename T>
struct ImplicitArguments {
  Pack<ImplicitGroup<T>> pack;
  PlanOfPoints<T> plans[kMaxGroups];
  double eps;
  Objective objective;
  Orders<T, double> orders;
  double* vectors;  // (problems, ImplicitVectors::kCount, orders.length)

  OTLOSS_DEVICE ImplicitVectors vectors_of(int64_t problem) const {
    return {vectors + problem * ImplicitVectors::kCount * orders.length, orders.length};
  }
};

// What a problem waits for: sums of P and of P C, the right-hand side, a product of the iterations,
// and the last one.
enum class Stage : int { kSums, kCosts, kRight, kStep, kBack };

// What is kept of a problem, with all pointers: threads would have them in local memory.
template <typename T>
struct ImplicitState {
  ImplicitVectors v;
  const T *a, *b;  // (n,) (m,)
  T *F, *G;        // exponents of the plan
  Penalty of_x, of_y;
  double scale, mass_a, mass_b;
  double mass, floor, first, rz;  // of c; rounding of the right-hand side; squared residuals
  int iterations;
  Stage stage;
  bool symmetric, balanced;
};

}  // namespace otloss::cuda
