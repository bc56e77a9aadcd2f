// The plan of a multiscale solve at fixed potentials, for gradients and products.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "core/math.h"
#include "core/penalty.h"
#include "cpu/multiscale/levels.h"
#include "kernels.h"

namespace otloss::cpu::multiscale {

// A problem's two clouds with their leaves, and potentials in order. An unbalanced plan is given as
// the balanced one of its marginals, a exp(-f / rho_x) for a, (1 + eps / rho_x) f for f: what is
// left out is then little of these, however little is transported.
struct Fixed {
  const double left_out;
  Clouds clouds;
  Cloud &x, &y;
  const std::vector<int32_t>&in_x, &in_y;
  std::vector<double> F, g;

  template <typename T>
  Fixed(const PointPair<T>& points, int64_t p, int64_t n, const T* a, const T* f, int64_t m,
        const T* b, const T* v, bool one, double eps, bool split, const Penalties& penalties,
        double left_out = kLeftOut)
      : left_out(left_out),
        clouds(points, p, n, a + p * n, m, b + p * m, one, split),
        x(clouds.x),
        y(one ? clouds.x : clouds.y),
        in_x(clouds.in_x),
        in_y(one ? clouds.in_x : clouds.in_y) {
    const Penalty on_x{1 / penalties.rho_x}, on_y{1 / penalties.rho_y};
    set_marginal(x, in_x, f + p * n, on_x);
    if (!one) set_marginal(y, in_y, v + p * m, on_y);
    const int64_t L = leaf_size(x, y, eps, {left_out, one, split});
    x.build(L, split);
    if (!one) y.build(L, split);
    F.resize(x.size), g.resize(y.size);
    const double k = kLog2E / eps / on_x.damping(eps), along = 1 / on_y.damping(eps);
    for (int64_t i = 0; i < x.n; ++i) F[i] = k * static_cast<double>(f[p * n + in_x[i]]);
    for (int64_t j = 0; j < y.n; ++j) g[j] = along * static_cast<double>(v[p * m + in_y[j]]);
  }

  Engine engine(double eps, bool one, bool split) const { return between(x, y, eps, one, split); }
  // With the columns as rows.
  Engine exchanged(double eps, bool split) const { return between(y, x, eps, false, split); }

 private:
  template <typename T>
  static void set_marginal(Cloud& cloud, const std::vector<int32_t>& in, const T* f,
                           const Penalty& penalty) {
    constexpr double kLeast = std::numeric_limits<double>::min();  // points without weight are none
    for (int64_t i = 0; i < cloud.n; ++i)
      cloud.w[i] = std::max(kLeast, cloud.w[i] * penalty.share(static_cast<double>(f[in[i]])));
  }
  Engine between(const Cloud& x, const Cloud& y, double eps, bool one, bool split) const {
    constexpr double kHard = std::numeric_limits<double>::infinity();
    return {x, y, kHard, kHard, eps, {left_out, one, split}};
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

// Of implicit_backward (core/implicit_system.h): every product from the lists of the first.
template <typename T>
void implicit_backward(const std::vector<ImplicitGroup<T>>& groups, double eps,
                       Objective objective);

}  // namespace otloss::cpu::multiscale
