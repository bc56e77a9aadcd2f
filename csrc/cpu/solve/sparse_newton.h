// Newton's step for the solver, from the few entries of the plan that are not small.
//
// At a point g of the semidual, with P the plan of (T_x(g), g) and r, c its row and column sums,
// the residual T_y(T_x(g)) - g has the derivative -(I - K), K = diag(1/c) P^T diag(1/r) P, so that
// the step that takes it to 0 solves
//     (diag(c) - P^T diag(1/r) P) p = c residual.
// Where eps is small most of the plan is in a few entries of each row, and a product with those
// costs a small part of a sweep. What the others are stays in diag(c): the matrix remains positive
// definite, and L-BFGS, whose initial inverse Hessian this is, makes up for the difference. Far
// from the solution the step would go astray, so diag(c) is taken 1 + error times, which fades as
// the error does (Levenberg, Marquardt).
//
// Where entries are is found by one reading of all pairs, and again when they have come to miss
// much of the plan; their values are made anew for each step.
//
// Sources: Brauer, Clason, Lorenz, Wirth 2017 (Newton for Sinkhorn), Tang et al. 2024 (sparse).
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <string_view>
#include <vector>

#include "core/lbfgs.h"
#include "core/math.h"
#include "cpu/parallel.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/conjugate_gradients.h"

namespace otloss::cpu {

// Large entries of the plan in some rows, compressed.
template <typename T>
struct SparseRows {
  int64_t begin = 0;            // first row
  std::vector<int64_t> end;     // (rows,) of each row's entries
  std::vector<int32_t> column;  // (entries,) and room for more
  std::vector<T> cost;          // as column
  std::vector<T> value;         // (entries,) over the row's sum
  Vector sum;                   // (m,) scratch

  void reserve(int64_t entries) {
    if (entries <= static_cast<int64_t>(column.size())) return;
    const auto size = std::max<size_t>(entries, column.size() + column.size() / 2);
    column.resize(size), cost.resize(size);
  }
};

// The sums of a plan, and in base 2 as kernels take them.
template <typename T>
struct PlanMarginals {
  Vector r, c;          // (n,) (m,)
  std::vector<T> R, S;  // (n,) (m,) log2 of their parts of the total; ±kLog2Zero where it is 0
};

template <typename T, typename Engine>
class SparseNewton {
 public:
  explicit SparseNewton(Engine& engine)
      : engine_(engine),
        wanted_(!is_off(std::getenv("OTLOSS_NEWTON"))),
        marginals_{Vector(engine.n), Vector(engine.m), std::vector<T>(engine.n),
                   std::vector<T>(engine.m)},
        right_(engine.m),
        inverse_(engine.m),
        solution_(engine.m) {}

  // At another eps.
  void reset() { found_ = slow_ = false, next_search_ = 0, last_error_ = kUnknown; }

  // Whether there is a step at `point`, to be asked at each point once. F: exact row update of its
  // g; sweeps: that were made at this eps. `readings` of all pairs are counted.
  template <typename Point>
  bool prepare(double eps, const T* F, const Point& point, int64_t sweeps, int64_t& readings) {
    slow_ = slow_ || point.error > kSlow * last_error_;
    last_error_ = point.error;
    if (!wanted_ || !slow_ || point.error > kNear) return false;
    if (!found_ && sweeps < next_search_) return false;
    set_marginals(eps, F, point.asked, point.q);
    coupling_ = engine_.x.damping(eps) * engine_.y.damping(eps);
    if (found_) {
      take_values(eps, F, point.g.data());
      if (missing_ <= kMissingGrowth * missing_at_first_ + kMissingSlack) return true;
    }
    found_ = engine_.find_large(eps, F, point.g.data(), marginals_, sweeps, parts_);
    next_search_ = 2 * sweeps;
    if (!found_) return false;
    ++readings;
    take_values(eps, F, point.g.data());
    missing_at_first_ = missing_;
    return true;
  }

  // p, from a residual at an error, by the inverse of (1 + damping) I - K. Constants, of which the
  // semidual knows nothing, are left out before and after. Columns that hold nothing of the plan
  // keep their residual: a plain iteration.
  void step(double error, std::vector<T>& p) {
    const double damping = kDamping * error, before = mean(p);
    const Vector& c = marginals_.c;
    for (size_t j = 0; j < c.size(); ++j) {
      right_[j] = c[j] * (static_cast<double>(p[j]) - before);
      inverse_[j] = c[j] > 0 ? 1 / (diagonal_[j] + damping * c[j]) : 0.0;
    }
    const auto apply = [&](const Vector& v, Vector& out) {
      product(v, out);
      for (size_t j = 0; j < c.size(); ++j)
        out[j] = (1 + damping) * c[j] * v[j] - coupling_ * out[j];
    };
    conjugate_gradients(
        {kTolerance, 0, kMaxIterations}, inverse_, apply, [](Vector&) {}, right_, solution_);
    const double after = mean(solution_);
    for (size_t j = 0; j < c.size(); ++j)
      if (c[j] > 0) p[j] = static_cast<T>(solution_[j] - after);
  }

 private:
  // Steps begin at an error of at most kNear after a sweep that left over kSlow of the error.
  static constexpr double kNear = 0.3, kSlow = 0.5;
  static constexpr double kDamping = 0.3;    // over the error
  static constexpr double kTolerance = 0.2;  // of a step: more exact ones save no sweeps
  static constexpr int64_t kMaxIterations = 50;
  // Entries are looked for again when what they miss has grown to more than this.
  static constexpr double kMissingGrowth = 2, kMissingSlack = 2e-3;
  static constexpr size_t kParallelEntries = 1 << 16;
  static constexpr double kUnknown = std::numeric_limits<double>::infinity();

  // A test compares the steps of L-BFGS alone with those of a GPU.
  static bool is_off(const char* setting) { return setting && std::string_view(setting) == "0"; }

  // Row sums are those of exact rows, then damped; both sides are given the same total. Points that
  // hold next to nothing of the plan, which soft marginals make of outliers, count as nothing.
  void set_marginals(double eps, const T* F, const std::vector<T>& asked,
                     const std::vector<T>& ratio) {
    const int64_t n = engine_.n, m = engine_.m;
    Vector &r = marginals_.r, &c = marginals_.c;
    const T tilt = static_cast<T>(-eps * engine_.x.rate * engine_.x.damping(eps));
    double of_rows = 0, of_columns = 0;
    for (int64_t i = 0; i < n; ++i)
      of_rows += r[i] =
          static_cast<double>(engine_.a[i]) * static_cast<double>(fast_exp2(tilt * F[i]));
    for (int64_t j = 0; j < m; ++j)
      of_columns += c[j] = static_cast<double>(asked[j]) * static_cast<double>(ratio[j]);
    for (int64_t i = 0; i < n; ++i) {
      r[i] *= of_columns / of_rows;
      if (!takes_part(r[i], of_columns)) r[i] = 0;
      marginals_.R[i] = log2_weight(static_cast<T>(r[i] / of_columns));
    }
    for (int64_t j = 0; j < m; ++j) {
      if (!takes_part(c[j], of_columns)) c[j] = 0;
      marginals_.S[j] =
          c[j] > 0 ? log2_weight(static_cast<T>(c[j] / of_columns)) : static_cast<T>(-kLog2Zero);
    }
  }

  // In the weights c.
  template <typename Value>
  double mean(const std::vector<Value>& v) const {
    double sum = 0, total = 0;
    for (size_t j = 0; j < v.size(); ++j) {
      sum += marginals_.c[j] * static_cast<double>(v[j]);
      total += marginals_.c[j];
    }
    return sum / total;
  }

  // Values of the entries, the matrix's diagonal, and what part of the plan they miss.
  void take_values(double eps, const T* F, const T* g) {
    constexpr double kLeastDiagonal = 1e-3;
    engine_.entry_values(eps, F, g, parts_);
    const Vector& c = marginals_.c;
    diagonal_ = c;
    double kept = 0, all = 0;
    for (const SparseRows<T>& part : parts_) {
      int64_t e = 0;
      for (size_t i = 0; i < part.end.size(); ++i) {
        const double r = marginals_.r[part.begin + i];
        double sum = 0;
        for (; e < part.end[i]; ++e) {
          const double value = static_cast<double>(part.value[e]);
          diagonal_[part.column[e]] -= coupling_ * r * value * value;
          sum += value;
        }
        kept += r * sum, all += r;
      }
    }
    missing_ = 1 - kept / all;
    for (size_t j = 0; j < c.size(); ++j)
      diagonal_[j] = std::max(diagonal_[j], kLeastDiagonal * c[j]);
  }

  // sum_e value_e v[column_e] in four sums, which need not wait for each other.
  static double gather(const T* value, const int32_t* column, const double* v, int64_t begin,
                       int64_t end) {
    double sum[4] = {};
    int64_t e = begin;
    for (; e + 4 <= end; e += 4)
      for (int64_t k = 0; k < 4; ++k)
        sum[k] += static_cast<double>(value[e + k]) * v[column[e + k]];
    for (; e < end; ++e) sum[0] += static_cast<double>(value[e]) * v[column[e]];
    return (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }

  // out = P^T diag(1/r) P v.
  void product(const Vector& v, Vector& out) {
    const auto of_part = [&](int64_t index) {
      SparseRows<T>& part = parts_[index];
      part.sum.assign(v.size(), 0.0);
      int64_t begin = 0;
      for (size_t i = 0; i < part.end.size(); ++i) {
        const int64_t end = part.end[i];
        const double along = marginals_.r[part.begin + i] *
                             gather(part.value.data(), part.column.data(), v.data(), begin, end);
        for (int64_t e = begin; e < end; ++e)
          part.sum[part.column[e]] += static_cast<double>(part.value[e]) * along;
        begin = end;
      }
    };
    const int64_t parts = static_cast<int64_t>(parts_.size());
    if (parts_[0].value.size() * parts_.size() < kParallelEntries)
      for (int64_t part = 0; part < parts; ++part) of_part(part);
    else
      parallel_tasks(parts, of_part);
    out = parts_[0].sum;
    for (int64_t part = 1; part < parts; ++part)
      for (size_t j = 0; j < out.size(); ++j) out[j] += parts_[part].sum[j];
  }

  Engine& engine_;
  const bool wanted_;
  bool found_ = false, slow_ = false;
  int64_t next_search_ = 0;  // in sweeps
  double last_error_ = kUnknown;
  double coupling_ = 1;  // of rows and columns: less than 1 where marginals are soft
  double missing_ = 0, missing_at_first_ = 0;
  PlanMarginals<T> marginals_;
  Vector diagonal_;                    // (m,)
  Vector right_, inverse_, solution_;  // (m,) scratch
  std::vector<SparseRows<T>> parts_;
};

}  // namespace otloss::cpu
