// What is made from points: clouds ready for products, cost matrices, and the points' gradients.
// Matrix products on a GPU are torch's own, which is why this is not a kernel's business; on the
// CPU they are part of the kernels.
#pragma once

#include "bindings/problem.h"

namespace otloss {

// The clouds made ready for products: z (B, n, d) and norms (B, n).
struct Prepared {
  CostKind kind;
  Tensors z, norm;
};

template <typename T>
Prepared prepare(const Device& device, const Clouds& clouds);

// The clouds as they are given, without norms: multiscale makes them ready itself, in double.
inline Prepared as_given(const Clouds& clouds) { return {clouds.kind, clouds.points, {}}; }

// C (B, n, m) of each pair, in memory by `empty` (like, B, n, m).
template <typename T>
Tensors cost_matrices(const Device& device, const Prepared& clouds, const Ints& pairs,
                      Tensor empty(const Tensor&, int64_t, int64_t, int64_t));

template <typename T>
PointPair<T> point_pair(const Prepared& clouds, int64_t i, int64_t j, bool tf32, bool multiscale) {
  const auto norm = [&](int64_t c) { return multiscale ? nullptr : data<T>(clouds.norm[c]); };
  return {clouds.kind,
          clouds.z[i].size(2),
          data<T>(clouds.z[i]),
          data<T>(clouds.z[j]),
          norm(i),
          norm(j),
          tf32,
          multiscale};
}

// Gradients of the clouds listed in `wanted`, summed over what is added.
template <typename T>
class PointGradients {
 public:
  PointGradients(const Device& device, const Prepared& clouds, const Ints& wanted);

  bool wants(int64_t c) const;

  // From the sums and the product of one side of a pair, see CostGradientGroup.
  void add_side(int64_t c, const T* sum, const T* product, SolvedSide<T> side);
  // From the cost matrix of the pair (i, j) and either its gradient or, where group.W is null, the
  // plan that group describes; the other fields are filled in here.
  void add_pair(int64_t i, int64_t j, const Tensor& C, PlanWeightGroup<T> group, const Eps& eps);

  // In the order of `wanted`; to be called once.
  Tensors result();

 private:
  // The product of V, or V^T, with cloud `other`, and what comes after it.
  void add_product(int64_t c, int64_t other, const Tensor& V, bool transposed, const Tensor& sum,
                   SolvedSide<T> side);

  const Device& device_;
  const Prepared& clouds_;
  const Ints& wanted_;
  Tensors grads_;  // per cloud, undefined where there is none yet
  // On a CPU products are made by `result`, all of a cloud together.
  std::vector<std::vector<GradientTerm<T>>> terms_;  // per cloud
  Tensors kept_;                                     // what they read
};

}  // namespace otloss
