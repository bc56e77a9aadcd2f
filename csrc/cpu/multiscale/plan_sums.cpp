// The plan of a multiscale solve, at fixed potentials, times coordinates or what is given.
#include <vector>

#include "cpu/multiscale/plan.h"
#include "cpu/parallel.h"
#include "kernels.h"

namespace otloss::cpu {

template <typename T>
void plan_sums(const std::vector<PlanSumsGroup<T>>& groups, double eps) {
  multiscale::for_each_problem(groups, [&](const PlanSumsGroup<T>& group, int64_t p, bool split) {
    const PointPair<T>& points = group.made.points;
    const bool one = group.made.symmetric;
    const int64_t d = points.d;
    const multiscale::Fixed fixed(points, p, group.n, group.a, group.f, group.m, group.b, group.g,
                                  one, eps, split, group.penalties);
    multiscale::Engine engine = fixed.engine(eps, one, split);
    std::vector<double> of_rows(fixed.x.size * d), of_columns;
    if (group.made.y.sum) of_columns.resize(fixed.y.size * d);
    engine.displacements(eps, fixed.F.data(), fixed.g.data(), fixed.x.w.data(), of_rows.data(),
                         group.made.y.sum ? of_columns.data() : nullptr);
    double scale = static_cast<double>(group.coefficient) * static_cast<double>(group.grad[p]);
    if (points.kind == CostKind::kSqEuclidean) scale *= 2;
    if (one) scale *= 2;  // both sides are x
    scale /= fixed.clouds.scale;
    multiscale::put(group.made.x, p, group.n, d, scale, fixed.in_x, of_rows);
    multiscale::put(group.made.y, p, group.m, d, scale, fixed.in_y, of_columns);
  });
}

template <typename T>
void plan_products(const std::vector<PlanProductGroup<T>>& groups, double eps) {
  constexpr double kMissing = 1e-6;  // of the mass, whatever tolerance was asked for
  multiscale::for_each_problem(
      groups, [&](const PlanProductGroup<T>& group, int64_t p, bool split) {
        const int64_t n = group.n, m = group.m, count = group.columns;
        const multiscale::Fixed fixed(group.points, p, n, group.a, group.f, m, group.b, group.g,
                                      false, eps, split, group.penalties, kMissing);
        multiscale::Engine engine = fixed.engine(eps, false, split);
        const int64_t rows = fixed.x.size, columns = fixed.y.size;
        std::vector<double> v(count * columns), out(count * rows);
        for (int64_t c = 0; c < count; ++c)
          for (size_t j = 0; j < fixed.in_y.size(); ++j)
            v[c * columns + j] = group.v[(p * m + fixed.in_y[j]) * count + c];
        engine.apply(eps, fixed.F.data(), fixed.g.data(), count, v.data(), out.data());
        double* to = group.out + p * n * count;
        std::fill(to, to + n * count, 0.0);
        for (size_t i = 0; i < fixed.in_x.size(); ++i)
          for (int64_t c = 0; c < count; ++c)
            to[fixed.in_x[i] * count + c] = fixed.x.w[i] * out[c * rows + i];
      });
}

#define OTLOSS_INSTANTIATE(T)                                            \
  template void plan_sums(const std::vector<PlanSumsGroup<T>>&, double); \
  template void plan_products(const std::vector<PlanProductGroup<T>>&, double);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
