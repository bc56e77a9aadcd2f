// The pass of a resident solve, over a block's rows of the costs in shared memory: row sums, and
// column sums of the plan that has been made right on the rows,
//     s_i = sum_j e_ij,   F_i -= log2 s_i,   y_j = sum_i w_i e_ij,   e_ij = exp2(F_i + G_j - k
//     C_ij)
// with one exponential per entry: a factor w_i for each row is all that its update takes.
//
// A row team of 1 to all warps of a block takes kRows rows at once; lane l of its warp w has the
// columns j = v * 32 W + 32 w + l, v < kColumns (W warps in the row team). So a panel of kRows *
// kColumns entries stands in the registers of a thread between its two uses, and column sums stay
// there for the whole pass. All loads of a panel come before its first exponential, and nothing
// branches: rows and columns past the end repeat the last one, with factors that make 0 of it.
//
// No maximum is subtracted: the last potential is the guess that keeps exponents near 0. A row
// whose sum leaves the trusted range is made again from the value that makes its largest entry 1.
#pragma once

#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"
#include "cuda/solve/plan.h"

namespace otloss::cuda {

// Row sums outside [1 / kTrustedRow, kTrustedRow] are made again. This is narrower than `trusted`,
// so that a row's share of clamped exponentials has a known bound, see least_column.
constexpr double kTrustedRow = 1048576.0;  // 2^20

// Where a thread's panel is: kColumns of kRows rows.
template <typename T, int kPanelColumns>
struct Panel {
  static constexpr int kColumns = kPanelColumns;
  static constexpr int kFit = kEntries<T> / kColumns;
  static constexpr int kRows = kFit < kPanelRows ? kFit : kPanelRows;
  static constexpr int kLanes = kWarp / kRows;  // that look after one row of a step
  static_assert(kRows >= 1 && (kRows & (kRows - 1)) == 0, "scatter_reduce needs a power of two");
};

// Indices are within the block's rows and the problem's columns. Kept by value: the loops have it
// in registers.
template <typename T>
struct PassWork {
  const T* tile;  // (rows, m)
  const T* G;     // (m,) written by all blocks of the team
  const T* a;     // (rows,)
  T* F;           // (rows,) in and out
  T* s;           // (rows,) out: sums before the update
  T k, tilt;      // tilt: damping - 1
  int rows, m;
  bool alone;    // the team is this block
  bool columns;  // whether column sums are wanted
  T* exchange;   // (2, warps, kPanelRows) shared
  T* sums;       // (kThreads * kMostColumns,) shared
  T* part;       // (m,) out: column sums over the block's rows

  static OTLOSS_DEVICE T none() { return static_cast<T>(kLog2Zero); }
  // A row that does not count must give finite entries.
  OTLOSS_DEVICE T row(int i) const { return i < rows && a[i] > T(0) ? F[i] : none(); }
  template <class Block>
  OTLOSS_DEVICE T column(const Block& block, int j) const {
    return j >= m ? none() : alone ? G[j] : block.load(G + j);
  }
  template <class Block>
  OTLOSS_DEVICE void put(const Block& block, int j, T y) const {
    if (alone)
      part[j] = y;
    else
      block.store(part + j, y);
  }
  // In this order: F and G may share a constant that is large beside the costs.
  OTLOSS_DEVICE T entry(T F, T G, T c) const { return fast_exp2(F + G - k * c); }
  OTLOSS_DEVICE bool bad(int i, T sum) const {
    return i < rows && a[i] > T(0) &&
           !(sum > static_cast<T>(1.0 / kTrustedRow) && sum < static_cast<T>(kTrustedRow));
  }
  // The factor of row i; first: its value and sum before it was made again. The leader writes.
  OTLOSS_DEVICE T finish(int i, T first_F, T first_sum, T F_i, T sum, bool leader) const {
    if (i >= rows) return T(0);
    const T weight = a[i];
    const bool counts = weight > T(0);
    const T exact = F_i - fast_log2(sum);
    if (leader) {
      F[i] = counts ? exact : T(0);
      s[i] = !counts ? T(1) : F_i == first_F ? first_sum : fast_exp2(first_F - exact);
    }
    if (!counts) return T(0);
    const T w = weight / sum;
    return tilt == T(0) ? w : w * fast_exp2(tilt * exact);
  }
};

// Joins values over all warps of a row team.
template <typename T, class P, class Block>
struct RowTeam {
  Block& block;
  T* exchange;
  int warps, team;  // of the row team, its number
  int parity = 0;

  // value: of the row that this lane looks after, joined over the warp.
  template <class Join>
  OTLOSS_DEVICE T join(T value) {
    if (warps == 1) return value;
    const int lane = block.thread() % kWarp, own = lane / P::kLanes, other = lane % P::kLanes;
    T* const at = exchange + parity * (kSolveThreads / kWarp) * kPanelRows;
    parity ^= 1;
    if (other == 0) at[block.thread() / kWarp * P::kRows + own] = value;
    block.sync_some(1 + team, warps * kWarp);
    value = at[(team * warps + other % warps) * P::kRows + own];
    for (int w = other + P::kLanes; w < warps; w += P::kLanes)
      value = Join::join(value, at[(team * warps + w) * P::kRows + own]);
    // With fewer warps than lanes some lanes have the same values.
    const int width = warps < P::kLanes ? warps : P::kLanes;
    for (int mask = width / 2; mask > 0; mask /= 2)
      value = Join::join(value, block.shuffle_xor(value, mask));
    return value;
  }
};

// The whole block calls; its shared memory is its own again afterwards. Not inlined: the loops over
// entries have all registers to themselves.
template <int kThreads, int kPanelColumns, typename T, class Block>
OTLOSS_NOINLINE void panel_pass(Block block, PassWork<T> work) {
  using P = Panel<T, kPanelColumns>;
  constexpr int kColumns = P::kColumns, kRows = P::kRows, kWarps = kThreads / kWarp;
  const int rows = work.rows, m = work.m, lane = block.thread() % kWarp;
  int warps = 1;
  while (warps < kWarps && warps * kWarp * kColumns < m) warps *= 2;
  const int teams = kWarps / warps, team = block.thread() / (warps * kWarp);
  const int chunk = warps * kWarp, first = block.thread() % chunk, own = lane / P::kLanes;
  RowTeam<T, P, Block> over_team{block, work.exchange, warps, team};
  T column[kColumns], y[kColumns], e[kRows][kColumns];
  int at[kColumns];
#pragma unroll
  for (int v = 0; v < kColumns; ++v) {
    const int j = v * chunk + first;
    column[v] = work.column(block, j);
    at[v] = j < m ? j : m - 1;
    y[v] = T(0);
  }
  const auto row_of = [&](int i) {
    return work.tile + static_cast<int64_t>(i < rows ? i : rows - 1) * m;
  };
  for (int base = team * kRows; base < rows; base += teams * kRows) {
    const int i = base + own;
    const T first_F = work.row(i);
    T F = first_F, first_sum = T(0), sum = T(0);
#pragma unroll 1
    for (bool again = false;; again = true) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const T* costs = row_of(base + r);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) e[r][v] = costs[at[v]];
      }
      T partial[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const T row = block.shuffle(F, r * P::kLanes);
        partial[r] = T(0);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          e[r][v] = work.entry(row, column[v], e[r][v]);
          partial[r] += e[r][v];
        }
      }
      sum = over_team.template join<Sum>(scatter_reduce<Sum>(block, partial));
      if (!again) first_sum = sum;
      const bool bad = !again && work.bad(i, sum);
      if (!block.any(bad)) break;  // all warps of the row team see the same sums
      T most = T(0);
#pragma unroll 1
      for (int r = 0; r < kRows; ++r) {
        const T* costs = row_of(base + r);
        T largest = column[0] - work.k * costs[at[0]];
#pragma unroll
        for (int v = 1; v < kColumns; ++v)
          largest = Max::join(largest, column[v] - work.k * costs[at[v]]);
        for (int mask = kWarp / 2; mask > 0; mask /= 2)
          largest = Max::join(largest, block.shuffle_xor(largest, mask));
        if (own == r) most = largest;
      }
      most = over_team.template join<Max>(most);
      if (bad) F = -most;
    }
    const bool leader = first < kWarp && lane % P::kLanes == 0;
    const T w = work.finish(i, first_F, first_sum, F, sum, leader);
    if (!work.columns) continue;
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const T wr = block.shuffle(w, r * P::kLanes);
#pragma unroll
      for (int v = 0; v < kColumns; ++v) y[v] += wr * e[r][v];
    }
  }
#pragma unroll
  for (int v = 0; v < kColumns; ++v) work.sums[team * chunk * kColumns + v * chunk + first] = y[v];
  block.sync();
  for (int j = block.thread(); work.columns && j < m; j += kThreads) {
    T total = T(0);
    for (int t = 0; t < teams; ++t) total += work.sums[t * chunk * kColumns + j];
    work.put(block, j, total);
  }
  block.sync();
}

// With twice the columns in half the warps a step takes fewer instructions per entry, but has more
// rows, of which a block may have few. Smaller blocks have the narrow panel only.
template <int kThreads, typename T, class Block>
OTLOSS_DEVICE void run_pass(Block& block, const PassWork<T>& work) {
  if constexpr (kThreads == kSolveThreads)
    if (work.m > kThreads * kLeastColumns / 2)
      return panel_pass<kThreads, kMostColumns>(block, work);
  panel_pass<kThreads, kLeastColumns>(block, work);
}

}  // namespace otloss::cuda
