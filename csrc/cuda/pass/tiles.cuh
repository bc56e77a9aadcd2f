// Tiles of a cost matrix, made from the points on the way or read: what makers (fma_tiles.cuh,
// tensor_tiles.cuh, stored_tiles.cuh) and users (row_sums.cuh, gradient/side_sums.cu) share.
//
// A block has kRows rows of its maker and passes over some columns, tile by tile: maker.run(use)
// calls use(entries), TileEntries, for all tiles that have rows, a whole warp at a time. A thread
// has the same rows in every tile. Which rows and columns it has is the maker's layout:
//
//     kRows, kColumns          entries of a thread
//     row(r), column(c)        from its first row and column
//     kLanes                   neighbouring lanes that have the same rows
//
// Costs up to kDirectDims coordinates come from differences, beyond from inner products, with
// entries that lost more than half of their digits made again, as in csrc/cpu/cost/points.cpp.
#pragma once

#include <cmath>
#include <limits>

#include "core/costs.h"
#include "core/math.h"
#include "cuda/device/block.cuh"
#include "cuda/solve/plan.h"

namespace otloss::cuda {

// Neighbouring columns of a thread, loaded at once.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Vector {
  T at[kVector<T>];
};

// A prepared cloud (see CloudGroup) coordinate by coordinate. For tensor cores it is also scaled by
// a power of two and split into halves, z = high + low.
template <typename T>
struct PackedCloud {
  const T* z;      // (d, stride) points, 0 from `count` on
  const T* norm;   // (stride,) see CloudGroup, 0 from `count` on
  int64_t count;   // points
  int64_t stride;  // packed_stride(count)
  // (split_depth(d) / 8, 2, stride, 8): 8 coordinates of a point, high, then low
  const uint16_t* halves;
  float scale;
};

// Clouds of one shape, (B, ...) of the above.
template <typename T>
struct PackedClouds {
  const T* points = nullptr;         // (B, d + 1, stride) points, then norms; null: not made
  const uint16_t* halves = nullptr;  // (B, split_depth(d) / 8, 2, stride, 8), or null: not made
  const float* scale = nullptr;      // (B,)

  OTLOSS_HOST_DEVICE PackedCloud<T> cloud(int64_t batch, int64_t d, int64_t count) const {
    const int64_t stride = packed_stride(count);
    const T* const z = points + batch * (d + 1) * stride;
    if (halves == nullptr) return {z, z + d * stride, count, stride, nullptr, 1.0f};
    const uint16_t* const split = halves + batch * split_depth(d) * 2 * stride;
    return {z, z + d * stride, count, stride, split, scale[batch]};
  }
};

// Columns of each of so many parts, of which the last may have none.
OTLOSS_HOST_DEVICE int64_t columns_of_part(int64_t columns, int64_t parts) {
  return ceil_div(columns, parts * kPackedAlign) * kPackedAlign;
}

// Some rows against some columns.
template <typename T>
struct RowTiles {
  int64_t d;
  bool symmetric;  // rows and columns are one cloud
  bool repair;     // see needs_repair
  T k;             // log2(e) / eps
  const T* C;      // stored costs of the problem, of `width` columns; its rows, or its columns, are
  int64_t width;   // those of the tiles
  PackedCloud<T> rows, columns;
  int64_t first, last;  // rows; first a multiple of kTileRows
  int64_t begin, end;   // columns; begin a multiple of kPackedAlign
  T* F;                 // (rows.stride,) exponents: potentials of the rows in base 2
  T* G;                 // (columns.stride,) of the columns, with the logarithm of their weights
  int64_t room;         // bytes of shared memory for tensor cores

  // Block `number` of those that share the rows and columns, each with `share` rows and one of so
  // many parts of the columns.
  OTLOSS_DEVICE void cut(int64_t number, int64_t share, int64_t parts) {
    const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
    const int64_t columns = columns_of_part(end, parts);
    first = least(number / parts * share, last), last = least(first + share, last);
    begin = least(number % parts * columns, end), end = least(begin + columns, end);
  }
};

// Where the costs of a group are: stored, or made from points.
template <typename T>
struct PackedPair {
  CostKind kind;
  int64_t d;   // coordinates
  const T* C;  // (B, n, m), or null
  PackedClouds<T> x, y;

  // All of a problem, but for the exponents. k: log2(e) / eps.
  OTLOSS_DEVICE RowTiles<T> tiles(int64_t batch, int64_t n, int64_t m, bool symmetric, T k) const {
    RowTiles<T> tiles{};
    tiles.d = d, tiles.symmetric = symmetric, tiles.repair = true, tiles.k = k;
    tiles.C = C + batch * n * m, tiles.width = m;
    tiles.rows = x.cloud(batch, d, n), tiles.columns = y.cloud(batch, d, m);
    tiles.last = n, tiles.end = m;
    return tiles;
  }
};

// Whether entries that lost digits by cancellation are worth making again, where nothing but their
// exponentials is wanted: all entries are off by rounding of the largest norms, near pairs no more
// than others, and what counts is that rounding over eps. A root makes more of it near 0.
OTLOSS_HOST_DEVICE bool needs_repair(CostKind kind, double k, double norm_x, double norm_y) {
  constexpr double kRounding = 0x1p-22, kSmall = 0x1p-19;
  return kind == CostKind::kEuclidean || !(k * kRounding * (norm_x + norm_y) < kSmall);
}

// The cost of two points whose coordinates are so far apart.
template <class Cost, typename T>
OTLOSS_DEVICE T pair_cost(int64_t d, const T* x, int64_t x_step, const T* y, int64_t y_step) {
  T sum = T(0);
  for (int64_t k = 0; k < d; ++k) {
    const T xk = x[k * x_step], yk = y[k * y_step];
    sum += Cost::kUnitNorm ? xk * yk : (xk - yk) * (xk - yk);
  }
  if constexpr (Cost::kUnitNorm)
    return Cost::from_product(T(0), T(0), sum);
  else
    return Cost::from_difference(sum);
}

// A point is at distance 0 from itself; one of zero norm has no direction and costs 1.
template <class Cost, typename T>
OTLOSS_DEVICE bool costs_nothing(bool symmetric, int64_t i, int64_t j, T norm) {
  return symmetric && i == j && (!Cost::kUnitNorm || norm > T(0));
}

// The entries of a thread in one tile.
template <typename T, class TileLayout>
struct TileEntries {
  using Layout = TileLayout;
  using Values = T[Layout::kRows][Layout::kColumns];
  static constexpr int kRows = Layout::kRows, kColumns = Layout::kColumns;
  static_assert(kRows * kColumns <= 64, "a bit of a word for each");

  int64_t row, column;  // the first ones
  int rows;             // rows from there on: beyond, plans are 0 and costs may be anything finite
  T k;
  T F[kRows];  // kLog2Zero for rows and columns that do not count
  T G[kColumns];
  Values cost;

  // The same for all tiles.
  OTLOSS_DEVICE void set_rows(const RowTiles<T>& p, int64_t first) {
    row = first;
    rows = static_cast<int>(p.last - row);
    k = p.k;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
      F[r] = counts(r) ? p.F[row + Layout::row(r)] : static_cast<T>(kLog2Zero);
  }
  OTLOSS_DEVICE bool counts(int r) const { return Layout::row(r) < rows; }
};

// Norms of the rows of a thread, and the largest.
template <typename T, class Layout>
struct RowNorms {
  T of[Layout::kRows], most = T(0);

  OTLOSS_DEVICE RowNorms(const RowTiles<T>& p, const TileEntries<T, Layout>& e) {
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
      of[r] = e.counts(r) ? p.rows.norm[e.row + Layout::row(r)] : T(0);
      most = std::fmax(most, of[r]);
    }
  }
};

// A stage on its way through shared memory: some coordinates of a tile of columns.
struct TileStage {
  int64_t column;  // the first of the tile
  int chunk = 0;   // of coordinates
  int slot = 0;    // in shared memory
};

// Calls load(step) for all stages of all tiles, kStages - 1 before work(step) of the same.
template <int kStages, int kWidth, class Block, class Load, class Work>
OTLOSS_DEVICE void for_stages(Block& block, int64_t begin, int64_t end, int chunks, Load&& load,
                              Work&& work) {
  const auto advance = [chunks](TileStage& step) {
    if (++step.slot == kStages) step.slot = 0;
    if (++step.chunk == chunks) step.chunk = 0, step.column += kWidth;
  };
  TileStage step{begin}, next{begin};
  const auto load_next = [&] {
    if (next.column < end) load(next), advance(next);
    block.commit_copies();
  };
  for (int s = 0; s < kStages - 1; ++s) load_next();
  for (; step.column < end; advance(step)) {
    block.template wait_for_copies<kStages - 2>();
    block.sync();  // the stage is there, and nobody reads the one before any more
    load_next();
    work(step);
  }
}

// Calls function(r, c) for the entries of a thread.
template <class Layout, class F>
OTLOSS_DEVICE void for_entries(F&& function) {
#pragma unroll
  for (int r = 0; r < Layout::kRows; ++r)
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) function(r, c);
}

// Makes the entries for which again(r, c) once more, from the points.
template <class Cost, typename T, class Layout, class F>
OTLOSS_DEVICE void make_again(const RowTiles<T>& p, TileEntries<T, Layout>& e, F&& again) {
  constexpr int kColumns = Layout::kColumns;
  uint64_t entries = 0;
  for_entries<Layout>([&](int r, int c) {
    if (again(r, c)) entries |= uint64_t{1} << (r * kColumns + c);
  });
#pragma unroll 1
  for (int entry = 0; entries != 0; ++entry, entries >>= 1) {
    const int64_t i = e.row + Layout::row(entry / kColumns);
    const int64_t j = e.column + Layout::column(entry % kColumns);
    if ((entries & 1) == 0 || i >= p.last || j >= p.end) continue;
    const T exact =
        costs_nothing<Cost>(p.symmetric, i, j, p.rows.norm[i])
            ? T(0)
            : pair_cost<Cost>(p.d, p.rows.z + i, p.rows.stride, p.columns.z + j, p.columns.stride);
    for_entries<Layout>([&](int r, int c) {
      if (entry == r * kColumns + c) e.cost[r][c] = exact;
    });
  }
}

// From inner products, divided by scale, in e.cost to squared distances. Returns whether one of
// them may have lost too many digits. hx, hy: squared norms.
template <typename T, class Layout>
OTLOSS_DEVICE bool square_distances(const RowNorms<T, Layout>& hx, const T (&hy)[Layout::kColumns],
                                    T scale, TileEntries<T, Layout>& e) {
  using std::fmax, std::fmin;  // an instruction each
  T least = std::numeric_limits<T>::max(), most = T(0);
#pragma unroll
  for (int c = 0; c < Layout::kColumns; ++c) most = fmax(most, hy[c]);
  for_entries<Layout>([&](int r, int c) {
    T& d2 = e.cost[r][c];
    d2 = fmax(hx.of[r] + hy[c] - T(2) * scale * d2, T(0));
    least = fmin(least, d2);
  });
  return least <= cancellation_limit<T>() * (hx.most + most);
}

// From inner products, divided by scale, in e.cost to costs. hx, hy: norms of rows and columns.
template <class Cost, typename T, class Layout>
OTLOSS_DEVICE void finish_products(const RowTiles<T>& p, const RowNorms<T, Layout>& hx,
                                   const T (&hy)[Layout::kColumns], T scale,
                                   TileEntries<T, Layout>& e) {
  if constexpr (Cost::kUnitNorm) {
    for_entries<Layout>(
        [&](int r, int c) { e.cost[r][c] = Cost::from_product(T(0), T(0), scale * e.cost[r][c]); });
    const int64_t apart = e.column - e.row;  // on the diagonal: that of rows less that of columns
    constexpr int64_t kReach = 1024;
    static_assert(Layout::row(Layout::kRows) + Layout::column(Layout::kColumns) < kReach);
    if (p.symmetric && apart < kReach && -apart < kReach)
      make_again<Cost>(p, e, [&](int r, int c) {
        return Layout::row(r) - Layout::column(c) == static_cast<int>(apart);
      });
  } else {
    const T limit = cancellation_limit<T>();
    const T reach = limit * hx.most;
    if (square_distances(hx, hy, scale, e) && p.repair)
      make_again<SqEuclidean>(p, e,
                              [&](int r, int c) { return e.cost[r][c] <= limit * hy[c] + reach; });
    for_entries<Layout>([&](int r, int c) { e.cost[r][c] = Cost::from_difference(e.cost[r][c]); });
  }
}

}  // namespace otloss::cuda
