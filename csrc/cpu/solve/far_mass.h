// Small mass that has to go far, which the marginal error does not see: how far off the value can
// be, and a step that moves such mass (docs/solver-start.md). Balanced or not.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/engines/engine.h"
#include "cpu/solve/plan_marginals.h"

namespace otloss::cpu {

template <typename T, typename E>
class FarMass {
 public:
  explicit FarMass(E& engine) : engine_(engine) {}

  // The size of the value that is sought; where costs may be negative counted from the least of
  // them, if that is more, so that it is not near 0 by accident. F: the exact row update of the
  // point's g, here and below.
  double size(double eps, const T* F, const SemidualPoint<T>& point) const;

  // A bound of the error of the value, without a reading of the costs.
  double cheap_bound(const SemidualPoint<T>& point) const;

  // A far better bound, by one reading: the duality gap of a feasible plan.
  double gap(double eps, const T* F, const SemidualPoint<T>& point);

  // The best shifts of groups of columns against each other.
  struct Shift {
    std::vector<T> g;    // (m,) to be added; empty where there is one group, or no reading left
    double largest = 0;  // |g|
    double gain = 0;     // of the value, at most
    int64_t readings = 0;
  };
  Shift shift(double eps, const T* F, const SemidualPoint<T>& point, int64_t most_readings);

  // The plan's total over that of b, in units of which target marginals are.
  double mass(const SemidualPoint<T>& point) const {
    return y_.share(y_.soft_mean(point.g.data(), 1).mean);
  }

 private:
  double own_gap(const SemidualPoint<T>& point) const;
  int64_t find_groups(double eps, const T* F, double least);
  std::vector<double> between_groups(double eps, const T* F, int64_t k);

  E& engine_;
  const Side<T>&x_ = engine_.x, &y_ = engine_.y;
  PlanMarginals<T> plan_{0, 0};  // made when it is needed, which is rare
  std::vector<int32_t> group_;   // (m,) of a column, -1 without mass
};

}  // namespace otloss::cpu
