// The kernels for cost matrices and the gradients of points, as kernels.h: argument structs and
// launchers.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels.h"

namespace otloss {

// One cloud, made ready for the matrix product: centred or normalised copy and its norms.
template <typename T>
struct CloudGroup {
  int64_t batch;    // B
  int64_t n;        // points
  int64_t d;        // coordinates
  const T* x;       // (B, n, d)
  const T* weight;  // (B, n) or null: points of weight 0 become 0, with norm 0
  T* z;             // (B, n, d) out: prepared points
  T* norm;          // (B, n) out: |z|^2, or |x| for cosine
};

template <typename T>
struct CostGroup {
  int64_t batch;   // B
  int64_t n;       // rows
  int64_t m;       // columns
  int64_t d;       // coordinates
  bool symmetric;  // a cloud against itself: the diagonal is 0
  const T* zx;     // (B, n, d) prepared points
  const T* zy;     // (B, m, d)
  const T* hx;     // (B, n) their norms, see CloudGroup
  const T* hy;     // (B, m)
  T* C;            // (B, n, m) out; on a GPU in: inner products <zx, zy>, if d > kDirectDims
  int64_t stride;  // distance of rows of C; m on a GPU
};

// Before the gradient's products: V = W * gradient_weight(C) and, on a CPU, its row and column
// sums.
template <typename T>
struct CostWeightGroup {
  int64_t batch;     // B
  int64_t n;         // rows
  int64_t m;         // columns
  bool symmetrise;   // V + V^T in place of V: both sides are one cloud; on a CPU
  const T* W;        // (B, n, m) gradient with respect to C
  const T* C;        // (B, n, m)
  int64_t C_stride;  // distance of rows of C; m on a GPU
  T* V;              // (B, n, m) out
  T* row_sum;        // (B, n) out
  T* col_sum;        // (B, m) out
};

// From a solution, on a CPU: W = coefficient * grad * plan is not stored.
template <typename T>
struct PlanWeightGroup : CostWeightGroup<T> {
  const T* a;     // (B, n)
  const T* b;     // (B, m)
  const T* f;     // (B, n)
  const T* g;     // (B, m)
  const T* grad;  // (B,) of the loss
  T coefficient;  // of this pair in the loss
};

// Of an envelope gradient: weights and potentials of the points, (B, n), else null. Where a solve
// failed the potentials are NaN, and so is the gradient of its points; the plan made from them
// would be 0.
template <typename T>
struct SolvedSide {
  const T* weight;
  const T* v;

  OTLOSS_HOST_DEVICE bool failed(int64_t i) const { return v && weight[i] > T(0) && v[i] != v[i]; }
};

// After the product: grad += x row_sum - V y, or its tangent part over |x| for cosine.
template <typename T>
struct CostGradientGroup {
  int64_t batch;  // B
  int64_t n;      // points
  int64_t d;      // coordinates
  const T* z;     // (B, n, d) prepared points
  const T* norm;  // (B, n)
  const T* sum;   // (B, n) row (or column) sums of V
  const T* Vy;    // (B, n, d)
  T* grad;        // (B, n, d) accumulated
  SolvedSide<T> side;
};

// Product and gradient in one, of all pairs that a cloud is in. (On a GPU products are torch's.)
template <typename T>
struct GradientTerm {
  int64_t m;        // points of the other cloud
  bool transposed;  // V is (B, m, n)
  const T* V;       // (B, n, m)
  const T* z;       // (B, m, d) the other cloud, prepared
  const T* norm;    // (B, m)
  const T* sum;     // (B, n) sums of V over the other cloud
  SolvedSide<T> side;
};

template <typename T>
struct CloudGradientGroup {
  int64_t batch;  // B
  int64_t n;      // points
  int64_t d;      // coordinates
  const T* z;     // (B, n, d) prepared points
  const T* norm;  // (B, n)
  T* grad;        // (B, n, d) out
  std::vector<GradientTerm<T>> terms;
};

namespace cpu {

template <typename T>
void prepare_clouds(const std::vector<CloudGroup<T>>& clouds, CostKind kind);
template <typename T>
void cost_matrices(const std::vector<CostGroup<T>>& groups, CostKind kind);
template <typename T>
void cost_weights(const CostWeightGroup<T>& group, CostKind kind);
template <typename T>
void plan_weights(const PlanWeightGroup<T>& group, CostKind kind, const Eps& eps);
template <typename T>
void cost_gradient(const CostGradientGroup<T>& group, CostKind kind);
template <typename T>
void cloud_gradients(const std::vector<CloudGradientGroup<T>>& clouds, CostKind kind);

}  // namespace cpu

namespace cuda {

template <typename T>
void prepare_clouds(const Context& context, const std::vector<CloudGroup<T>>& clouds,
                    CostKind kind);
template <typename T>
void cost_matrices(const Context& context, const std::vector<CostGroup<T>>& groups, CostKind kind);
template <typename T>
void cost_weights(const Context& context, const CostWeightGroup<T>& group, CostKind kind);
template <typename T>
void cost_gradient(const Context& context, const CostGradientGroup<T>& group, CostKind kind);

}  // namespace cuda
}  // namespace otloss
