// What the solver knows of a problem. A new geometry is a new engine.
#pragma once

#include <cstdint>

#include "cpu/engines/rows.h"
#include "cpu/solve/marginal.h"

namespace otloss::cpu {

// F is in units of 1 / k, k = log2(e) / eps, and F before damping: f = x.damping F / k. g and gt
// are in units of cost. Dampings are 1 unless a marginal is soft.
template <typename T>
class Engine {
 public:
  const Side<T> x, y;  // the two sides: sizes, weights, penalties

  Engine(const Side<T>& x, const Side<T>& y) : x(x), y(y) {}
  virtual ~Engine() = default;

  // One pass: F (n,) = softmin over the rows at g (m,), on entry a guess; gt (m,) = softmin over
  // the columns at f; q (m,) = column sums of the plan (f, g) over b.
  virtual void iterate(double eps, const T* g, T* F, T* gt, T* q) = 0;

  // F alone; s (n,) = row sums of the plan before the update, over a.
  virtual void update_rows(double eps, const T* g, T* F, T* s) = 0;

  // <P, C> of the plan (F, g).
  virtual double transport(double eps, const T* F, const T* g) = 0;

  // max |C_ij| over points of positive weight or a bound of it, NaN if one is not finite.
  virtual double max_cost() const = 0;

  // Standard deviation of the double-centred cost on a sample: against eps, how hard the problem
  // is.
  virtual double sigma() = 0;

  // Sets g to a start that may be better than 0. False where there is none that takes less time
  // than this number of sweeps.
  virtual bool propose(double sweeps, double eps, T* g) const = 0;

  // The rows of the cost, for Newton's step; null where an engine does not go by rows.
  virtual CostBlocks<T>* costs() { return nullptr; }
};

}  // namespace otloss::cpu
