// The costs, each one functor: how an inner product (or a direct difference) becomes a cost, and
// how a weight on the cost becomes a weight in the gradient. `otloss/costs.py` lists the same
// names.
//
// Clouds are prepared first: moved so that their common mean is 0 (squared and euclidean), or
// scaled to unit norm (cosine). With h = |x|^2 the expanded form |x|^2 + |y|^2 - 2 <x, y> then
// keeps its digits. The gradient of sum_ij W_ij c(x_i, y_j) is a matrix product for every cost:
//     u_i = x_i sum_j V_ij - sum_j V_ij y_j,  V = W * gradient_weight(C),
// with cosine's projection onto the tangent of the sphere done afterwards.
#pragma once

#include "core/math.h"

namespace otloss {

enum class CostKind : int { kSqEuclidean = 0, kEuclidean = 1, kCosine = 2 };

struct SqEuclidean {
  static constexpr CostKind kKind = CostKind::kSqEuclidean;
  static constexpr bool kUnitNorm = false;

  // hx, hy: squared norms; xy: inner product.
  template <typename T>
  static OTLOSS_HOST_DEVICE T from_product(T hx, T hy, T xy) {
    const T c = hx + hy - T(2) * xy;
    return c < T(0) ? T(0) : c;  // NaN stays
  }
  // d2: squared length of the difference.
  template <typename T>
  static OTLOSS_HOST_DEVICE T from_difference(T d2) {
    return d2;
  }
  template <typename T>
  static OTLOSS_HOST_DEVICE T gradient_weight(T w, T /*c*/) {
    return T(2) * w;
  }
};

struct Euclidean {
  static constexpr CostKind kKind = CostKind::kEuclidean;
  static constexpr bool kUnitNorm = false;

  template <typename T>
  static OTLOSS_HOST_DEVICE T from_product(T hx, T hy, T xy) {
    return sqrt(SqEuclidean::from_product(hx, hy, xy));
  }
  template <typename T>
  static OTLOSS_HOST_DEVICE T from_difference(T d2) {
    return sqrt(d2);
  }
  // Coincident points have gradient 0; a weight of 0 stays 0 whatever the cost.
  template <typename T>
  static OTLOSS_HOST_DEVICE T gradient_weight(T w, T c) {
    return w != T(0) && c > T(0) ? w / c : T(0);
  }
};

struct Cosine {
  static constexpr CostKind kKind = CostKind::kCosine;
  static constexpr bool kUnitNorm = true;

  template <typename T>
  static OTLOSS_HOST_DEVICE T from_product(T /*hx*/, T /*hy*/, T xy) {
    const T c = T(1) - xy;
    return c < T(0) ? T(0) : c;  // NaN stays
  }
  template <typename T>
  static OTLOSS_HOST_DEVICE T gradient_weight(T w, T /*c*/) {
    return w;
  }
};

// Up to this dimension costs come from differences, without a matrix product.
constexpr int64_t kDirectDims = 16;

// Calls function(functor) with the functor of a kind.
template <typename F>
void dispatch_cost(CostKind kind, F&& function) {
  switch (kind) {
    case CostKind::kSqEuclidean: return function(SqEuclidean{});
    case CostKind::kEuclidean: return function(Euclidean{});
    case CostKind::kCosine: return function(Cosine{});
  }
}

// Below this fraction of |x|^2 + |y|^2 a squared distance from the expanded form has lost half of
// its digits; it is computed again from the difference.
template <typename T>
OTLOSS_HOST_DEVICE T cancellation_limit() {
  return sizeof(T) == 4 ? T(1e-3) : T(1e-8);
}

}  // namespace otloss
