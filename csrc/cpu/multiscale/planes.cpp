#include "cpu/multiscale/planes.h"

#include <algorithm>
#include <cmath>

#include "cpu/parallel.h"

namespace otloss::cpu::multiscale {
namespace {

// slope (d,) of the least-squares plane, from sums of (value - mean) (point - mean).
void slope_of(const Nodes& nodes, int64_t d, int64_t I, const double* sums, float* slope,
              int64_t stride) {
  for (int64_t c = 0; c < d; ++c) {
    double value = 0;
    for (int64_t e = 0; e < d; ++e)
      value += static_cast<double>(nodes.inverse[(I * d + c) * d + e]) * sums[e];
    slope[c * stride + I] = static_cast<float>(value);
  }
}

}  // namespace

void Planes::resize(const Cloud& cloud) {
  const int64_t leaves = cloud.leaf.stride, supers = cloud.super.stride;
  rest.resize(cloud.size), base.resize(cloud.leaf.count);
  top.assign(leaves, kNone), slope.assign(cloud.d * leaves, 0);
  super_top.assign(supers, kNone), super_slope.assign(cloud.d * supers, 0);
}

void Planes::fit_leaf(const Cloud& cloud, double k, const double* V, int64_t I) {
  const int64_t L = cloud.L, d = cloud.d, stride = cloud.leaf.stride;
  const int64_t count = std::min(L, cloud.n - I * L);  // the others have no weight
  const float* u = &cloud.u[I * d * L];
  // Exact coordinates, not u: what rounding moves them by counts along the slope, far from y.
  const double *X = &cloud.X[I * L * d], *at = &cloud.leaf.centre[I * d];
  double left[kMostLeaf], mean = 0, sums[kMultiscaleDims] = {};
  for (int64_t i = 0; i < count; ++i) {
    double square = 0;
    for (int64_t c = 0; c < d; ++c) square += (X[i * d + c] - at[c]) * (X[i * d + c] - at[c]);
    left[i] = V[I * L + i] - k * square;
  }
  for (int64_t i = 0; i < count; ++i) mean += left[i];
  mean /= static_cast<double>(count);
  for (int64_t c = 0; c < d; ++c) {
    const float centre = cloud.leaf.mean[I * d + c];
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < count; ++i)
      sum += (left[i] - mean) * static_cast<double>(u[c * L + i] - centre);
    sums[c] = sum;
  }
  slope_of(cloud.leaf, d, I, sums, slope.data(), stride);
  for (int64_t c = 0; c < d; ++c) {
    const double along = static_cast<double>(slope[c * stride + I]);
    for (int64_t i = 0; i < count; ++i) left[i] -= along * (X[i * d + c] - at[c]);
  }
  const double most = *std::max_element(left, left + count);
  for (int64_t i = 0; i < L; ++i)
    rest[I * L + i] = i < count ? static_cast<float>(left[i] - most) : kNone;
  base[I] = most, top[I] = static_cast<float>(most);
}

void Planes::fit_super(const Cloud& cloud, double k, int64_t S) {
  const int64_t d = cloud.d, leaves = cloud.leaf.stride, supers = cloud.super.stride;
  const int64_t first = S * kSuper, count = std::min(kSuper, cloud.leaf.count - first);
  double value[kSuper], from[kSuper][kMultiscaleDims], mean = 0, sums[kMultiscaleDims] = {};
  for (int64_t i = 0; i < count; ++i) {
    value[i] = base[first + i];
    for (int64_t c = 0; c < d; ++c) {
      const double x = cloud.leaf.centre[(first + i) * d + c] - cloud.super.centre[S * d + c];
      from[i][c] = x, value[i] -= k * x * x;
    }
    mean += value[i] / static_cast<double>(count);
  }
  for (int64_t i = 0; i < count; ++i)
    for (int64_t c = 0; c < d; ++c)
      sums[c] +=
          (value[i] - mean) * (from[i][c] - static_cast<double>(cloud.super.mean[S * d + c]));
  slope_of(cloud.super, d, S, sums, super_slope.data(), supers);
  double most = static_cast<double>(kNone);
  for (int64_t i = 0; i < count; ++i) {
    double over = value[i], box = 0, ball = 0;
    for (int64_t c = 0; c < d; ++c) {
      const double plane = static_cast<double>(super_slope[c * supers + S]);
      const double tilt =
          static_cast<double>(slope[c * leaves + first + i]) - 2 * k * from[i][c] - plane;
      over -= plane * from[i][c];
      box += std::abs(tilt) * static_cast<double>(cloud.leaf.half[c * leaves + first + i]);
      ball += tilt * tilt;
    }
    const double radius = static_cast<double>(cloud.leaf.radius[first + i]);
    most = std::max(most, over + std::min(box, std::sqrt(ball) * radius));
  }
  super_top[S] = static_cast<float>(most);
}

void Planes::fit(const Cloud& cloud, double k, const double* V, bool split) {
  resize(cloud);
  const auto fit_some = [&](int64_t begin, int64_t end) {
    for (int64_t S = begin; S < end; ++S) {
      const int64_t last = std::min(cloud.leaf.count, (S + 1) * kSuper);
      for (int64_t I = S * kSuper; I < last; ++I) fit_leaf(cloud, k, V, I);
      fit_super(cloud, k, S);
    }
  };
  constexpr int64_t kGrain = 16;
  if (split)
    parallel_for(0, cloud.super.count, kGrain, fit_some);
  else
    fit_some(0, cloud.super.count);
}

std::vector<double> extended(const Cloud& fine, const Cloud& coarse, const Planes& planes, double k,
                             int64_t points) {
  const int64_t d = fine.d, stride = coarse.leaf.stride;
  std::vector<double> V(fine.n);
  for (int64_t i = 0; i < fine.n; ++i) {
    const int64_t parent = i / points, J = parent / coarse.L;
    double value = planes.base[J] + static_cast<double>(planes.rest[parent]), square = 0;
    for (int64_t c = 0; c < d; ++c) {
      const double u = fine.X[i * d + c] - coarse.leaf.centre[J * d + c];
      value += static_cast<double>(planes.slope[c * stride + J]) * u, square += u * u;
    }
    V[i] = value + k * square;
  }
  return V;
}

}  // namespace otloss::cpu::multiscale
