// The plan of a multiscale solve, at fixed potentials, times coordinates or what is given.
#include <algorithm>
#include <limits>
#include <vector>

#include "core/math.h"
#include "cpu/multiscale/levels.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

using multiscale::Cloud;
using multiscale::Clouds;

// Of the plan: what may be left out of it.
constexpr double kLeftOut = 1e-4;

// A problem's two clouds with their leaves, and potentials in order.
struct Fixed {
  Clouds clouds;
  Cloud &x, &y;
  const std::vector<int32_t>&in_x, &in_y;
  std::vector<double> F, g;

  template <typename T>
  Fixed(const PointPair<T>& points, int64_t p, int64_t n, const T* a, const T* f, int64_t m,
        const T* b, const T* v, bool one, double eps, bool split)
      : clouds(points, p, n, a + p * n, m, b + p * m, one, split),
        x(clouds.x),
        y(one ? clouds.x : clouds.y),
        in_x(clouds.in_x),
        in_y(one ? clouds.in_x : clouds.in_y) {
    const int64_t L = leaf_size(x, y, eps, {kLeftOut, one, split});
    x.build(L, split);
    if (!one) y.build(L, split);
    F.resize(x.size), g.resize(y.size);
    for (int64_t i = 0; i < x.n; ++i) F[i] = kLog2E / eps * static_cast<double>(f[p * n + in_x[i]]);
    for (int64_t j = 0; j < y.n; ++j) g[j] = static_cast<double>(v[p * m + in_y[j]]);
  }

  multiscale::Engine engine(double eps, bool one, bool split) const {
    constexpr double kHard = std::numeric_limits<double>::infinity();
    return {x, y, kHard, kHard, eps, {kLeftOut, one, split}};
  }
};

// One side's product, of V = scale P and the differences to the row's own point: to these its sum
// of V adds 0. What cancels has done so in double.
template <typename T>
void put(const PointSums<T>& out, int64_t p, int64_t count, int64_t d, double scale,
         const std::vector<int32_t>& in, const std::vector<double>& displacement) {
  if (!out.sum) return;
  T *sums = out.sum + p * count, *products = out.product + p * count * d;
  std::fill(sums, sums + count, T(0)), std::fill(products, products + count * d, T(0));
  for (size_t i = 0; i < in.size(); ++i)
    for (int64_t c = 0; c < d; ++c)
      products[in[i] * d + c] = static_cast<T>(scale * displacement[i * d + c]);
}

}  // namespace

template <typename T>
void plan_sums(const std::vector<PlanSumsGroup<T>>& groups, double eps) {
  multiscale::for_each_problem(groups, [&](const PlanSumsGroup<T>& group, int64_t p, bool split) {
    const PointPair<T>& points = group.made.points;
    const bool one = group.made.symmetric;
    const int64_t d = points.d;
    const Fixed fixed(points, p, group.n, group.a, group.f, group.m, group.b, group.g, one, eps,
                      split);
    multiscale::Engine engine = fixed.engine(eps, one, split);
    std::vector<double> of_rows(fixed.x.size * d), of_columns;
    if (group.made.y.sum) of_columns.resize(fixed.y.size * d);
    engine.displacements(eps, fixed.F.data(), fixed.g.data(), of_rows.data(),
                         group.made.y.sum ? of_columns.data() : nullptr);
    double scale = static_cast<double>(group.coefficient) * static_cast<double>(group.grad[p]);
    if (points.kind == CostKind::kSqEuclidean) scale *= 2;
    if (one) scale *= 2;  // both sides are x
    scale /= fixed.clouds.scale;
    put(group.made.x, p, group.n, d, scale, fixed.in_x, of_rows);
    put(group.made.y, p, group.m, d, scale, fixed.in_y, of_columns);
  });
}

template <typename T>
void plan_products(const std::vector<PlanProductGroup<T>>& groups, double eps) {
  multiscale::for_each_problem(groups, [&](const PlanProductGroup<T>& group, int64_t p,
                                           bool split) {
    const int64_t n = group.n, m = group.m, count = group.columns;
    const Fixed fixed(group.points, p, n, group.a, group.f, m, group.b, group.g, false, eps, split);
    multiscale::Engine engine = fixed.engine(eps, false, split);
    const int64_t rows = fixed.x.size, columns = fixed.y.size;
    std::vector<double> v(count * columns), out(count * rows);
    for (int64_t c = 0; c < count; ++c)
      for (size_t j = 0; j < fixed.in_y.size(); ++j)
        v[c * columns + j] = static_cast<double>(group.v[(p * m + fixed.in_y[j]) * count + c]);
    engine.apply(eps, fixed.F.data(), fixed.g.data(), count, v.data(), out.data());
    T* to = group.out + p * n * count;
    std::fill(to, to + n * count, T(0));
    for (size_t i = 0; i < fixed.in_x.size(); ++i)
      for (int64_t c = 0; c < count; ++c)
        to[fixed.in_x[i] * count + c] = static_cast<T>(fixed.x.w[i] * out[c * rows + i]);
  });
}

#define OTLOSS_INSTANTIATE(T)                                            \
  template void plan_sums(const std::vector<PlanSumsGroup<T>>&, double); \
  template void plan_products(const std::vector<PlanProductGroup<T>>&, double);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
