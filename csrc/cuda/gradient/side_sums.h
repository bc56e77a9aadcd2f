// The gradient W of stored costs, or what the gradients of points need, without a matrix: with V =
// gradient_weight of W, V 1 and V y for the points of one side as rows (CostGradientGroup does the
// rest). W is made tile by tile by a functor (point_weights.cuh), from the costs.
#pragma once

#include <utility>
#include <vector>

#include "cuda/gradient/point_weights.cuh"
#include "cuda/pass/pack.cuh"

namespace otloss::cuda {

// One side of a group.
template <typename T, class Weights>
struct SideItem {
  int64_t batch, n, m;
  bool symmetric;  // a cloud against itself
  PackedPair<T> points;
  const T* y;            // (B, m, d) points of the other side
  T* F;                  // (B, packed_stride(n)) exponents of the rows, kLog2Zero past the end
  T* G;                  // (B, packed_stride(m)) of the columns
  Weights weights;       // what W is made by
  PointSums<T> out;      // (B, n) (B, n, d)
  T* grad_C;             // (B, n, m) out, where costs are stored
  T* partial = nullptr;  // (B, splits, n, d + 1) V y and V 1 of each split of the columns
};

// k: log2(e) / eps.
template <typename T, class Weights>
void sum_sides(const Context& context, const std::vector<SideItem<T, Weights>>& sides, T k);

// The sides of a group that want something; of_x, of_y: with the rows' points as rows, and the
// columns'.
template <typename T, class Weights, class Group>
void add_sides(const Group& p, const PackedPair<T>& points, T* F, T* G, const Weights& of_x,
               const Weights& of_y, std::vector<SideItem<T, Weights>>* sides) {
  const MadeCost<T>& made = p.made;
  if (made.x.sum || p.grad_C)
    sides->push_back(
        {p.batch, p.n, p.m, made.symmetric, points, made.points.zy, F, G, of_x, made.x, p.grad_C});
  if (!made.y.sum) return;
  PackedPair<T> exchanged = points;
  std::swap(exchanged.x, exchanged.y);
  sides->push_back(
      {p.batch, p.m, p.n, made.symmetric, exchanged, made.points.zx, G, F, of_y, made.y, nullptr});
}

// t / s of the derivative P (s + t C) of <P, C>.
template <typename T>
T of_cost(Objective objective, double eps) {
  return static_cast<T>(objective == Objective::kTransport ? -1 / eps : 0.0);
}

}  // namespace otloss::cuda
