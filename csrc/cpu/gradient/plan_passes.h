// What the unrolled and the implicit gradient share: sums over a plan that is kept, and the cost
// gradient made from it.
#pragma once

#include <cstdint>

namespace otloss::cpu {

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
