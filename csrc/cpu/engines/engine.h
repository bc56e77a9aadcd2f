// What the solver knows of a problem: passes over its costs, stored or streamed.
#pragma once

#include <cstdint>
#include <vector>

#include "core/step_control.h"
#include "cpu/engines/rows.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"

namespace otloss::cpu {

// A point of the semidual and what one pass tells about it.
template <typename T>
struct SemidualPoint : PointScalars {
  std::vector<T> g, gt, q;  // q: the plan's column sums over their target
  std::vector<T> target;    // the target marginal, of the total of b

  SemidualPoint(int64_t m, const T* b) : g(m), gt(m), q(m), target(b, b + m) {}
};

template <typename T>
class SparseNewton;
template <typename T, typename E>
class FarMass;

// F is in units of 1 / k, k = log2(e) / eps, and F before damping: f = x.damping F / k. g and gt
// are in units of cost. Dampings are 1 unless a marginal is soft.
template <typename T>
class Engine {
 public:
  using Value = T;
  using Newton = SparseNewton<T>;
  using Far = FarMass<T, Engine>;

  const Side<T> x, y;  // the two sides: sizes, weights, penalties

  // Of a problem of the group; split: over threads. eps: that of the solution.
  Engine(const Side<T>& x, const Side<T>& y, const SolveGroup<T>& group, int64_t problem,
         double eps, bool split);

  // One pass: F (n,) = softmin over the rows at g (m,), on entry a guess; gt (m,) = softmin over
  // the columns at f; q (m,) = column sums of the plan (f, g) over b.
  void iterate(double eps, const T* g, T* F, T* gt, T* q);

  // F alone; s (n,) = row sums of the plan before the update, over a.
  void update_rows(double eps, const T* g, T* F, T* s);

  // <P, C> of the plan (F, g).
  double transport(double eps, const T* F, const T* g);

  // max |C_ij| over points of positive weight or a bound of it, NaN if one is not finite.
  double max_cost() const { return cost_range_.max_abs(); }
  const CostRange& cost_range() const { return cost_range_; }

  // Standard deviation of the double-centred cost on a sample: against eps, how hard the problem
  // is.
  double sigma();
  // How many passes take as long as a shift of groups, where these are many.
  int64_t shift_passes() const { return 0; }

  // Sets g to a start that may be better than 0. False where there is none that takes less time
  // than this number of sweeps.
  bool propose(double sweeps, double eps, T* g) const;

  // What a pass may leave out of the plan, and what its sums' error adds to that of marginals.
  static constexpr double left_out() { return 0; }
  static constexpr double rounding() { return 0; }

  // The rows of the cost, for Newton's step.
  CostBlocks<T>& costs() { return costs_; }

 private:
  // Column sums in the kernels' precision are added up in double after this number of rows.
  static constexpr int64_t kFlushRows = 4096;

  struct Workspace {   // of one thread
    BlockVector<T> c;  // (padded m,) column sums of some rows
    BlockVector<T> e;  // (kSweepScratchRows, padded m)

    explicit Workspace(int64_t m) : c(padded<T>(m)), e(kSweepScratchRows * padded<T>(m)) {}
  };

  // Sets G. Whether rounding would be that of eps, not of the costs: the sweep is a unit sweep.
  bool begin_sweep(double eps, const T* g);
  void sweep(bool unit, double eps, int64_t part, int64_t begin, int64_t end, T* F, T* s, T* c);
  void update_unit_columns(double eps, const T* g, const double* c, T* gt, T* q) const;
  void update_columns(double eps, const T* g, const T* F, const double* c, T* gt, T* q);
  double least_column_sum(T tilt, const T* F) const;
  void guarded_columns(double eps, int64_t begin, int64_t end, const T* g, const T* F, T* gt, T* q);

  const SolveGroup<T>& group_;
  const int64_t problem_;
  const double eps_;
  const bool split_;
  const int64_t n_ = x.count, m_ = y.count;
  CostBlocks<T> costs_{
      RowParts(n_, m_, split_), kFlushRows,
      RowSource<T>(n_, m_, {group_.matrix(problem_), group_.stride}, padded<T>(m_), group_.points,
                   problem_, group_.symmetric, group_.dummies, eps_)};
  const CostRange cost_range_ = costs_.source().cost_range(x.weight, y.weight);
  BlockVector<T> G_ = BlockVector<T>(padded<T>(m_), T(kLog2Zero));
  std::vector<T> s_ = std::vector<T>(n_);
  std::vector<Workspace> workspaces_ =
      std::vector<Workspace>(costs_.parts().count(), Workspace(m_));
  PartSums<double> totals_{costs_.parts(), m_};  // of all rows of a thread
  std::vector<T> columns_;                       // a block of columns that was made
};

}  // namespace otloss::cpu
