// The scalar part of the solver, for host and device: which stages of eps to go through, and the
// quasi-Newton step as coefficients of the stored vectors.
//
// On a GPU every inner product costs a barrier over all blocks of a problem, and the two-loop
// recursion needs two per stored pair, one after the other. So the products of all pairs are kept
// (a Gram matrix), the new ones of an iteration are computed together, and the recursion runs on
// scalars.
#pragma once

#include <cmath>

#include "math.h"

namespace otloss {

// eps goes first, first * ratio, ..., eps in `count` steps; count 0: eps at once.
struct Stages {
  int count;
  double first, eps;

  OTLOSS_HOST_DEVICE double at(int stage) const {
    return stage >= count ? eps : first * fast_exp2(stage * fast_log2(eps / first) / count);
  }
};

// Stages where a cold start would be slow. `error`: marginal error of one iteration at eps;
// `residual`: its largest |gt - g|. The error alone does not see a few outliers, whose mass is
// small but whose potentials are far off.
OTLOSS_HOST_DEVICE bool stages_wanted(double error, double residual, double eps) {
  constexpr double kEasyError = 0.6, kEasyResidual = 10;
  return error > kEasyError || residual > kEasyResidual * eps;
}

// sigma: how varied the cost is.
OTLOSS_HOST_DEVICE Stages make_stages(double eps, double sigma) {
  constexpr double kEasyEps = 0.077, kFirst = 0.1, kLog2Ratio = -2;
  const double first = kFirst * sigma;
  if (!(eps < kEasyEps * sigma)) return {0, eps, eps};
  const int count = static_cast<int>(fast_log2(eps / first) / kLog2Ratio + 0.5);
  return {count > 1 ? count : 1, first, eps};
}

// The last kPairs pairs (s, y) = (step, change of residual) and their inner products. One more slot
// than pairs: the newest pair is written before it is known whether it will be kept.
struct LbfgsGram {
  static constexpr int kPairs = 5;
  static constexpr int kSlots = kPairs + 1;
  static constexpr double kLeastCurvature = 1e-10;

  double sy[kSlots][kSlots];  // <s_i, y_j>
  double yy[kSlots][kSlots];  // <y_i, y_j>
  double sr[kSlots];          // <s_i, r>, r the residual
  double yr[kSlots];          // <y_i, r>
  int order[kSlots];          // slots in use, oldest first
  int count;

  // A slot that is not in use.
  OTLOSS_HOST_DEVICE int free_slot() const {
    for (int slot = 0; slot < kSlots; ++slot) {
      bool used = false;
      for (int i = 0; i < count; ++i) used = used || order[i] == slot;
      if (!used) return slot;
    }
    return 0;
  }

  // Keeps the pair in `slot`, whose products are in place, if its curvature is positive.
  OTLOSS_HOST_DEVICE void keep(int slot, double ss) {
    if (!(sy[slot][slot] > kLeastCurvature * sqrt(ss) * sqrt(yy[slot][slot]))) return;
    if (count == kPairs) {
      for (int i = 1; i < count; ++i) order[i - 1] = order[i];
      --count;
    }
    order[count++] = slot;
  }

  // p = on_r r + sum_slots (on_s s + on_y y): the two-loop recursion on r.
  OTLOSS_HOST_DEVICE double direction(double* on_s, double* on_y) const {
    for (int slot = 0; slot < kSlots; ++slot) on_s[slot] = on_y[slot] = 0;
    if (count == 0) return 1;
    double alpha[kPairs];
    for (int i = count - 1; i >= 0; --i) {
      double product = sr[order[i]];
      for (int j = i + 1; j < count; ++j) product -= alpha[j] * sy[order[i]][order[j]];
      alpha[i] = product / sy[order[i]][order[i]];
    }
    const int newest = order[count - 1];
    const double scale = sy[newest][newest] / yy[newest][newest];
    for (int i = 0; i < count; ++i) on_y[order[i]] = -scale * alpha[i];
    for (int i = 0; i < count; ++i) {
      double product = scale * yr[order[i]];
      for (int j = 0; j < count; ++j) product += on_y[order[j]] * yy[order[i]][order[j]];
      for (int j = 0; j < i; ++j) product += on_s[order[j]] * sy[order[j]][order[i]];
      on_s[order[i]] = alpha[i] - product / sy[order[i]][order[i]];
    }
    return scale;
  }
};

}  // namespace otloss
