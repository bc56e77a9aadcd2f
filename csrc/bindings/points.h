// What is made from points: clouds ready for products, cost matrices, and the points' gradients.
// Matrix products on a GPU are torch's own, which is why this is not a kernel's business; on the
// CPU they are part of the kernels.
#pragma once

#include "bindings/problem.h"
#include "cost_kernels.h"

namespace otloss {

// The clouds made ready for products.
template <typename T>
struct Prepared {
  CostKind kind;
  bool single;    // see Clouds
  Tensor memory;  // of all z, then of all norms: one tensor, since each takes time
  std::vector<CloudGroup<T>> clouds;

  PointPair<T> pair(int64_t i, int64_t j, bool tf32, bool multiscale) const {
    const CloudGroup<T>&x = clouds[i], &y = clouds[j];
    return {kind, x.d, x.z, y.z, x.norm, y.norm, tf32, multiscale};
  }
  // For a gradient of cloud c.
  Tensor empty_points(int64_t c) const {
    const CloudGroup<T>& x = clouds[c];
    return single ? empty(memory, {x.n, x.d}) : empty(memory, {x.batch, x.n, x.d});
  }
};

// `before`: the memory of an earlier call with these clouds, or none. `entries`: of the memory,
// where it is for more than the clouds.
template <typename T>
Prepared<T> prepare(const Device& device, const Clouds& clouds,
                    const std::optional<Tensor>& before = {}, int64_t entries = 0);

// The clouds as they are given, without norms: multiscale makes them ready itself, in double.
template <typename T>
Prepared<T> as_given(const Clouds& clouds);

// C (B, n, m) of each pair, in memory by `empty` (like, B, n, m).
template <typename T>
Tensors cost_matrices(const Device& device, const Prepared<T>& clouds, const Ints& pairs,
                      Tensor empty(const Tensor&, int64_t, int64_t, int64_t));

// A cost matrix (B, n, m), its rows `stride` apart.
template <typename T>
struct Matrix {
  int64_t B, n, m;
  T* entries;
  int64_t stride;
};
template <typename T>
Matrix<T> as_matrix(const Tensor& C) {
  return {C.size(0), C.size(1), C.size(2), data<T>(C), row_stride(C)};
}

// What a solve on a CPU makes of points, in one tensor: the prepared clouds, then C of each pair in
// rows on cache lines. A tensor takes time, of a small call several percent; and glibc
// gives free memory back to the system beyond twice the largest block that it once gave back, so
// that several smaller blocks are paid for again, in page faults, by every call.
constexpr int64_t kMostPacked = 32 << 20;  // bytes: beyond, glibc keeps no block
template <typename T>
class PackedCosts {
 public:
  PackedCosts(const Clouds& clouds, const Ints& pairs);

  bool fit() const { return entries() * static_cast<int64_t>(sizeof(T)) < kMostPacked; }
  int64_t entries() const { return end_; }
  // Of pair p in the memory of prepared clouds. Pairs beyond its end have none.
  Matrix<T> matrix(const Tensor& memory, int64_t p) const;
  void make(const Device& device, const Prepared<T>& clouds, const Ints& pairs) const;

 private:
  std::vector<Matrix<T>> matrices_;  // without memory
  Ints first_;
  int64_t end_;
};

// Gradients of the clouds listed in `wanted`, summed over what is added.
template <typename T>
class PointGradients {
 public:
  PointGradients(const Device& device, const Prepared<T>& clouds, const Ints& wanted);

  bool wants(int64_t c) const;

  // From the sums and the product of one side of a pair, see CostGradientGroup.
  void add_side(int64_t c, const T* sum, const T* product, SolvedSide<T> side);
  // From the cost matrix of the pair (i, j) and either its gradient or, where group.W is null, the
  // plan that group describes; the other fields are filled in here.
  void add_pair(int64_t i, int64_t j, const Matrix<T>& C, PlanWeightGroup<T> group, const Eps& eps);

  // In the order of `wanted`; to be called once.
  Tensors result();

 private:
  // The product of V, or V^T, with cloud `other`, and what comes after it.
  void add_product(int64_t c, int64_t other, const Tensor& V, bool transposed, const T* sum,
                   SolvedSide<T> side);

  const Device& device_;
  const Prepared<T>& clouds_;
  const Ints& wanted_;
  Tensors grads_;  // per cloud, undefined where there is none yet
  // On a CPU products are made by `result`, all of a cloud together.
  std::vector<std::vector<GradientTerm<T>>> terms_;  // per cloud
  Tensors kept_;                                     // what they read
};

}  // namespace otloss
