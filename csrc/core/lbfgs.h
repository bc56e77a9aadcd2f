// The quasi-Newton step as coefficients of stored vectors, for host and device.
#pragma once

#include <cmath>

#include "core/math.h"

namespace otloss {

// Whether a pair of step s and change of the residual y has curvature: <s, y>, <s, s>, <y, y>.
OTLOSS_HOST_DEVICE bool is_curved(double sy, double ss, double yy) {
  constexpr double kLeastCurvature = 1e-10;
  return sy > kLeastCurvature * std::sqrt(ss) * std::sqrt(yy);
}

// The last kPairs pairs (s, y) = (step, change of residual) by their inner products. On a GPU every
// inner product costs a barrier over all blocks of a problem, and the two-loop recursion needs two
// per stored pair, one after the other. So the products of all vectors are kept, the new ones of an
// iteration are computed together, and the recursion runs on scalars.
//
// One more slot than pairs: the newest pair is written before it is known whether it will be kept.
struct LbfgsGram {
#if !defined(OTLOSS_LBFGS_PAIRS)
#define OTLOSS_LBFGS_PAIRS 5  // a test keeps as many as the CPU
#endif
  static constexpr int kPairs = OTLOSS_LBFGS_PAIRS;
  static constexpr int kSlots = kPairs + 1;
  // The vectors, by number: s of each slot, y of each slot, the residual r, the gradient over the
  // weights d.
  static constexpr int kResidual = 2 * kSlots;
  static constexpr int kBasis = kResidual + 1;  // what a direction is made of
  static constexpr int kGradient = kBasis;
  static constexpr int kVectors = kBasis + 1;

  double product[kVectors][kBasis];  // of two vectors
  int order[kSlots];                 // slots in use, oldest first
  int count;

  static OTLOSS_HOST_DEVICE int change(int slot) { return kSlots + slot; }

  // The vectors of pairs in use and the residual, as bits.
  OTLOSS_HOST_DEVICE unsigned in_use() const {
    unsigned bits = 1u << kResidual;
    for (int i = 0; i < count; ++i) bits |= bits_of(order[i]);
    return bits;
  }
  static OTLOSS_HOST_DEVICE unsigned bits_of(int slot) { return 1u << slot | 1u << change(slot); }

  OTLOSS_HOST_DEVICE void set(int left, int right, double value) {
    product[left][right] = value;
    if (left < kBasis) product[right][left] = value;
  }

  // A slot that is not in use.
  OTLOSS_HOST_DEVICE int free_slot() const {
    for (int slot = 0; slot < kSlots; ++slot)
      if ((in_use() >> slot & 1u) == 0) return slot;
    return 0;
  }

  // Keeps the pair in `slot`, whose products are in place, if it has curvature.
  OTLOSS_HOST_DEVICE void keep(int slot) {
    if (!curved(slot)) return;
    if (count == kPairs) {
      for (int i = 1; i < count; ++i) order[i - 1] = order[i];
      --count;
    }
    order[count++] = slot;
  }

  // Drops the pairs that have no curvature, after all products were made anew.
  OTLOSS_HOST_DEVICE void sift() {
    int kept = 0;
    for (int i = 0; i < count; ++i)
      if (curved(order[i])) order[kept++] = order[i];
    count = kept;
  }

 private:
  OTLOSS_HOST_DEVICE double sy(int i, int j) const { return product[i][change(j)]; }
  OTLOSS_HOST_DEVICE double yy(int i, int j) const { return product[change(i)][change(j)]; }
  OTLOSS_HOST_DEVICE bool curved(int slot) const {
    return is_curved(sy(slot, slot), product[slot][slot], yy(slot, slot));
  }
};

}  // namespace otloss
