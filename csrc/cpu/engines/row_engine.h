// The engine of a cost that is read by rows, stored or streamed.
#pragma once

#include <vector>

#include "cpu/engines/engine.h"

namespace otloss::cpu {

template <typename T>
class RowEngine final : public Engine<T> {
 public:
  using Engine<T>::x;
  using Engine<T>::y;

  // Of a problem of the group; split: over threads.
  RowEngine(const Side<T>& x, const Side<T>& y, const SolveGroup<T>& group, int64_t problem,
            bool split);

  void iterate(double eps, const T* g, T* F, T* gt, T* q) override;
  void update_rows(double eps, const T* g, T* F, T* s) override;
  double transport(double eps, const T* F, const T* g) override;
  double max_cost() const override { return costs_.source().max_cost(x.weight, y.weight); }
  double sigma() override;
  bool propose(double sweeps, double eps, T* g) const override;
  CostBlocks<T>* costs() override { return &costs_; }

 private:
  struct Workspace {            // of one thread
    BlockVector<T> c;           // (padded m,) column sums of some rows
    std::vector<double> total;  // (m,) of all its rows
    BlockVector<T> e;           // (kSweepScratchRows, padded m)
    double sum = 0;
  };

  void absorb(double eps, const T* g);
  void sweep(double eps, int64_t part, int64_t begin, int64_t end, T* F, T* s, T* c);
  void update_columns(double eps, const T* g, const T* F, const double* c, T* gt, T* q);
  double least_column_sum(T tilt, const T* F) const;
  void guarded_columns(double eps, int64_t begin, int64_t end, const T* g, const T* F, T* gt, T* q);

  const int64_t n_, m_;
  const PointPair<T>& points_;
  const int64_t problem_;
  CostBlocks<T> costs_;
  BlockVector<T> G_;  // (padded m,)
  std::vector<T> s_;  // (n,)
  std::vector<Workspace> workspaces_;
  std::vector<T> columns_;  // a block of columns that was made
};

}  // namespace otloss::cpu
