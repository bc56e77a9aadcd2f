// What the multiscale engines of CPU and GPU have in common: constants, and bounds of an entry of
// the plan between two leaves, which partners.h of the CPU's engine explains.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/math.h"

namespace otloss::multiscale {

constexpr float kNone = -1e30f;  // log2 of 0

// ------------------------------------------------------------------------------------- levels

constexpr int64_t kPoints = 4;      // that a centroid stands for
constexpr int64_t kCoarsest = 500;  // points of the coarsest level, at most
constexpr double kStageTol = 0.01;  // of all levels but the finest
constexpr int64_t kStagePasses = 100;
constexpr double kLog2Ratio = 2.2;  // of one eps to the next within a level, at most
// eps of a level over the mean squared distance of the points to its centroids, at least: of two
// clouds, of one against itself.
constexpr double kPerSpread = 1.5, kSelfPerSpread = 6;

// Of the finest level all passes count: what a stage before the last may take of those that are
// left. 0: it is left out.
OTLOSS_HOST_DEVICE int64_t stage_passes(int64_t left) {
  const int64_t half = left / 2;
  return half < 2 ? 0 : half < kStagePasses ? half : kStagePasses;
}

OTLOSS_HOST_DEVICE int64_t level_count(int64_t n) {
  int64_t count = 1;
  for (; n > kCoarsest; n = (n + kPoints - 1) / kPoints) ++count;
  return count;
}

// How many of `count` points of a tree's node are in its first half: whole runs of `unit` points,
// so that every aligned run of points is a compact set.
OTLOSS_HOST_DEVICE int64_t first_half(int64_t count) {
  int64_t unit = kPoints;
  while (unit * 4 <= count) unit *= 2;
  const int64_t half = (count / 2 + unit / 2) / unit;
  return (half > 1 ? half : 1) * unit;
}

// ---------------------------------------------------------------------------------- precision

constexpr double kShare = 0.01;  // of what may be left out, by one pair of leaves
constexpr double kLess = 8, kLeastThreshold = 1e-12;  // where more is left out than may be
// What may be left out of the plan at fixed potentials.
constexpr double kLeftOut = 1e-4;

// The part of an entry of the plan that single precision changes, for each bit that the largest
// term of its exponent can have: terms that cancel leave their rounding behind.
constexpr double kTermRounding = 2.5e-8;
// The part of a row's sum that it changes, beside what it does to exponents.
constexpr double kSumRounding = 1e-7;

// Whether a row's or column's sum is of a good guess: what was left out of it is little.
OTLOSS_HOST_DEVICE bool is_good_sum(double sum) {
  constexpr double kLeast = 1e-3, kMost = 1e18;
  return sum > kLeast && sum < kMost;
}

// ------------------------------------------------------------------------------------- bounds

// Of the largest number in a bound.
constexpr float kBoundRounding = 1e-6f;

// The largest log2 density of a pair of leaves. bases: the planes' and the cost's; most_x, most_y:
// the largest alpha and beta; inner: the largest 2k <u, v>; terms: the largest of an exponent.
OTLOSS_HOST_DEVICE float pair_bound(float shift, float most_x, float most_y, float inner,
                                    float terms) {
  const float size = fabsf(most_x) + fabsf(most_y) + fabsf(shift) + terms;
  return most_x + most_y + shift + inner + kBoundRounding * size;
}

}  // namespace otloss::multiscale
