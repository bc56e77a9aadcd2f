// The gradient of costs, entry by entry, from a tile of them (side_sums.h):
//
//     SolvedPlan     P (s + t C + alpha + beta)                      envelope, implicit
//     Iterations     sum over the iterations, as in unrolled.cu, of
//                    e a g_bar + R f_bar, and P (s + t C) of the last
#pragma once

#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {

template <typename T>
OTLOSS_DEVICE T plan_of(T F, T G, T kC) {
  const T t = F + G - kC;
  // A clamped exponential stands for 0, so that padding gets exactly 0.
  return t > kExp2Least<T> ? fast_exp2(t) : T(0);
}

template <typename T>
struct SolvedPlan {
  const T* alpha;  // (B, n) and
  const T* beta;   // (B, m), or null: 0
  const T* grad;   // (B,) of the loss
  T coefficient;   // s = coefficient grad
  T of_cost;       // t / s
  int64_t n, m;

  template <class Entries>
  OTLOSS_DEVICE void operator()(const Entries& e, int64_t batch,
                                typename Entries::Values& V) const {
    using Layout = typename Entries::Layout;
    const T s = coefficient * grad[batch], t = of_cost * s, none = static_cast<T>(kLog2Zero);
    T column[Layout::kColumns], row[Layout::kRows];
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) {
      const int64_t j = e.column + Layout::column(c);
      column[c] = beta != nullptr && j < m ? beta[batch * m + j] : T(0);
    }
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
      const int64_t i = batch * n + e.row + Layout::row(r);
      row[r] = s + (alpha != nullptr && e.counts(r) ? alpha[i] : T(0));
    }
    for_entries<Layout>([&](int r, int c) {
      const T F = e.F[r], G = e.G[c];
      // A potential that is NaN makes the plan NaN, which its exponential alone would not, but not
      // for padding.
      const T nothing = F <= none || G <= none ? T(0) : T(0) * (F + G);
      const T P = plan_of(F, G, e.k * e.cost[r][c]) + nothing;
      V[r][c] = P != T(0) ? P * (row[r] + t * e.cost[r][c] + column[c]) : T(0);
    });
  }
};

// One side of all iterations: e = exp2(base_i + base_j - k C), R = exp2(other_i + other_j - k C),
// which a side has a factor of each.
template <typename T>
struct IterationSide {
  const T* trace;   // (B, L, length) f, or g
  const T* weight;  // (B, count)
  const T* g_bar;   // (B, L, count), or null: the weight
  const T* R;       // (B, L, count), or null: 1
  const T* H;       // (B, L, count), or null: to_other times the trace
  int64_t count;
  T to_base, to_other;

  struct Value {
    T base, factor, other, other_factor;
  };

  // at: (batch, iteration); inside: whether the point is one.
  OTLOSS_DEVICE Value value(int64_t batch, int64_t at, int64_t length, int64_t i,
                            bool inside) const {
    const T none = static_cast<T>(kLog2Zero);
    if (!inside || !(weight[batch * count + i] > T(0))) return {none, T(0), none, T(0)};
    const T v = trace[at * length + i];
    return {to_base * v, g_bar ? g_bar[at * count + i] : weight[batch * count + i],
            H ? H[at * count + i] : to_other * v, R ? R[at * count + i] : T(1)};
  }
};

template <typename T>
struct Iterations {
  using Side = IterationSide<T>;
  Side rows, columns;
  int64_t L, length;   // iterations, n + m
  SolvedPlan<T> last;  // the plan after them
  bool transport;      // it counts

  template <class Entries>
  OTLOSS_DEVICE void operator()(const Entries& e, int64_t batch,
                                typename Entries::Values& V) const {
    if (transport)
      last(e, batch, V);
    else
      for_entries<typename Entries::Layout>([&](int r, int c) { V[r][c] = T(0); });
#pragma unroll 1
    for (int64_t l = 0; l < L; ++l) add(e, batch, l, rows, columns, V);
  }

 private:
  // Sides by value: their pointers stay in registers.
  template <class Entries>
  OTLOSS_DEVICE void add(const Entries& e, int64_t batch, int64_t l, const Side x, const Side y,
                         typename Entries::Values& V) const {
    using Layout = typename Entries::Layout;
    const int64_t at = batch * L + l;
    typename Side::Value column[Layout::kColumns];
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) {
      const int64_t j = e.column + Layout::column(c);
      column[c] = y.value(batch, at, length, j, j < y.count);
    }
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
      const typename Side::Value row =
          x.value(batch, at, length, e.row + Layout::row(r), e.counts(r));
#pragma unroll
      for (int c = 0; c < Layout::kColumns; ++c) {
        const T kC = e.k * e.cost[r][c];
        V[r][c] +=
            fast_exp2(row.base + column[c].base - kC) * (row.factor * column[c].factor) +
            row.other_factor * column[c].other_factor * plan_of(row.other, column[c].other, kC);
      }
    }
  }
};

}  // namespace otloss::cuda
