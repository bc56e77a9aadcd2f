// The plan of a point of the semidual: its marginals, and in their units its entries.
#pragma once

#include <vector>

#include "cpu/engines/engine.h"
#include "cpu/simd/large_entries.h"

namespace otloss::cpu {

template <typename T>
struct PlanMarginals {
  std::vector<double> row, column;  // (n,) and (m,) sums, of one total
  BlockVector<T> G;                 // (padded m,) k g + log2 b
  std::vector<T> R, S;              // log2 of the sums over the total, ±kLog2Zero for 0

  PlanMarginals(int64_t n, int64_t m)
      : row(n), column(m), G(padded<T>(m), static_cast<T>(kLog2Zero)), R(n), S(m) {}

  // F: exact row update of the point's g. Row sums are those of exact rows, then damped; both sides
  // are given the total of the columns. Points that hold next to nothing of the plan, which soft
  // marginals make of outliers, count as nothing.
  void set(double eps, const Side<T>& x, const Side<T>& y, const T* F,
           const SemidualPoint<T>& point);

  // The entries of row i above 2^least of their row's or column's sum, from its costs.
  LargeEntries<T> large(double eps, const T* F, double least, const T* C, int64_t i) const {
    return {static_cast<int64_t>(S.size()),
            factor<T>(eps),
            static_cast<T>(least),
            F[i],
            R[i],
            C,
            G.data(),
            S.data()};
  }
};

}  // namespace otloss::cpu
