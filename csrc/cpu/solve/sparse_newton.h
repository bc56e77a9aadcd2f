// Newton's step for the solver, from the few entries of the plan that are not small.
//
// At a point g of the semidual, with P the plan of (T_x(g), g) and r, c its row and column sums,
// the residual T_y(T_x(g)) - g has the derivative -(I - K), K = diag(1/c) P^T diag(1/r) P, so that
// the step that takes it to 0 solves
//     (diag(c) - P^T diag(1/r) P) p = c residual.
// Where eps is small most of the plan is in a few entries of each row, and a product with those
// costs a small part of a sweep. The rest stays in diag(c): the matrix remains positive definite,
// and L-BFGS, whose initial inverse Hessian this is, makes up for the difference. Far from the
// solution the step would go astray, so diag(c) is multiplied by 1 + error, which fades as the
// error does (Levenberg, Marquardt).
//
// One reading of all pairs finds where the entries are; it is repeated when they have come to miss
// much of the plan. Their values are made anew for each step.
//
// Sources: Brauer, Clason, Lorenz, Wirth 2017 (Newton for Sinkhorn), Tang et al. 2024 (sparse).
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/engines/engine.h"
#include "cpu/solve/conjugate_gradients.h"
#include "cpu/solve/plan_marginals.h"

namespace otloss::cpu {

template <typename T>
class SparseNewton {
 public:
  explicit SparseNewton(Engine<T>& engine);

  // At another eps.
  void reset() { found_ = slow_ = false, next_search_ = 0, last_error_ = kUnknown; }

  // Whether there is a step at `point`, to be asked at each point once. F: exact row update of its
  // g; sweeps: that were made at this eps. `readings` of all pairs are counted.
  bool prepare(double eps, const T* F, const SemidualPoint<T>& point, int64_t sweeps,
               int64_t& readings);

  // p, from a residual at an error, by the inverse of (1 + damping) I - K. Constants, of which the
  // semidual knows nothing, are left out before and after. Columns that hold nothing of the plan
  // keep their residual: a plain iteration.
  void step(double error, std::vector<T>& p);

 private:
  static constexpr double kUnknown = std::numeric_limits<double>::infinity();

  // Large entries of the plan in some rows, compressed.
  struct SparseRows {
    int64_t begin = 0;            // first row
    std::vector<int64_t> end;     // (rows,) of each row's entries
    std::vector<int32_t> column;  // (entries,) and room for more
    std::vector<T> cost;          // as column
    std::vector<T> value;         // (entries,) over the row's sum
    double kept = 0;              // the part of the plan that they hold

    void reserve(int64_t entries);
  };

  bool find(double eps, const T* F, int64_t sweeps);
  double most_large(int64_t sweeps) const;
  void list(double eps, const T* F, double least, double share);
  void take_values(double eps, const T* F);
  template <typename Value>
  double mean(const std::vector<Value>& v) const;
  void product(const Vector& v, Vector& out);

  const Side<T>&x_, &y_;
  CostBlocks<T>& costs_;
  const bool wanted_;
  bool found_ = false, slow_ = false;
  int64_t next_search_ = 0;  // in sweeps
  double last_error_ = kUnknown;
  double coupling_ = 1;  // of rows and columns: less than 1 where marginals are soft
  double missing_ = 0, missing_at_first_ = 0;
  PlanMarginals<T> plan_{x_.count, y_.count};                               // of the point
  Vector diagonal_ = Vector(y_.count);                                      // (m,)
  Vector right_ = Vector(y_.count), inverse_ = right_, solution_ = right_;  // (m,) scratch
  PartSums<double> sums_{costs_.parts(), y_.count};
  std::vector<SparseRows> parts_;
};

}  // namespace otloss::cpu
