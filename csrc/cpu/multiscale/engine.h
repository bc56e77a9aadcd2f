// What the solver knows of a problem between two clouds in few dimensions: passes over the pairs of
// leaves that can hold something of the plan. The calls are those of cpu::Engine.
//
// The cost is the squared distance. Potentials and their bookkeeping are double, entries of the
// plan single precision. What is left out is bounded, relative to the total mass.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/multiscale/worker.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"

namespace otloss::cpu {

template <typename T, typename E>
class FarMass;

namespace multiscale {

class GroupNewton;

constexpr int64_t kLeastMoments = 64;  // points of a leaf from which on moments pay

struct Precision {
  double left_out;      // bound of the part of the plan that may be left out
  bool symmetric;       // a cloud against itself, of one potential
  bool split;           // over threads
  bool narrow = false;  // leaves and Newton's groups of few points: no moments

  // Whether moments are right enough.
  bool moments() const { return left_out >= 2e-5 && !narrow; }
};

class Engine {
 public:
  using Value = double;
  using Newton = GroupNewton;
  using Far = FarMass<double, Engine>;

  const Cloud &X, &Y;
  const Side<double> x, y;  // of the clouds' points, padding included

  // eps: the least one.
  Engine(const Cloud& X, const Cloud& Y, double rho_x, double rho_y, double eps,
         const Precision& precision);

  // See cpu::Engine. A symmetric problem's update_rows is at F = k g.
  void iterate(double eps, const double* g, double* F, double* gt, double* q);
  void update_rows(double eps, const double* g, double* F, double* s);
  double transport(double eps, const double* F, const double* g);
  double max_cost() const { return cost_range_.max_abs(); }
  const CostRange& cost_range() const { return cost_range_; }
  double sigma() const { return 0; }
  int64_t shift_passes() const;
  bool propose(double, double, double*) const { return false; }

  // Of the last pass, relative to the mass: what of the plan was left out, at most; by how much the
  // rounding of sums over the rest typically changes marginals.
  double left_out() const { return left_out_; }
  double rounding() const { return rounding_; }
  // What was left out per leaf of y and unit of the threshold: a finer level leaves out as much.
  // That it is told to expect so spares it a pass that would be repeated.
  double left_out_rate() const {
    return left_out_ / threshold_ / static_cast<double>(Y.leaf.count);
  }
  void expect(double rate);

  // The time of a pass over that of one which takes all pairs one by one; on a sample.
  double effort(double eps, const double* F, const double* g);

  // At fixed potentials: rows' sums over j of the density times b_j v_j, v (count, m), to
  // out (count, n).
  void apply(double eps, const double* F, const double* g, int64_t count, const double* v,
             double* out);
  // Of the plan a_i b_j 2^(F + k g - k C): rows' sums of y_j - x_i times it, (n, d), and columns'
  // of x_i - y_j times it and `weight` (n,) in place of a, (m, d), or null. A symmetric plan's
  // columns are its rows and not returned; `weight` is a.
  void displacements(double eps, const double* F, const double* g, const double* weight,
                     double* of_rows, double* of_columns);
  // Of the same plan P at the same potentials each time: w = base + factor P x and, unless it is
  // null, y = P^T w. x and base may be null. The first call's lists serve the others.
  void product(double eps, const double* F, const double* g, const double* x, const double* base,
               const double* factor, double* w, double* y);
  // (n,) row sums of P C.
  std::vector<double> cost_sums(double eps, const double* F, const double* g);

  // Of the same plan P, in double: rows' and columns' sums over the pairs that are kept, and
  // KL(P'|P), at most, of the plan P' with marginals A (n,) and B (m,) that rounding gives (see
  // otloss/duality_gap.py). left_out() is then the mass of the pairs that are not.
  double divergence(double eps, const double* F, const double* g, const double* A, const double* B,
                    double* rows, double* columns);
  // F at points x that no solve has seen, in double, to a part `most` of each row's sum.
  void extend(double eps, const double* g, double most, double* F);

  // For Newton's step. Sums over groups are made while iterations pass.
  int64_t group() const { return group_; }
  void want_groups() { wants_groups_ = true; }
  const std::vector<Worker>& workers() const { return workers_; }
  const std::vector<double>& column_sums() const { return column_; }

 private:
  Pass begin(double eps, const double* g, double* F, double* s);
  // half: each pair of a symmetric plan's leaves once.
  void choose_lists(double eps, const double* F, bool half, Pass& pass);
  void share_out();
  template <typename F>
  void for_each_part(F&& function) {
    const int64_t parts = static_cast<int64_t>(workers_.size());
    if (parts == 1) return function(workers_[0], begin_[0], begin_[1]);
    parallel_tasks(parts, [&](int64_t p) { function(workers_[p], begin_[p], begin_[p + 1]); });
  }
  void guess_rows(double k, double* F) const;
  template <typename F>
  void for_each_exact_row(const Pass& pass, const double* V, const double* g, F&& row);
  void finish(bool symmetric_mass);
  void sweep(double eps, const double* g, double* F, double* s, bool columns);
  bool sweep_mirrored(double eps, const double* g, double* F, double* s);
  bool repeats();

  const Precision precision_;
  const CostRange cost_range_;
  float moments_ = 0, single_;
  int64_t group_ = 0;
  bool wants_groups_ = false;
  double threshold_;
  double left_out_ = 0, rounding_ = 0;
  Planes px_, py_;
  std::vector<double> G_, s_, column_;
  std::vector<Worker> workers_;
  std::vector<double> tiles_;   // (supers of x,) in the last pass
  std::vector<int64_t> begin_;  // (workers + 1,) supers
  // Lists: potentials and threshold that they were made at; how much densities have risen since.
  struct {
    double eps = 0, threshold = 0;
    bool half = false;
    std::vector<double> F, G;
  } lists_;
  bool listed_ = false;
  std::vector<float> rise_;
  std::vector<uint8_t> risen_;
};

// Points of a leaf for a pair of clouds: as many as moments allow, else few.
int64_t leaf_size(const Cloud& X, const Cloud& Y, double eps, const Precision& precision);

}  // namespace multiscale
}  // namespace otloss::cpu
