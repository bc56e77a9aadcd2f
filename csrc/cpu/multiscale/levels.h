// A multiscale solve: from a few centroids of the clouds, at an eps that these resolve, to the
// points themselves. Potentials of a level start the next finer one.
#pragma once

#include <cstdint>
#include <vector>

#include "core/penalty.h"
#include "cpu/multiscale/engine.h"
#include "cpu/parallel.h"
#include "cpu/solve/solver.h"

namespace otloss::cpu::multiscale {

// The two clouds of a problem in order, in units in which the cost is the squared distance.
struct Clouds {
  Cloud x, y;                       // y is empty where it is x
  std::vector<int32_t> in_x, in_y;  // index of each point
  double scale;                     // of coordinates

  template <typename T>
  Clouds(const PointPair<T>& points, int64_t problem, int64_t n, const T* a, int64_t m, const T* b,
         bool one, bool split);
  // Scales the weights to these totals.
  void set_masses(double mass_x, double mass_y);
  // The largest cost, at most.
  double max_cost() const { return largest_square(x, y.n ? y : x); }
};

// A plan with penalties is the balanced one of its marginals, a exp(-v / rho) for weights a and
// (1 + eps / rho) v for the potential v of the points: what is left out is then little of these,
// however little is transported. Sets these weights.
void set_marginal(Cloud& cloud, const Penalty& penalty, const std::vector<double>& v);

struct Solution {
  Outcome outcome;
  double value = 0;
  std::vector<double> f, g;  // of the points in order
  bool finished = true;      // else a pass over all pairs takes less time
};

// start: f and g in order, or empty. single: they are returned in single precision.
Solution solve_pair(Clouds clouds, const Penalties& penalties, const SolveOptions& options,
                    Solution start, bool single, bool split);
// A cloud against itself.
Solution solve_self(Clouds clouds, const Penalties& penalties, const SolveOptions& options,
                    Solution start, bool single, bool split);

// Calls function(group, problem, split) for all problems: large ones one after the other, each over
// all threads, which do not all take as long.
template <typename Group, typename F>
void for_each_problem(const std::vector<Group>& groups, F&& function) {
  constexpr int64_t kLarge = 20000;  // points
  bool large = false;
  for (const Group& group : groups) large = large || group.n + group.m >= kLarge;
  if (!large) return cpu::for_each_problem(groups, function);
  for (const Group& group : groups)
    for (int64_t p = 0; p < group.batch; ++p) function(group, p, true);
}

}  // namespace otloss::cpu::multiscale
