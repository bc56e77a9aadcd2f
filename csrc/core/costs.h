// The costs, each one functor: how an inner product (or a direct difference) becomes a cost, and
// how a weight on the cost becomes a weight in the gradient. A new cost is a functor and an entry
// of CostKind and of the list below them; `otloss/costs.py` lists the same names.
//
// Clouds are prepared first: moved so that their common mean is 0, or scaled to unit norm
// (kUnitNorm). With h = |x|^2 the expanded form |x|^2 + |y|^2 - 2 <x, y> then keeps its digits. The
// gradient of sum_ij W_ij c(x_i, y_j) is a matrix product for every cost:
//     u_i = x_i sum_j V_ij - sum_j V_ij y_j,  V = W * gradient_weight(C),
// projected onto the tangent of the sphere afterwards where points have unit norm.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "core/math.h"

namespace otloss {

// On a GPU one instruction, off by 1 ulp, in place of some ten.
OTLOSS_HOST_DEVICE float root(float x) {
#if defined(__CUDA_ARCH__)
  float y;
  asm("sqrt.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return std::sqrt(x);
#endif
}
OTLOSS_HOST_DEVICE double root(double x) { return std::sqrt(x); }

// A point by this has a squared norm that does not underflow, where its own, norm2, may have.
template <typename T>
OTLOSS_HOST_DEVICE T magnification(T norm2) {
  constexpr bool kSingle = sizeof(T) == sizeof(float);
  return norm2 < T(kSingle ? 0x1p-100 : 0x1p-990) ? T(kSingle ? 0x1p100 : 0x1p600) : T(1);
}
// The norm of a point that has the squared norm norm2 when it is magnified; 0 of no other than 0.
template <typename T>
OTLOSS_HOST_DEVICE T norm_of(T norm2, T magnified) {
  const T norm = root(norm2) / magnified, least = std::numeric_limits<T>::min();
  return norm2 > T(0) && norm < least ? least : norm;
}

enum class CostKind : int { kSqEuclidean = 0, kEuclidean = 1, kCosine = 2 };

struct SqEuclidean {
  static constexpr CostKind kKind = CostKind::kSqEuclidean;
  static constexpr bool kUnitNorm = false;
  static constexpr bool kGaussian = true;  // the potential of gaussian_potential.h is a start
  // Whether it is a multiple of the squared distance of prepared points, which multiscale solves.
  static constexpr bool kMultiscale = true;

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
  // The squared distance of points at a cost.
  template <typename T>
  static OTLOSS_HOST_DEVICE T squared(T c) {
    return c;
  }
  template <typename T>
  static OTLOSS_HOST_DEVICE T gradient_weight(T w, T /*c*/) {
    return T(2) * w;
  }
  // An upper bound, from the largest norms of both clouds; NaN stays.
  static OTLOSS_HOST_DEVICE double bound(double hx, double hy) {
    const double reach = sqrt(hx) + sqrt(hy);
    return reach * reach;
  }
};

struct Euclidean {
  static constexpr CostKind kKind = CostKind::kEuclidean;
  static constexpr bool kUnitNorm = false;
  static constexpr bool kGaussian = false;
  static constexpr bool kMultiscale = false;

  template <typename T>
  static OTLOSS_HOST_DEVICE T from_product(T hx, T hy, T xy) {
    return root(SqEuclidean::from_product(hx, hy, xy));
  }
  template <typename T>
  static OTLOSS_HOST_DEVICE T from_difference(T d2) {
    return root(d2);
  }
  template <typename T>
  static OTLOSS_HOST_DEVICE T squared(T c) {
    return c * c;
  }
  // Coincident points have gradient 0; a weight of 0 stays 0 whatever the cost.
  template <typename T>
  static OTLOSS_HOST_DEVICE T gradient_weight(T w, T c) {
    return w != T(0) && c > T(0) ? w / c : T(0);
  }
  static OTLOSS_HOST_DEVICE double bound(double hx, double hy) { return sqrt(hx) + sqrt(hy); }
};

struct Cosine {
  static constexpr CostKind kKind = CostKind::kCosine;
  static constexpr bool kUnitNorm = true;
  static constexpr bool kGaussian = false;
  static constexpr bool kMultiscale = true;

  template <typename T>
  static OTLOSS_HOST_DEVICE T from_product(T /*hx*/, T /*hy*/, T xy) {
    const T c = T(1) - xy;
    return c < T(0) ? T(0) : c;  // NaN stays
  }
  template <typename T>
  static OTLOSS_HOST_DEVICE T gradient_weight(T w, T /*c*/) {
    return w;
  }
  static OTLOSS_HOST_DEVICE double bound(double hx, double hy) { return 2 + 0 * (hx + hy); }
};

// All of them: calls macro(functor).
#define OTLOSS_FOR_EACH_COST(macro) macro(SqEuclidean) macro(Euclidean) macro(Cosine)

// Calls function(functor) with the functor of a kind.
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // the function may be for the host alone, or for the device
#endif
template <typename F>
OTLOSS_HOST_DEVICE void dispatch_cost(CostKind kind, F&& function) {
  switch (kind) {
#define OTLOSS_CASE(Cost) \
  case Cost::kKind: return function(Cost{});
    OTLOSS_FOR_EACH_COST(OTLOSS_CASE)
#undef OTLOSS_CASE
  }
}

inline bool is_cost(int64_t number) {
  bool found = false;
#define OTLOSS_FIND(Cost) found = found || number == static_cast<int64_t>(Cost::kKind);
  OTLOSS_FOR_EACH_COST(OTLOSS_FIND)
#undef OTLOSS_FIND
  return found;
}

// The constants of a functor by its kind.
struct CostTraits {
  bool unit_norm, gaussian, multiscale;
};

OTLOSS_HOST_DEVICE CostTraits traits_of(CostKind kind) {
  CostTraits traits{};
  dispatch_cost(kind, [&](auto cost) {
    using Cost = decltype(cost);
    traits = {Cost::kUnitNorm, Cost::kGaussian, Cost::kMultiscale};
  });
  return traits;
}

OTLOSS_HOST_DEVICE double cost_bound(CostKind kind, double hx, double hy) {
  double bound = 0;
  dispatch_cost(kind, [&](auto cost) { bound = decltype(cost)::bound(hx, hy); });
  return bound;
}

// Up to this dimension costs come from differences, without a matrix product.
constexpr int64_t kDirectDims = 16;

// Below this fraction of |x|^2 + |y|^2 a squared distance from the expanded form has lost half of
// its digits; it is computed again from the difference.
template <typename T>
OTLOSS_HOST_DEVICE T cancellation_limit() {
  return sizeof(T) == 4 ? T(1e-3) : T(1e-8);
}

}  // namespace otloss
