// The pass over a stored matrix: row sums, and column sums of what is made of them,
//     s_i = sum_j term(A_ij),   w_i = finish(s_i),   y_j = sum_i w_i A_ij,
// for the solve and for the gradients alike. A block has some rows of the matrix, in shared or in
// global memory; its column sums go to where TeamSweep::join finds those of all blocks.
//
// A row team of 1 to all warps of a block takes kRows rows at once; lane l of its warp w has the
// columns j = v * 32 W + 32 w + l, v < kColumns (W warps in the row team). So a panel of kRows *
// kColumns entries stands in the registers of a thread between its two uses, and column sums stay
// there for the whole pass. All loads of a panel come before its first exponential, and nothing
// branches: rows and columns past the end repeat the last one, with factors that make 0 of it. Wide
// matrices have panels of more columns and fewer rows. What is wider than the widest panel takes
// two sweeps and makes its entries twice.
//
// The matrix is given by a Work, whose indices are within the block's rows and the problem's
// columns. S is the type of sums, Column what a thread knows of one:
//     const T* tile                     (rows, m) what entries are made of
//     S row(i), Column column(j)        what else; none(), no_column() past the end
//     S entry(row, column, c)           A_ij; finite
//     S term(column, entry)             what the row sum adds up
//     S finish(i, sum, leader)          w_i; several threads ask, the leader may write
// If kApart the second use has other entries, of another row value:
//     S row_again(i), S again(row, column, c)
// If kGuarded a row whose sum is bad(i, sum) is made again from the row value that makes its
// largest entry 1, that is -max_j exponent(column, c), and finish(i, first, sum, leader) is told of
// the value and the sum that it had first and in the end (Outcome).
#pragma once

#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"
#include "cuda/solve/plan.h"

namespace otloss::cuda {

// Where a thread's panel is: kColumns of kRows rows.
template <typename S, int kPanelColumns>
struct Panel {
  static constexpr int kColumns = kPanelColumns;
  // A wide panel has other registers for its columns' sums.
  static constexpr int kFit = kEntries<S> / (kColumns > kFewColumns ? 2 : 1) / kColumns;
  static constexpr int kRows = kFit < kPanelRows ? kFit : kPanelRows;
  static constexpr int kLanes = kWarp / kRows;  // that look after one row of a step
  static_assert(kRows >= 1 && (kRows & (kRows - 1)) == 0, "scatter_reduce needs a power of two");
};

// What a pass needs to know of its block.
template <typename S>
struct PassState {
  int rows, m;
  bool alone;    // the team is this block
  bool columns;  // whether column sums are wanted
  S* exchange;   // (2, warps, kPanelRows) shared
  S* sums;       // (kThreads * kFewColumns,) shared
  S* part;       // (m,) out: column sums over the block's rows
  S* wide;       // (2, rows) w and the row values, where there are two sweeps
};

// A row's value and sum, at first and in the end.
template <typename S>
struct Outcome {
  S first_value, first_sum, value, sum;
};

// Memory that other blocks of the team write, past L1; a block alone has no need of that.
template <class Block>
struct TeamMemory {
  Block block;
  bool alone;

  template <typename U>
  OTLOSS_DEVICE U load(const U* p) const {
    return alone ? *p : block.load(p);
  }
  template <typename U>
  OTLOSS_DEVICE void store(U* p, U value) const {
    if (alone)
      *p = value;
    else
      block.store(p, value);
  }
};

// Joins values over all warps of a row team.
template <typename S, class P, class Block>
struct RowTeam {
  Block& block;
  S* exchange;
  int warps, team;  // of the row team, its number
  int parity = 0;

  // value: of the row that this lane looks after, joined over the warp.
  template <class Join>
  OTLOSS_DEVICE S join(S value) {
    if (warps == 1) return value;
    const int lane = block.thread() % kWarp, own = lane / P::kLanes, other = lane % P::kLanes;
    S* const at = exchange + parity * (kSolveThreads / kWarp) * kPanelRows;
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

template <typename S, class Work>
OTLOSS_DEVICE S finish_row(const Work& work, int i, const Outcome<S>& row, bool leader) {
  if constexpr (Work::kGuarded)
    return work.finish(i, row, leader);
  else
    return work.finish(i, row.sum, leader);
}

// Not inlined: the loops over entries have all registers to themselves.
template <int kThreads, int kPanelColumns, typename S, class Block, class Work>
OTLOSS_NOINLINE void panel_pass(Block block, PassState<S> state, Work work) {
  using P = Panel<S, kPanelColumns>;
  constexpr int kColumns = P::kColumns, kRows = P::kRows, kWarps = kThreads / kWarp;
  const int rows = state.rows, m = state.m, lane = block.thread() % kWarp;
  int warps = kColumns > kFewColumns ? kWarps : 1;
  while (warps < kWarps && warps * kWarp * kColumns < m) warps *= 2;
  const int teams = kWarps / warps, team = block.thread() / (warps * kWarp);
  const int chunk = warps * kWarp, first = block.thread() % chunk, own = lane / P::kLanes;
  RowTeam<S, P, Block> over_team{block, state.exchange, warps, team};
  typename Work::Column column[kColumns];
  int at[kColumns];
  S y[kColumns], e[kRows][kColumns];
#pragma unroll
  for (int v = 0; v < kColumns; ++v) {
    const int j = v * chunk + first;
    column[v] = j < m ? work.column(j) : work.no_column();
    at[v] = j < m ? j : m - 1;
    y[v] = S(0);
  }
  const auto row_of = [&](int i) {
    return work.tile + static_cast<int64_t>(i < rows ? i : rows - 1) * m;
  };
  const auto load = [&](int base) {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const auto* costs = row_of(base + r);
#pragma unroll
      for (int v = 0; v < kColumns; ++v) e[r][v] = static_cast<S>(costs[at[v]]);
    }
  };
  // Of the row that this lane looks after.
  const auto sum_rows = [&](S value) {
    S partial[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const S row = block.shuffle(value, r * P::kLanes);
      partial[r] = S(0);
#pragma unroll
      for (int v = 0; v < kColumns; ++v) {
        const S entry = work.entry(row, column[v], e[r][v]);
        partial[r] += work.term(column[v], entry);
        if constexpr (!Work::kApart) e[r][v] = entry;
      }
    }
    return over_team.template join<Sum>(scatter_reduce<Sum>(block, partial));
  };
  for (int base = team * kRows; base < rows; base += teams * kRows) {
    const int i = base + own;
    Outcome<S> row{};
    row.first_value = row.value = i < rows ? work.row(i) : work.none();
#pragma unroll 1
    for (bool again = false;; again = true) {
      load(base);
      row.sum = sum_rows(row.value);
      if (!again) row.first_sum = row.sum;
      if constexpr (!Work::kGuarded) break;
      if constexpr (Work::kGuarded) {
        const bool bad = !again && i < rows && work.bad(i, row.sum);
        if (!block.any(bad)) break;  // all warps of the row team see the same sums
        S most = S(0);
#pragma unroll 1
        for (int r = 0; r < kRows; ++r) {
          const auto* costs = row_of(base + r);
          S largest = work.exponent(column[0], static_cast<S>(costs[at[0]]));
#pragma unroll
          for (int v = 1; v < kColumns; ++v)
            largest = Max::join(largest, work.exponent(column[v], static_cast<S>(costs[at[v]])));
          for (int mask = kWarp / 2; mask > 0; mask /= 2)
            largest = Max::join(largest, block.shuffle_xor(largest, mask));
          if (own == r) most = largest;
        }
        most = over_team.template join<Max>(most);
        if (bad) row.value = -most;
      }
    }
    const bool leader = first < kWarp && lane % P::kLanes == 0;
    const S w = i < rows ? finish_row(work, i, row, leader) : S(0);
    if (!state.columns) continue;
    S value = S(0);
    if constexpr (Work::kApart) value = i < rows ? work.row_again(i) : work.none();
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const S wr = block.shuffle(w, r * P::kLanes);
      if constexpr (Work::kApart) {
        const S vr = block.shuffle(value, r * P::kLanes);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) y[v] += wr * work.again(vr, column[v], e[r][v]);
      } else {
#pragma unroll
        for (int v = 0; v < kColumns; ++v) y[v] += wr * e[r][v];
      }
    }
  }
  const TeamMemory<Block> memory{block, state.alone};
  if (teams == 1) {
    if (state.columns)
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (v * chunk + first < m) memory.store(state.part + v * chunk + first, y[v]);
    block.sync();
    return;
  }
  if constexpr (kColumns <= kFewColumns) {  // wider panels have one row team
#pragma unroll
    for (int v = 0; v < kColumns; ++v)
      state.sums[team * chunk * kColumns + v * chunk + first] = y[v];
    block.sync();
    for (int j = block.thread(); state.columns && j < m; j += kThreads) {
      S total = S(0);
      for (int t = 0; t < teams; ++t) total += state.sums[t * chunk * kColumns + j];
      memory.store(state.part + j, total);
    }
    block.sync();
  }
}

// Adds function(k) over first, first + step, ... < count, with several of its loads on their way.
template <class Join, typename S, typename F>
OTLOSS_DEVICE S join_over(int first, int step, int count, S start, F&& function) {
  constexpr int kAhead = 8;
  S total = start;
  int k = first;
  for (; k + (kAhead - 1) * step < count; k += kAhead * step) {
    S part[kAhead];
#pragma unroll
    for (int u = 0; u < kAhead; ++u) part[u] = function(k + u * step);
#pragma unroll
    for (int u = 0; u < kAhead; ++u) total = Join::join(total, part[u]);
  }
  for (; k < count; k += step) total = Join::join(total, function(k));
  return total;
}

// Two sweeps: a warp per row, then a thread per column.
template <typename S, class Block, class Work>
OTLOSS_NOINLINE void wide_pass(Block block, PassState<S> state, Work work) {
  const int rows = state.rows, m = state.m, lane = block.thread() % kWarp;
  S *const factor = state.wide, *const used = factor + rows;
  const auto over_warp = [&](auto join, S value) {
    for (int mask = kWarp / 2; mask > 0; mask /= 2)
      value = decltype(join)::join(value, block.shuffle_xor(value, mask));
    return value;
  };
  for (int i = block.thread() / kWarp; i < rows; i += kSolveThreads / kWarp) {
    const auto* row = work.tile + static_cast<int64_t>(i) * m;
    const auto sum = [&](S value) {
      return over_warp(Sum{}, join_over<Sum>(lane, kWarp, m, S(0), [&](int j) {
                         const auto column = work.column(j);
                         return work.term(column,
                                          work.entry(value, column, static_cast<S>(row[j])));
                       }));
    };
    Outcome<S> of{};
    of.first_value = of.value = work.row(i);
    of.first_sum = of.sum = sum(of.value);
    if constexpr (Work::kGuarded)
      if (work.bad(i, of.sum)) {
        const S least = static_cast<S>(2 * kLog2Zero);
        of.value = -over_warp(Max{}, join_over<Max>(lane, kWarp, m, least, [&](int j) {
                                return work.exponent(work.column(j), static_cast<S>(row[j]));
                              }));
        of.sum = sum(of.value);
      }
    block.warp_sync();  // all lanes have read what the leader writes
    const S w = finish_row(work, i, of, lane == 0);
    if (lane == 0) factor[i] = w, used[i] = of.value;
  }
  block.sync();
  if (!state.columns) return;
  const TeamMemory<Block> memory{block, state.alone};
  for (int j = block.thread(); j < m; j += kSolveThreads) {
    const auto column = work.column(j);
    memory.store(state.part + j, join_over<Sum>(0, 1, rows, S(0), [&](int i) {
                   const S c = static_cast<S>(work.tile[static_cast<int64_t>(i) * m + j]);
                   if constexpr (Work::kApart)
                     return factor[i] * work.again(work.row_again(i), column, c);
                   return factor[i] * work.entry(used[i], column, c);
                 }));
  }
  block.sync();
}

// The whole block calls; its shared memory is its own again afterwards. Smaller blocks than
// kSolveThreads have the narrowest panel only.
template <int kThreads, typename S, class Block, class Work>
OTLOSS_DEVICE void run_pass(Block& block, const PassState<S>& state, const Work& work) {
  constexpr int kMany = kManyColumns<S>;
  // With twice the columns in half the warps a step takes fewer instructions per entry, but has
  // more rows, of which a block may have few.
  if (kThreads < kSolveThreads || state.m <= kThreads * kLeastColumns / 2)
    return panel_pass<kThreads, kLeastColumns>(block, state, work);
  if constexpr (kThreads == kSolveThreads) {
    if (state.m <= kThreads * kFewColumns)
      return panel_pass<kThreads, kFewColumns>(block, state, work);
    if (state.m <= kThreads * kMany) return panel_pass<kThreads, kMany>(block, state, work);
    wide_pass(block, state, work);
  }
}

}  // namespace otloss::cuda
