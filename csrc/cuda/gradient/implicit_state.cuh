// What the kernels of the implicit gradient are given, and what is kept of a problem between them.
#pragma once

#include "core/penalty.h"
#include "cuda/pass/sweeps.cuh"

namespace otloss::cuda {

// Of a problem, in double.
struct ImplicitVectors {
  static constexpr int kCount = 12;

  double *f, *g;                          // (n,) (m,) the solution with <a, f> = <b, g>
  double *f_bar, *g_bar, *a_bar, *b_bar;  // (n,) (m,) (n,) (m,)
  double *row_mass, *c;                   // (n,) (m,) sums of P over the dampings
  double *w, *beta;                       // (n,) (m,) row vectors and alpha; beta
  double *rest, *direction;               // (m,)

  OTLOSS_DEVICE ImplicitVectors(double* memory, int64_t length) {
    for (double** const v :
         {&f, &g, &f_bar, &g_bar, &a_bar, &b_bar, &row_mass, &c, &w, &beta, &rest, &direction})
      *v = memory, memory += length;
  }
};

// The plan of a group and the solution of its linear system.
template <typename T>
struct PlanOfPoints {
  PackedPair<T> points;
  T* F;      // (B, packed_stride(n)) k f + log2 a, kLog2Zero past the end
  T* G;      // (B, packed_stride(m)) k g + log2 b
  T* alpha;  // (B, n), or null: there is no system
  T* beta;   // (B, m)
};

template <typename T>
struct ImplicitArguments {
  Pack<ImplicitGroup<T>> pack;
  PlanOfPoints<T> plans[kMaxGroups];
  double eps;
  Objective objective;
  bool fixed;  // the gradient at fixed potentials
  Sweeps<T, double> orders;
  double* vectors;  // (problems, ImplicitVectors::kCount, orders.length)
};

// What a problem waits for: sums of P and of P C, the right-hand side, a product of the iterations,
// and the last one.
enum class Stage : int { kSums, kCosts, kRight, kStep, kBack };

// What is kept of a problem.
struct ImplicitState {
  double mass_a, mass_b;
  double mass, floor, first, rz;  // of c; rounding of the right-hand side; squared residuals
  int64_t iterations;
  Stage stage;
};

}  // namespace otloss::cuda
