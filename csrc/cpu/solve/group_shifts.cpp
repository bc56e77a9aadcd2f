#include "cpu/solve/group_shifts.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "core/math.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu {
namespace {

using Vector = std::vector<double>;

OTLOSS_SIMD double exponents(int64_t k, double per_h, const double* t, const double* M, double* z) {
  double largest = std::numeric_limits<double>::lowest();
#pragma omp simd reduction(max : largest)
  for (int64_t K = 0; K < k; ++K) {
    z[K] = (t[K] - M[K]) * per_h;
    largest = z[K] > largest ? z[K] : largest;
  }
  return largest;
}

// RowExponents in vectors.
struct VectorExponents {
  double operator()(int64_t k, double per_h, const double* t, const double* M, double* z) const {
    return exponents(k, per_h, t, M, z);
  }
};
using Shifts = GroupShifts<VectorExponents>;

// The rows that may leave the group `home`, which they send most to: of the way to each other group
// those it is shortest for, until they hold more than `mass`.
void mark_leaving(const RowsAndGroups& p, int64_t home, const std::vector<int64_t>& rows,
                  double mass, std::vector<uint8_t>& leaving) {
  std::vector<std::pair<double, int64_t>> ways(rows.size());
  for (int64_t K = 0; K < p.k; ++K) {
    if (K == home) continue;
    for (size_t e = 0; e < rows.size(); ++e) {
      const double* M = &p.M[rows[e] * p.k];
      ways[e] = {M[K] - M[home], rows[e]};
    }
    auto end = ways.end();
    std::make_heap(ways.begin(), end, std::greater<>());
    for (double held = 0; held <= mass && end != ways.begin(); held += p.A[end->second]) {
      std::pop_heap(ways.begin(), end--, std::greater<>());
      leaving[end->second] = 1;
    }
  }
}

// The problem with the rows lumped together that stay in their group. Of a group no more leaves
// than columns lack in all, those first that have the shortest way: twice as much may leave.
RowsAndGroups lump_rows(const RowsAndGroups& p) {
  constexpr double kSlack = 2;
  const int64_t n = static_cast<int64_t>(p.A.size());
  std::vector<std::vector<int64_t>> at(p.k);  // rows by their group
  for (int64_t i = 0; i < n; ++i) {
    const auto row = p.M.begin() + i * p.k;
    if (p.A[i] > 0) at[std::min_element(row, row + p.k) - row].push_back(i);
  }
  std::vector<uint8_t> leaving(n);
  RowsAndGroups lumped{p.k, {}, {}, p.B, p.lacking, p.x, p.y, p.eps};
  for (int64_t I = 0; I < p.k; ++I) {
    mark_leaving(p, I, at[I], kSlack * p.lacking, leaving);
    double held = 0;
    std::vector<OnlineLse<double>> sent(p.k);  // log2
    for (const int64_t i : at[I]) {
      const double* M = &p.M[i * p.k];
      if (leaving[i]) {
        lumped.A.push_back(p.A[i]);
        lumped.M.insert(lumped.M.end(), M, M + p.k);
        continue;
      }
      held += p.A[i];
      const double own = std::log2(p.A[i]);
      for (int64_t K = 0; K < p.k; ++K) sent[K].add(own - kLog2E / p.eps * M[K]);
    }
    if (!(held > 0)) continue;
    lumped.A.push_back(held);
    for (const auto& sum : sent)
      lumped.M.push_back(p.eps / kLog2E * (std::log2(held) - sum.value()));
  }
  return lumped;
}

}  // namespace

std::vector<double> best_shifts(const RowsAndGroups& given) {
  const RowsAndGroups p = lump_rows(given);
  const auto rows = static_cast<int64_t>(p.A.size());
  Vector numbers(Shifts::numbers(rows, p.k));
  std::vector<int32_t> indices(Shifts::indices(rows, p.k));
  const GroupProblem problem{rows, p.k, p.M.data(), p.A.data(), p.B.data(), p.x, p.y, p.eps};
  Shifts shifts(problem, numbers.data(), indices.data());
  const double* const t = shifts.best();
  return Vector(t, t + p.k);
}

}  // namespace otloss::cpu
