// The inner loops over a stored cost matrix, vectorised. See sweep.cpp.
//
// Everything is in base-2 units: F = k f, G = k g + log2 b, k = log2(e) / eps, so that an entry of
// the plan divided by its row weight is P_ij / a_i = exp2(F_i + G_j - k C_ij).
#pragma once

#include <cstdint>

#include "cpu/simd/vectors.h"

namespace otloss::cpu {

template <typename T>
struct RowSweep {
  int64_t rows;  // n
  int64_t m;     // columns
  T k;
  const T* C;        // (n, m)
  int64_t stride;    // distance of rows of C
  const T* a;        // (n,)
  const T* G;        // (padded m,) kLog2Zero from m on: rows are read to that width, and what
                     // lies there, the next row, does not count
  T* F;              // (n,) in: any guess, out: the exact update -log2 sum_j exp2(G_j - k C_ij)
  T* s;              // (n,) out: row sums of the plan before the update, over a
  T* c;              // (m,) accumulated: column sums of the plan after the update, with
                     // room for padded m; null: not wanted
  T* e;              // (kSweepScratchRows, padded m) scratch, finite on entry
  int64_t readable;  // rows [0, readable) of C may be read up to the padded width
  T tilt;            // c is of the plan of (1 + tilt) F: 0, or less where rows are damped
};

constexpr int64_t kSweepScratchRows = 4;

// One full iteration's reading of C: rows are made exact and their column sums accumulated, with
// one exp2 per entry. A factor for each row is all that damping takes.
template <typename T>
void sweep_rows(const RowSweep<T>& sweep);

template <typename T>
struct ColumnSoftmin {
  int64_t n;       // rows
  int64_t width;   // columns, at most kColumnBlock
  int64_t stride;  // distance of rows of C
  T k;
  const T* C;  // (n, width)
  const T* A;  // (n,) F + log2 a
  T* out;      // (width,) -log2 sum_i exp2(A_i - k C_ij)
};

// A full iteration for an eps above the costs, at totals of 1: by exponentials less 1.
//
// The weights sum to 1 by definition, not by arithmetic, so that rounding is that of the costs and
// not of eps. With z_ij = k (g_j - C_ij) and e_ij = exp2(z_ij) - 1 the row update is
// F_i = -log2(1 + sum_j b_j e_ij), and (e_ij - s_i) / (1 + s_i) is P_ij / (a_i b_j) - 1 after it.
template <typename T>
struct UnitSweep {
  int64_t rows;  // n
  int64_t m;     // columns
  T k;
  double tilt;     // see RowSweep
  const T* C;      // (n, m)
  int64_t stride;  // distance of rows of C
  const T* a;      // (n,)
  const T* b;      // (m,)
  const T* G;      // (m,) k g
  T* F;            // (n,) in: a guess, out: the exact update
  T* s;            // (n,) out: row sums of the plan before the update, over a
  T* c;            // (m,) accumulated: column sums of the plan after it over b, less 1; or null
  T* e;            // (m,) scratch
};

template <typename T>
void unit_sweep_rows(const UnitSweep<T>& sweep);

constexpr int64_t kColumnBlock = 64;

// The softmin of a block of columns with the maximum subtracted, for sums that cannot be trusted.
template <typename T>
void column_softmin(const ColumnSoftmin<T>& block);

template <typename T>
struct PlanRows {
  int64_t rows;  // n
  int64_t m;     // columns
  T k;
  T scale;
  const T* C;      // (n, m)
  int64_t stride;  // distance of rows of C
  const T* a;      // (n,)
  const T* F;      // (n,)
  const T* G;      // (m,)
  T* P;            // (n, m) out: scale * plan
};

template <typename T>
void plan_rows(const PlanRows<T>& plan);

// <P, C> over the rows; `P` and `scale` are not used.
template <typename T>
double transport_rows(const PlanRows<T>& plan);

// An interval with all costs, and 0; NaN where one is not finite.
struct CostRange {
  double least, most;

  double max_abs() const { return most >= -least ? most : -least; }
};

// Of the C_ij, C (n, m) with rows `stride` apart, where a_i b_j > 0.
template <typename T>
CostRange cost_range(int64_t n, int64_t m, const T* C, int64_t stride, const T* a, const T* b);

// ------------------------------------------------------------------------------ plans in memory

template <typename T>
struct PlanSums {
  int64_t rows;  // n
  int64_t m;     // columns
  const T* P;    // (n, m)
  const T* C;    // (n, m) or null: sums of P alone
  double* row;   // (n,) out: sum_j P_ij C_ij
  double* col;   // (m,) accumulated: sum_i P_ij C_ij
};

template <typename T>
void plan_sums(const PlanSums<T>& sums);

// P_ij (s + t C_ij + alpha_i + beta_j), which may replace P; 0 where P is 0, whatever C.
template <typename T>
struct WeighPlan {
  int64_t rows;  // n
  int64_t m;     // columns
  T s;
  T t;
  const T* P;      // (n, m)
  const T* C;      // (n, m)
  const T* alpha;  // (n,)
  const T* beta;   // (m,)
  T* out;          // (n, m)
};

template <typename T>
void weigh_plan(const WeighPlan<T>& args);

// w_i = base_i + factor_i sum_j P_ij x_j, then y_j += sum_i P_ij w_i: both products in one reading
// of P.
template <typename T>
struct PlanProduct {
  int64_t rows;          // n
  int64_t m;             // columns
  const T* P;            // (n, m)
  const double* x;       // (m,) or null: 0
  const double* base;    // (n,) or null: 0
  const double* factor;  // (n,)
  double* w;             // (n,) out
  double* y;             // (m,) accumulated, or null: not wanted
};

template <typename T>
void plan_product(const PlanProduct<T>& product);

}  // namespace otloss::cpu
