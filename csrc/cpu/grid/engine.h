// What the solver knows of a problem between densities on a grid. The calls are those of
// cpu::Engine, in double throughout.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "cpu/engines/rows.h"
#include "cpu/grid/grid.h"
#include "cpu/solve/marginal.h"

namespace otloss::cpu {

template <typename T>
struct SemidualPoint;
template <typename T, typename E>
class FarMass;

namespace grid {

class NoNewton;

class Engine {
 public:
  using Value = double;
  using Newton = NoNewton;
  using Far = FarMass<double, Engine>;

  const Side<double> x, y;

  Engine(const Side<double>& x, const Side<double>& y, const GridAxes& axes, bool split);

  // See cpu::Engine.
  void iterate(double eps, const double* g, double* F, double* gt, double* q);
  void update_rows(double eps, const double* g, double* F, double* s);
  double max_cost() const { return cost_range_.max_abs(); }
  const CostRange& cost_range() const { return cost_range_; }
  double sigma() const;
  // How many passes take as long as a shift of groups, where these are many.
  int64_t shift_passes() const { return 0; }
  bool propose(double sweeps, double eps, double* g) const;
  static constexpr double left_out() { return 0; }
  static constexpr double rounding() { return 0; }

  // At g (N,): means (N,) of u (N,) with the weights of each row of the plan.
  std::vector<double> row_means(double eps, const double* g, std::vector<double> u);
  // Sums over i of the costs from i to each j, over sum v: (N,) from v (N,).
  std::vector<double> mean_costs(const std::vector<double>& v) const;

 private:
  void set_eps(double eps);
  double cost(int64_t i, int64_t j) const;

  const GridAxes axes_;
  const bool split_;
  const CostRange cost_range_;
  double eps_ = 0;
  std::optional<Kernels> rows_, columns_;  // at eps_
  std::vector<double> v_;                  // (N,)
};

// Entries of the plan are not at hand.
class NoNewton {
 public:
  explicit NoNewton(Engine&) {}
  void reset() {}
  bool prepare(double, const double*, const SemidualPoint<double>&, int64_t, int64_t&) {
    return false;
  }
  void step(double, std::vector<double>&) {}
};

}  // namespace grid
}  // namespace otloss::cpu
