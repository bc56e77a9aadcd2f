// What operations are told, read from the dispatcher's stack in the order of the schemas in
// otloss/ops.py and checked as a whole, before a pointer is taken.
#pragma once

#include <torch/csrc/stable/library.h>

#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "bindings/host.h"

namespace otloss {

// The arguments of a call. Reading one takes it over from the stack: read all before raising.
class Arguments {
 public:
  explicit Arguments(StableIValue* stack) : next_(stack) {}

  template <typename T>
  T next() {
    return torch::stable::detail::to<T>(*next_++);
  }
  // A number that fits no enumeration becomes -1, which is in none.
  template <typename Enum>
  Enum next_enum() {
    const int64_t number = next<int64_t>();
    return static_cast<Enum>(static_cast<int>(number) == number ? number : -1);
  }

 private:
  StableIValue* next_;
};

// The results, unless a signal handler raised something: then they are not complete.
template <typename... Results>
void give_back(StableIValue* stack, const Results&... results) {
  Call::current()->raise_interruption();
  ((*stack++ = torch::stable::detail::from(results)), ...);
}

// A positive number that travels as a tensor, so that a traced graph does not depend on it.
double positive(const Tensor& t, const char* name);

constexpr double kConstraint = std::numeric_limits<double>::infinity();  // as rho

// rho_x and rho_y (2,), or nothing: constraints.
Penalties penalties_of(const std::optional<Tensor>& rho);

// Clouds, and the pairs of them that problems are between: flat, (i0, j0, i1, j1, ...).
struct Clouds {
  Tensors points;   // (B, n, d) each, or (n, d)
  bool single;      // they are (n, d), and results are without a batch, too
  Tensors weights;  // (B, n) each, or none
  Ints pairs;
  CostKind kind;

  explicit Clouds(Arguments& arguments);
  // dummies: 1 where each cloud has a weight more than points.
  void check(int64_t dummies = 0) const;
  // (B, n, d) of the points of cloud c.
  std::array<int64_t, 3> shape(size_t c) const {
    const Tensor& x = points[c];
    if (single) return {1, x.size(0), x.size(1)};
    return {x.size(0), x.size(1), x.size(2)};
  }
  int64_t count() const { return static_cast<int64_t>(pairs.size()) / 2; }
};

// The least tol of a multiscale solve, which its single precision can hold.
constexpr double kMultiscaleTol = 1e-5;

// A set of OT problems. Either list may be empty: without cost matrices costs are made from points,
// without points the matrices are all there is.
struct Problem {
  Tensors costs;  // (B, n, m) per pair, or one for all problems, (1, n, m)
  Clouds clouds;
  Doubles coefficients;  // of each problem in the loss
  Eps eps;
  double rho_x = kConstraint, rho_y = kConstraint;
  Objective objective;
  bool tf32, multiscale;
  // 1: the last weight of both clouds is that of a dummy point, which costs and points lack.
  int64_t dummies = 0;

  explicit Problem(Arguments& arguments);

  // To be called once all arguments are read: eps and rho are not known before. Sets dummies.
  void check();
  // For the kernels of a GPU: a copy of a cost matrix for every problem. Raises for what they lack.
  void fit(const Device& device);
  // Raises unless it is a gradient of the loss (B,), or one of the value of each pair (P, B).
  void check_grad(const Tensor& grad_loss) const;
  // Raises unless there is a tensor for each pair, of the shape of f, or of g.
  void check_f(const Tensors& list, const char* name) const;
  void check_g(const Tensors& list, const char* name) const;

  int64_t count() const { return clouds.count(); }
  int64_t x(int64_t p) const { return clouds.pairs[2 * p]; }
  int64_t y(int64_t p) const { return clouds.pairs[2 * p + 1]; }
  const Tensor& a(int64_t p) const { return clouds.weights[x(p)]; }
  const Tensor& b(int64_t p) const { return clouds.weights[y(p)]; }
  int64_t batch() const { return clouds.weights[0].size(0); }
  ScalarType dtype() const { return clouds.weights[0].scalar_type(); }
  // How strongly a plan is held to the weights: cloud 0 by rho_x, every other by rho_y, by
  // themselves too.
  Penalties penalties(int64_t p) const {
    const bool balanced = std::isinf(rho_x) && std::isinf(rho_y);
    return {x(p) == 0 ? rho_x : rho_y, y(p) == 0 ? rho_x : rho_y, balanced};
  }

 private:
  Tensor eps_;                 // () or (B,), float64 on the CPU
  std::optional<Tensor> rho_;  // (2,) likewise
};

}  // namespace otloss
