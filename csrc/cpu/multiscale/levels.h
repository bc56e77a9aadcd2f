// A multiscale solve: from a few centroids of the clouds, at an eps that these resolve, to the
// points themselves. Potentials of a level start the next finer one.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/multiscale/engine.h"
#include "cpu/solve/solver.h"

namespace otloss::cpu::multiscale {

// The two clouds of a problem in order, in units in which the cost is the squared distance.
struct Clouds {
  Cloud x, y;                     // y is empty where it is x
  std::vector<int32_t> in_x, in_y;  // index of each point
  double scale;                   // of coordinates

  template <typename T>
  Clouds(const PointPair<T>& points, int64_t problem, int64_t n, const T* a, int64_t m, const T* b,
         bool one);
  // Scales the weights to these totals.
  void set_masses(double mass_x, double mass_y);
};

struct Solution {
  Outcome outcome;
  double value = 0;
  std::vector<double> f, g;  // of the points in order
};

// start: f and g in order, or empty. roundoff: of the potentials that are returned.
Solution solve_pair(Clouds clouds, const Penalties& penalties, const SolveOptions& options,
                    Solution start, double roundoff, bool split);
// A cloud against itself.
Solution solve_self(Clouds clouds, const Penalties& penalties, const SolveOptions& options,
                    Solution start, double roundoff, bool split);

}  // namespace otloss::cpu::multiscale
