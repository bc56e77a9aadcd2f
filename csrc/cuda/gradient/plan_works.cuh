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

}  // namespace otloss::cuda
