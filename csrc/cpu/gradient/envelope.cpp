// Envelope gradients: of OT_eps at fixed potentials.
#include <algorithm>
#include <vector>

#include "core/math.h"
#include "cpu/gradient/point_sums.h"
#include "cpu/parallel.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

// dOT/da = f up to a constant; the one with <a, f> = <b, g>. Where a side is soft there is no
// constant to choose. The transport objective's plan is held constant, so its weights receive
// nothing.
template <typename T>
void weight_gradients(const EnvelopeGroup<T>& group, int64_t p, double eps, Objective objective) {
  if (!group.grad_a && !group.grad_b) return;
  const int64_t n = group.n, m = group.m;
  const T *f = group.f + p * n, *g = group.g + p * m;
  const Side<T> x(n, group.a + p * n, group.penalties.rho_x);
  const Side<T> y(m, group.b + p * m, group.penalties.rho_y);
  const T scale = objective == Objective::kRegularized ? group.coefficient * group.grad[p] : T(0);
  const auto fill = [&](const Side<T>& side, const Side<T>& other, const T* v, double shift,
                        T* grad) {
    for (int64_t i = 0; i < side.count; ++i) {
      const double value = group.penalties.balanced
                               ? static_cast<double>(v[i]) + shift
                               : side.weight_gradient(eps, other.mass, static_cast<double>(v[i]));
      grad[i] = side.weight[i] > T(0) ? scale * static_cast<T>(value) : T(0);
    }
  };
  const double shift = (dot(m, y.weight, g) - dot(n, x.weight, f)) / (2 * x.mass);
  if (group.grad_a) fill(x, y, f, shift, group.grad_a + p * n);
  if (group.grad_b) fill(y, x, g, -shift, group.grad_b + p * m);
}

// grad_C = coefficient * grad * P, without dummies.
template <typename T>
void matrix_gradient(const EnvelopeGroup<T>& group, int64_t p, double eps, bool split) {
  const int64_t n = group.n - group.dummies, m = group.m - group.dummies;
  const T k = factor<T>(eps);
  const T *a = group.a + p * group.n, *f = group.f + p * group.n;
  std::vector<T> F(n), G(m);
  for (int64_t i = 0; i < n; ++i) F[i] = k * f[i];
  absorb_weights(m, k, group.g + p * group.m, group.b + p * group.m, G.data());
  RowParts(n, m, split).for_each([&](int64_t, int64_t begin, int64_t end) {
    plan_rows(PlanRows<T>{end - begin, m, k, group.coefficient * group.grad[p],
                          group.matrix(p) + begin * m, m, a + begin, F.data() + begin, G.data(),
                          group.grad_C + (p * n + begin) * m});
  });
}

}  // namespace

template <typename T>
void envelope_backward(const std::vector<EnvelopeGroup<T>>& groups, const Eps& eps,
                       Objective objective) {
  for_each_problem(groups, [&](const EnvelopeGroup<T>& group, int64_t p, bool split) {
    if (group.grad_C) matrix_gradient(group, p, eps.of(p), split);
    weight_gradients(group, p, eps.of(p), objective);
  });
}

template <typename T>
void point_gradient_sums(const std::vector<PointGradientGroup<T>>& groups, const Eps& eps) {
  for_each_problem(groups, [&](const PointGradientGroup<T>& group, int64_t p, bool split) {
    const int64_t n = group.n, m = group.m;
    const PlanGradient<T> plan{eps.of(p),
                               group.coefficient * group.grad[p],
                               T(0),
                               group.a + p * n,
                               group.b + p * m,
                               group.f + p * n,
                               group.g + p * m,
                               nullptr,
                               nullptr};
    point_sums(group.points, n, m, p, group.symmetric, split, plan, {group.sum, group.product});
  });
}

#define OTLOSS_INSTANTIATE(T)                                                                   \
  template void envelope_backward(const std::vector<EnvelopeGroup<T>>&, const Eps&, Objective); \
  template void point_gradient_sums(const std::vector<PointGradientGroup<T>>&, const Eps&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
