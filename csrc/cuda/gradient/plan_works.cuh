// Works of pass.cuh over the plan, for gradients. S: of sums.
#pragma once

#include "cuda/pass/team_sweep.cuh"

namespace otloss::cuda {

// P C from the costs: what <P, C> puts on potentials and weights.
template <typename T, typename S, class Block>
struct PlanCostWork {
  static constexpr bool kHasRow = true, kApart = false, kGuarded = false;
  using Column = T;  // G

  TeamMemory<Block> memory;
  const T* tile;  // (rows, m) costs
  const T* a;     // (rows,)
  const S* f;     // (rows,)
  const T* G;     // (m,) k g + log2 b
  T k;
  S to_base2;
  S* out;  // (rows,) row sums

  OTLOSS_DEVICE S none() const { return static_cast<S>(kLog2Zero); }
  OTLOSS_DEVICE T no_column() const { return static_cast<T>(kLog2Zero); }
  OTLOSS_DEVICE S row(int i) const { return a[i] > T(0) ? to_base2 * f[i] : none(); }
  OTLOSS_DEVICE T column(int j) const { return memory.load(G + j); }
  OTLOSS_DEVICE S entry(S F, T G, S c) const {
    const T t = static_cast<T>(F) + G - k * static_cast<T>(c);
    return static_cast<S>(plan_entry(T(1), t)) * (t > static_cast<T>(-kExp2Limit) ? c : S(0));
  }
  OTLOSS_DEVICE S term(T, S entry) const { return entry; }
  OTLOSS_DEVICE S finish(int i, S sum, bool leader) const {
    const S weight = a[i] > T(0) ? static_cast<S>(a[i]) : S(0);
    if (leader) out[i] = weight > S(0) ? weight * sum : S(0);
    return weight;
  }
};

// Sums of a stored plan.
template <typename T>
struct PlanSumsWork {
  static constexpr bool kHasRow = false, kApart = false, kGuarded = false;
  using Column = double;  // 1, or 0 past the end

  const T* tile;  // (rows, m) the plan
  double* out;    // (rows,) row sums

  OTLOSS_DEVICE double none() const { return 0; }
  OTLOSS_DEVICE double row(int) const { return 0; }
  OTLOSS_DEVICE double column(int) const { return 1; }
  OTLOSS_DEVICE double no_column() const { return 0; }
  OTLOSS_DEVICE double entry(double, double, double c) const { return c; }
  OTLOSS_DEVICE double term(double one, double entry) const { return entry * one; }
  OTLOSS_DEVICE double finish(int i, double sum, bool leader) const {
    if (leader) out[i] = sum;
    return 1;
  }
};

// w = base + sign (P x) / divisor, and the column sums P^T w.
template <class Block, typename T>
struct ProductWork {
  static constexpr bool kHasRow = false, kApart = false, kGuarded = false;
  using Column = double;  // x

  TeamMemory<Block> memory;
  const T* tile;          // (rows, m) the plan
  const double* x;        // (m,) or null: 0
  const double* base;     // (rows,) or null: 0
  const double* inverse;  // (rows,) of the divisor, or null: 1
  double sign;
  double* w;  // (rows,) out

  OTLOSS_DEVICE double none() const { return 0; }
  OTLOSS_DEVICE double row(int) const { return 0; }
  OTLOSS_DEVICE double column(int j) const { return x ? memory.load(x + j) : 0.0; }
  OTLOSS_DEVICE double no_column() const { return 0; }
  OTLOSS_DEVICE double entry(double, double, double c) const { return c; }
  OTLOSS_DEVICE double term(double x, double entry) const { return entry * x; }
  OTLOSS_DEVICE double finish(int i, double sum, bool leader) const {
    const double value = (base ? base[i] : 0.0) + sign * (inverse ? inverse[i] : 1.0) * sum;
    if (leader) w[i] = value;
    return value;
  }
};

}  // namespace otloss::cuda
