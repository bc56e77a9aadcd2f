#include "cpu/gradient/point_sums.h"

#include <algorithm>

#include "core/math.h"
#include "cpu/simd/rows_product.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"

namespace otloss::cpu {

template <typename T>
void point_sums(const RowSource<T>& source, const RowParts& parts, int64_t at_once,
                const PointSums<T>& out, RowGradient<T> gradient) {
  const PackedCloud<T>& to = source.to();
  const int64_t m = to.m, d = to.d, stride = padded<T>(m);
  BlockVector<T> coordinates;
  const T even = evenness(traits_of(source.kind()).unit_norm, m, to.norm);
  if (d > kLaneDims) {
    coordinates.resize(strips_of<T>(d) * m * kStrip<T>);
    pack(Packing<T>{d, m, to.z, d, true, coordinates.data()});
  }
  parts.for_each([&](int64_t, int64_t begin, int64_t end) {
    BlockVector<T> C(at_once * stride), V(at_once * stride);
    for (int64_t i = begin; i < end && !interrupted(); i += at_once) {
      const int64_t count = std::min(at_once, end - i);
      source.make(i, count, 0, m, C.data(), stride);
      gradient(C.data(), i, count, stride, V.data());
      weight_rows(source.kind(), count * stride, C.data(), V.data());
      apply_rows(ApplyRows<T>{count, V.data(), stride, &to, coordinates.data(), even, out.sum + i,
                              out.product + i * d});
    }
  });
}

template <typename T>
void point_sums(const PointPair<T>& points, int64_t n, int64_t m, int64_t problem, bool symmetric,
                bool split, const PlanGradient<T>& p, const PointSums<T>& out) {
  const RowSource<T> source(n, m, {}, m, points, problem, symmetric);
  const T k = factor<T>(p.eps);
  BlockVector<T> F(n), G(padded<T>(m), T(kLog2Zero)), beta(padded<T>(m));
  for (int64_t i = 0; i < n; ++i) F[i] = k * p.f[i];
  absorb_weights(m, k, p.g, p.b, G.data());
  if (p.beta) std::copy_n(p.beta, m, beta.begin());
  const auto gradient = [&](const T* C, int64_t i, int64_t rows, int64_t stride, T* V) {
    const T scale = p.alpha ? T(1) : p.s;
    plan_rows(PlanRows<T>{rows, stride, k, scale, C, stride, p.a + i, F.data() + i, G.data(), V});
    if (p.alpha)
      weigh_plan(WeighPlan<T>{rows, stride, p.s, p.t, V, C, p.alpha + i, beta.data(), V});
  };
  point_sums<T>(source, RowParts(n, m, split), source.at_once(),
                of_problem(out, problem, n, points.d), gradient);
}

#define OTLOSS_INSTANTIATE(T)                                                                  \
  template void point_sums(const RowSource<T>&, const RowParts&, int64_t, const PointSums<T>&, \
                           RowGradient<T>);                                                    \
  template void point_sums(const PointPair<T>&, int64_t, int64_t, int64_t, bool, bool,         \
                           const PlanGradient<T>&, const PointSums<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
