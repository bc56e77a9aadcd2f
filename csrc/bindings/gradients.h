// What the three gradients of a solve share: what is wanted, and how it is put together.
#pragma once

#include "bindings/operations.h"
#include "bindings/points.h"

namespace otloss {

struct Wanted {
  Ints costs;    // pairs
  Ints points;   // clouds
  bool weights;  // of both sides of every pair

  explicit Wanted(Arguments& arguments);
  // Raises unless the problem has what is wanted.
  void check(const Problem& problem) const;
};

// The gradients of one call: memory for what kernels find, and the points' from that.
template <typename T>
class Gradients {
 public:
  Gradients(const Device& device, const Problem& problem, const Tensor& grad_loss,
            const Wanted& wanted, const std::optional<Tensor>& prepared = {}, int64_t entries = 0);

  // Of pair p. With `matrices`, the gradient of its cost matrix too if points need it.
  EnvelopeGroup<T> group(int64_t p, bool matrices, const T* f = nullptr, const T* g = nullptr);
  // In place of the cost matrix of pair p: the points, and memory for the sums their gradients
  // need.
  MadeCost<T> made(int64_t p);
  // One side of pair p as rows, at fixed potentials; the columns are cloud j.
  void add_plan_side(std::vector<PointGradientGroup<T>>& groups, int64_t p, int64_t i, int64_t j,
                     const Tensor& f, const Tensor& g);
  // Both sides of pair p, by multiscale.
  PlanSumsGroup<T> plan_sides(int64_t p, const Tensor& f, const Tensor& g);
  // The points' gradients, once the kernels have run: from the sums of these and of `made`,
  // from the matrices' gradients, or from the plan at fixed potentials.
  void add_sums();
  void add_matrices();
  void add_plan(int64_t p, const Matrix<T>& C, const T* f, const T* g);
  // Where the clouds were prepared.
  const Tensor& memory() const { return clouds_.memory; }

  // Writes the gradients of the wanted costs and points, of a and b, and `more`.
  template <typename... More>
  void give_back(StableIValue* stack, const More&... more) {
    Tensors costs;
    for (const int64_t p : wanted_.costs)
      costs.push_back(
          first_entries(grad_C_[p], problem_.costs[p].size(1), problem_.costs[p].size(2)));
    otloss::give_back(stack, costs, points_.result(), grad_a_, grad_b_, more...);
  }

 private:
  struct Side {
    int64_t cloud;
    Tensor sum, product;
    SolvedSide<T> solved;  // of the plan at fixed potentials, else null
  };

  // (B,) of the loss or, where every pair has its own, of pair p.
  const T* grad(int64_t p) const {
    const int64_t B = problem_.batch();
    return data<T>(grad_loss_) + (grad_loss_.dim() > 1 ? p * B : 0);
  }
  // Clouds i and j of pair p, in either order, with their potentials.
  SolvedGroup<T> solved(int64_t p, int64_t i, int64_t j, const T* f, const T* g) const;
  // Of the points themselves, without dummies.
  SolvedGroup<T> of_points(int64_t p, int64_t i, int64_t j, const Tensor& f, const Tensor& g);
  PointSums<T> side(int64_t c, SolvedSide<T> solved = {});

  const Device& device_;
  const Problem& problem_;
  const Tensor& grad_loss_;
  const Wanted& wanted_;
  Prepared<T> clouds_;
  PointGradients<T> points_;
  Tensors grad_C_;  // per pair, undefined where not needed
  Tensors grad_a_, grad_b_;
  std::vector<Side> sides_;
  Tensors kept_;  // weights and potentials without dummies
};

}  // namespace otloss
