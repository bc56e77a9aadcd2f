// What the gradient of the points of one side needs, without a matrix: a few rows of the cost's
// gradient are made, weighed by the derivative of the cost and applied to the other side's points.
// For the points of the other side the roles are exchanged.
#pragma once

#include "cpu/engines/rows.h"
#include "kernels.h"

namespace otloss::cpu {

template <typename T>
PointPair<T> exchanged(const PointPair<T>& pair) {
  return {pair.kind, pair.d, pair.zy, pair.zx, pair.hy, pair.hx};
}

// Of problem p.
template <typename T>
PointSums<T> of_problem(const PointSums<T>& sums, int64_t p, int64_t n, int64_t d) {
  return {sums.sum + p * n, sums.product + p * n * d};
}

// gradient(C, first row, rows, stride, V) fills V (rows, stride) from C (rows, stride), up to the
// stride with anything finite.
template <typename T>
using RowGradient =
    FunctionRef<void(const T* C, int64_t first, int64_t rows, int64_t stride, T* V)>;

// Sets the sums of one problem, `at_once` rows at a time.
template <typename T>
void point_sums(const RowSource<T>& source, const RowParts& parts, int64_t at_once,
                const PointSums<T>& out, RowGradient<T> gradient);

// A gradient of the cost that is the plan times s + t C_ij + alpha_i + beta_j.
template <typename T>
struct PlanGradient {
  double eps;
  T s;
  T t;
  const T* a;      // (n,)
  const T* b;      // (m,)
  const T* f;      // (n,)
  const T* g;      // (m,)
  const T* alpha;  // (n,) or null: the plan times s alone
  const T* beta;   // (m,) or null
};

template <typename T>
void point_sums(const PointPair<T>& points, int64_t n, int64_t m, int64_t problem, bool symmetric,
                bool split, const PlanGradient<T>& plan, const PointSums<T>& out);

}  // namespace otloss::cpu
