// The linear system of the implicit gradient (core/implicit_system.h) on a CPU.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "core/implicit_system.h"
#include "cpu/parallel.h"
#include "cpu/solve/marginal.h"
#include "kernels.h"

namespace otloss::cpu {

using Vector = std::vector<double>;

// The plan, as the system reads it.
class PlanProducts {
 public:
  virtual ~PlanProducts() = default;
  // Row and column sums of P, or of P C.
  virtual void sums(bool of_costs, double* rows, double* columns) = 0;
  // w = base + factor P x and, unless it is null, y = P^T w. x and base may be null.
  virtual void product(const double* x, const double* base, const double* factor, double* w,
                       double* y) = 0;
};

// The team of one thread. In vector lanes.
struct OneThread {
  int n, m;

  template <typename F>
  void for_rows(F&& function) const {
#pragma omp simd
    for (int i = 0; i < n; ++i) function(i);
  }
  template <typename F>
  void for_columns(F&& function) const {
#pragma omp simd
    for (int j = 0; j < m; ++j) function(j);
  }
  template <typename F, typename G>
  TwoSums sums(F&& of_row, G&& of_column) const {
    double rows = 0, columns = 0;
#pragma omp simd reduction(+ : rows)
    for (int i = 0; i < n; ++i) rows += of_row(i);
#pragma omp simd reduction(+ : columns)
    for (int j = 0; j < m; ++j) columns += of_column(j);
    return {rows, columns};
  }
  template <typename F>
  TwoSums column_sums(F&& function) const {
    double first = 0, second = 0;
#pragma omp simd reduction(+ : first, second)
    for (int j = 0; j < m; ++j) {
      const TwoSums terms = function(j);
      first += terms.first, second += terms.second;
    }
    return {first, second};
  }
  template <typename F>
  void one(F&& function) const {
    function();
  }
};

// 0 where there is no weight, and in place of null.
template <typename T>
void take(const SystemSide& side, const T* values, double* to) {
  for (int64_t i = 0; i < side.count; ++i)
    to[i] = values && side.weight[i] > 0 ? static_cast<double>(values[i]) : 0.0;
}

// Of one problem.
class ProblemSystem : public ImplicitState {
 public:
  template <typename T>
  ProblemSystem(const Side<T>& rows, const T* f, const Side<T>& columns, const T* g, double eps,
                bool balanced, bool symmetric)
      : ImplicitState{},
        team_{static_cast<int>(rows.count), static_cast<int>(columns.count)},
        memory_(kVectors * std::max(rows.count, columns.count)) {
    place(memory_.data(), std::max(rows.count, columns.count));
    this->eps = eps, this->balanced = balanced, this->symmetric = symmetric;
    const auto load = [](SystemSide& to, const Side<T>& from, const T* potential) {
      static_cast<Penalty&>(to) = from;
      to.count = from.count, to.mass = from.mass;
      std::copy_n(from.weight, from.count, to.weight);
      take(to, potential, to.v);
    };
    load(x, rows, f), load(y, columns, g);
    rules().fix_potentials();
  }
  ProblemSystem(const ProblemSystem&) = delete;

  ImplicitSystem<OneThread> rules() { return {team_, *this}; }

  // Gradients of scale * value + <f_bar, f> + <g_bar, g>, by iterations to a residual of `tol`.
  // v_bar of both sides is set before.
  void solve(PlanProducts& plan, Objective objective, double scale, double tol, double* status) {
    this->scale = scale, this->tol = tol;
    transport = objective == Objective::kTransport;
    ImplicitSystem<OneThread> system = rules();
    Vector unwanted(symmetric ? y.count : 0);
    for (system.open(); order.what != PlanOf::kNothing && !interrupted(); system.advance()) {
      const PlanOrder now = order;
      if (now.what == PlanOf::kProduct)
        plan.product(now.x, now.base, now.factor, now.w, now.y);
      else
        plan.sums(now.what == PlanOf::kCostSums, now.w, now.y ? now.y : unwanted.data());
    }
    status[kImplicitIterations] = static_cast<double>(iterations);
    status[kImplicitResidual] = residual();
  }

 private:
  OneThread team_;
  Vector memory_;
};

}  // namespace otloss::cpu
