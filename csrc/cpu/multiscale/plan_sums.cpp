// The plan of a multiscale solve times vectors: gradients of points, barycentres, marginals.
#include <cmath>
#include <vector>

#include "core/math.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

template <typename T>
double entry(const PointPair<T>& points, const T* x, const T* y, double f, double g, double eps) {
  double cost = 0;
  for (int64_t k = 0; k < points.d; ++k) cost += std::pow(double(x[k]) - double(y[k]), 2);
  if (points.kind == CostKind::kCosine) cost /= 2;
  return std::exp((f + g - cost) / eps);
}

}  // namespace

template <typename T>
void plan_sums(const std::vector<PlanSumsGroup<T>>& groups, double eps) {
  for_each_problem(groups, [&](const PlanSumsGroup<T>& group, int64_t p, bool) {
    const int64_t n = group.n, m = group.m, d = group.made.points.d;
    const T *x = group.made.points.zx + p * n * d, *y = group.made.points.zy + p * m * d;
    std::vector<double> sx(n), sy(m), px(n * d), py(m * d);
    const double scale = double(group.coefficient) * double(group.grad[p]) *
                         (group.made.points.kind == CostKind::kCosine ? 1 : 2);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j) {
        const double V = scale * group.a[p * n + i] * group.b[p * m + j] *
                         entry(group.made.points, x + i * d, y + j * d, group.f[p * n + i],
                               group.g[p * m + j], eps);
        sx[i] += V, sy[j] += V;
        for (int64_t k = 0; k < d; ++k) px[i * d + k] += V * y[j * d + k], py[j * d + k] += V * x[i * d + k];
      }
    const auto put = [&](const PointSums<T>& out, int64_t count, const auto& s, const auto& v) {
      for (int64_t i = 0; out.sum && i < count; ++i) out.sum[p * count + i] = T(s[i]);
      for (int64_t i = 0; out.sum && i < count * d; ++i) out.product[p * count * d + i] = T(v[i]);
    };
    if (group.made.symmetric)
      for (int64_t i = 0; i < n; ++i) {
        sx[i] += sy[i];
        for (int64_t k = 0; k < d; ++k) px[i * d + k] += py[i * d + k];
      }
    put(group.made.x, n, sx, px);
    put(group.made.y, m, sy, py);
  });
}

template <typename T>
void plan_products(const std::vector<PlanProductGroup<T>>& groups, double eps) {
  for_each_problem(groups, [&](const PlanProductGroup<T>& group, int64_t p, bool) {
    const int64_t n = group.n, m = group.m, d = group.points.d;
    for (int64_t i = 0; i < n; ++i) {
      std::vector<double> sum(group.columns);
      for (int64_t j = 0; j < m; ++j) {
        const double P = double(group.a[p * n + i]) * double(group.b[p * m + j]) *
                         entry(group.points, group.points.zx + (p * n + i) * d,
                               group.points.zy + (p * m + j) * d, group.f[p * n + i],
                               group.g[p * m + j], eps);
        for (int64_t c = 0; c < group.columns; ++c) sum[c] += P * group.v[(p * m + j) * group.columns + c];
      }
      for (int64_t c = 0; c < group.columns; ++c) group.out[(p * n + i) * group.columns + c] = T(sum[c]);
    }
  });
}

#define OTLOSS_INSTANTIATE(T)                                          \
  template void plan_sums(const std::vector<PlanSumsGroup<T>>&, double); \
  template void plan_products(const std::vector<PlanProductGroup<T>>&, double);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
