// What the gradient of the points of one side needs, without a matrix: a few rows of the cost's
// gradient are made, weighed by the derivative of the cost and applied to the other side's points.
// The points of the other side are rows of the same with roles exchanged.
#pragma once

#include <algorithm>

#include "core/math.h"
#include "cpu/cost/points.h"
#include "cpu/engines/rows.h"
#include "cpu/gradient/adjoint.h"
#include "cpu/problems.h"
#include "cpu/simd/sweep.h"
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

// Sets the sums of one problem, `at_once` rows at a time. gradient(C, first row, rows, stride, V)
// fills V (rows, stride) from C (rows, stride), up to the stride with anything finite.
template <typename T, typename Gradient>
void point_sums(const MadeRows<T>& source, const RowParts& parts, int64_t at_once,
                const PointSums<T>& out, Gradient&& gradient) {
  const PackedCloud<T>& to = source.to();
  const int64_t m = to.m, d = to.d, stride = padded<T>(m);
  BlockVector<T> coordinates;
  if (d > kLaneDims) {
    coordinates.resize(strips_of<T>(d) * m * kStrip<T>);
    pack(Packing<T>{d, m, to.z, d, true, coordinates.data()});
  }
  parts.for_each([&](int64_t, int64_t begin, int64_t end) {
    BlockVector<T> C(at_once * stride), V(at_once * stride);
    for (int64_t i = begin; i < end; i += at_once) {
      const int64_t count = std::min(at_once, end - i);
      source.rows(i, count, C.data(), stride);
      gradient(C.data(), i, count, stride, V.data());
      weight_rows(source.kind(), count * stride, C.data(), V.data());
      apply_rows(ApplyRows<T>{count, V.data(), stride, &to, coordinates.data(), out.sum + i,
                              out.product + i * d});
    }
  });
}

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
                bool split, const PlanGradient<T>& p, const PointSums<T>& out) {
  const MadeRows<T> source(n, m, points, problem, symmetric);
  const T k = static_cast<T>(kLog2E / p.eps);
  BlockVector<T> F(n), G(padded<T>(m), T(kLog2Zero)), beta(padded<T>(m));
  for (int64_t i = 0; i < n; ++i) F[i] = k * p.f[i];
  absorb_weights(m, k, p.g, p.b, G.data());
  if (p.beta) std::copy_n(p.beta, m, beta.begin());
  const auto gradient = [&](const T* C, int64_t i, int64_t rows, int64_t stride, T* V) {
    const T scale = p.alpha ? T(1) : p.s;
    plan_rows(PlanRows<T>{rows, stride, k, scale, C, p.a + i, F.data() + i, G.data(), V});
    if (p.alpha)
      weigh_plan(WeighPlan<T>{rows, stride, p.s, p.t, V, C, p.alpha + i, beta.data(), V});
  };
  point_sums(source, RowParts(n, m, split), source.at_once(), of_problem(out, problem, n, points.d),
             gradient);
}

}  // namespace otloss::cpu
