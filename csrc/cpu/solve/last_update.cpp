#include "cpu/solve/last_update.h"

#include <cmath>
#include <vector>

#include "core/last_update.h"
#include "cpu/engines/engine.h"
#include "cpu/simd/vectors.h"

namespace otloss::cpu {
namespace {

using Vector = std::vector<double>;

// A prepared cloud; directions of length 1 in double, too.
struct DoubleCloud {
  Vector z, norm;

  template <typename T>
  DoubleCloud(CostKind kind, int64_t count, int64_t d, const T* points, const T* norms)
      : z(points, points + count * d), norm(norms, norms + count) {
    const bool unit = traits_of(kind).unit_norm;
    for (int64_t i = 0; i < count; ++i) {
      double* row = z.data() + i * d;
      const double square = dot(d, row, row);
      if (!unit) norm[i] = square;
      for (int64_t k = 0; unit && square > 0 && k < d; ++k) row[k] /= std::sqrt(square);
    }
  }
};

// Weights of the total `mass`.
template <typename T>
Vector weights(int64_t count, const T* w, double mass) {
  Vector result(w, w + count);
  double sum = 0;
  for (const double weight : result) sum += weight;
  for (double& weight : result) weight *= mass / sum;
  return result;
}

}  // namespace

template <typename T>
double value_in_double(const SolveGroup<T>& p, int64_t problem, double eps, bool split) {
  const int64_t n = p.n, m = p.m, d = p.points.d;
  const T *a = p.a + problem * n, *b = p.b + problem * m;
  const auto cloud = [&](int64_t count, const T* z, const T* norm) {
    return DoubleCloud(p.points.kind, count, d, z + problem * count * d, norm + problem * count);
  };
  const DoubleCloud from = cloud(n, p.points.zx, p.points.hx),
                    to = cloud(m, p.points.zy, p.points.hy);
  SolveGroup<double> group{};
  group.batch = 1, group.n = n, group.m = m;
  group.symmetric = p.symmetric;
  group.points = {p.points.kind, d, from.z.data(), to.z.data(), from.norm.data(), to.norm.data()};
  // Totals as the solver took them: 1 where they are but for the rounding of T.
  const double mass_x = Side<T>(n, a, p.penalties.rho_x).mass;
  const double mass_y = p.penalties.balanced ? mass_x : Side<T>(m, b, p.penalties.rho_y).mass;
  const Vector weight_x = weights(n, a, mass_x), weight_y = weights(m, b, mass_y);
  const Side<double> x(n, weight_x.data(), p.penalties.rho_x);
  const Side<double> y(m, weight_y.data(), p.penalties.rho_y);
  Engine<double> engine(x, y, group, 0, eps, split);

  const double damping = x.damping(eps), to_cost = eps / kLog2E;
  Vector F(p.f + problem * n, p.f + (problem + 1) * n), s(n);
  for (double& value : F) value /= damping * to_cost;
  const Vector g(p.g + problem * m, p.g + (problem + 1) * m);
  engine.update_rows(eps, g.data(), F.data(), s.data());
  const SoftMean f = x.soft_mean(F.data(), damping * to_cost), by_g = y.soft_mean(g.data(), 1);
  return updated_value(p.penalties.balanced, x, y, x.mass, y.mass, eps, f, by_g);
}

template double value_in_double(const SolveGroup<float>&, int64_t, double, bool);

}  // namespace otloss::cpu
