// A row of costs from a row of inner products.
#pragma once

#include <cstdint>

#include "core/costs.h"
#include "cpu/parallel.h"

namespace otloss::cpu {

template <typename T>
struct ProductRow {
  int64_t count;  // columns computed; those from `valid` on are padding
  int64_t valid;
  int64_t d;
  T hx;          // norm of the row's point
  const T* hy;   // (count,) norms
  const T* zx;   // (d,) the row's point
  const T* zy;   // (valid, d) points
  int64_t self;  // the column that is the row's own point, whose cost the caller sets; or none
  T* C;          // (count,) in: inner products, out: costs
};

// Distances of which the expanded form has lost half of the digits are computed again directly.
template <typename Cost, typename T>
OTLOSS_INLINE void costs_from_products(const ProductRow<T>& r) {
  int cancelled = 0;
#pragma omp simd reduction(+ : cancelled)
  for (int64_t j = 0; j < r.count; ++j) {
    const T scale = r.hx + r.hy[j];
    const T left = scale - T(2) * r.C[j] - cancellation_limit<T>() * scale;
    cancelled += left <= T(0);
    r.C[j] = Cost::from_product(r.hx, r.hy[j], r.C[j]);
  }
  if constexpr (!Cost::kUnitNorm) {
    const bool has_self = r.self >= 0 && r.self < r.valid;
    if (cancelled <= (has_self ? 1 : 0)) return;
    for (int64_t j = 0; j < r.valid; ++j) {
      if (j == r.self) continue;
      const T c = r.C[j];
      const T squared = Cost::kKind == CostKind::kEuclidean ? c * c : c;
      if (squared > cancellation_limit<T>() * (r.hx + r.hy[j])) continue;
      const T* y = r.zy + j * r.d;
      T exact = 0;
#pragma omp simd reduction(+ : exact)
      for (int64_t k = 0; k < r.d; ++k) exact += (r.zx[k] - y[k]) * (r.zx[k] - y[k]);
      r.C[j] = Cost::from_difference(exact);
    }
  }
}

}  // namespace otloss::cpu
