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

// Of values that are given for all points, those of the ones in order.
template <typename T>
std::vector<double> in_order(const T* values, const std::vector<int32_t>& in) {
  std::vector<double> result;
  for (const int32_t i : in) result.push_back(static_cast<double>(values[i]));
  return result;
}

// A problem's two clouds with their leaves, and potentials in order, as a balanced one.
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
    F = in_order(f + p * n, in_x), g = in_order(v + p * m, in_y);
    set_marginal(x, on_x, F);
    if (!one) set_marginal(y, on_y, g);
    for (double& value : F) value *= kLog2E / eps / on_x.damping(eps);
    for (double& value : g) value /= on_y.damping(eps);
    const int64_t L = leaf_size(x, y, eps, {left_out, one, split});
    x.build(L, split);
    if (!one) y.build(L, split);
    F.resize(x.size), g.resize(y.size);
  }

  Engine engine(double eps, bool one, bool split) const { return between(x, y, eps, one, split); }
  // With the columns as rows.
  Engine exchanged(double eps, bool split) const { return between(y, x, eps, false, split); }

 private:
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
