// The kernels of point_sums_launch.cuh: W, and V 1 and V y of some rows and columns, and of all.
#pragma once

#include "cuda/gradient/point_sums.h"
#include "cuda/gradient/point_weights.cuh"
#include "cuda/pass/row_sums.cuh"
#include "cuda/pass/tensor_side_sums.cuh"

namespace otloss::cuda {

// One side of a group, with what makes V and the workspace.
template <typename T, class Weights>
struct SideItem {
  int64_t batch, n, m;
  bool symmetric;  // a cloud against itself
  PackedPair<T> points;
  const T* y;        // (B, m, d) points of the other side
  const T* F;        // (B, packed_stride(n)) exponents of the rows
  const T* G;        // (B, packed_stride(m)) of the columns
  Weights weights;   // what V is made by
  PointSums<T> out;  // (B, n) (B, n, d)
  T* partial;        // (B, splits, n, d + 1) V y and V 1 of each split of the columns
  T* grad_C;         // (B, n, m) out, where costs are stored
};

// What a kernel of the sums is given.
template <typename T, class Weights>
struct SideSums {
  Pack<SideItem<T, Weights>> items;
  T k;  // log2(e) / eps
  int64_t splits;
  int64_t stages, room;  // of shared memory, see RowTiles

  // Columns of a split: whole tiles.
  static OTLOSS_HOST_DEVICE int64_t share(int64_t m, int64_t splits) {
    constexpr int64_t kTile = 128;
    static_assert(kTile % kPackedAlign == 0, "splits begin at tiles");
    return ceil_div(ceil_div(m, splits), kTile) * kTile;
  }

  // Calls function(tiles, item, batch, out) for this block's columns and at most so many rows, for
  // each problem; out (rows, d + 1).
  template <class Block, class F>
  OTLOSS_DEVICE void for_problems(Block& block, int most_rows, F&& function) const {
    const SideItem<T, Weights>& p = items.items[block.z()];
    const int64_t split = block.x() % splits, first = block.x() / splits * most_rows;
    const int64_t begin = split * share(p.m, splits);
    if (first >= p.n || begin >= p.m) return;
    RowTiles<T>& tiles = *block.template shared<RowTiles<T>>();
    static_assert(sizeof(tiles) <= kArgumentBytes, "raise kArgumentBytes");
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY) {
      block.sync();
      if (block.thread() == 0) set(tiles, p, batch, first, most_rows, begin);
      block.sync();
      function(tiles, p, batch,
               p.partial + ((batch * splits + split) * p.n + first) * (p.points.d + 1));
    }
  }

 private:
  OTLOSS_DEVICE void set(RowTiles<T>& tiles, const SideItem<T, Weights>& p, int64_t batch,
                         int64_t first, int most_rows, int64_t begin) const {
    const PackedPair<T>& points = p.points;
    tiles.made_by = points.tiles;
    tiles.kind = points.kind, tiles.d = points.d, tiles.symmetric = p.symmetric;
    tiles.k = k, tiles.repair = true;
    tiles.C = points.C + batch * p.n * p.m, tiles.width = p.m;
    tiles.first = first, tiles.last = first + most_rows < p.n ? first + most_rows : p.n;
    tiles.begin = begin;
    tiles.end = begin + share(p.m, splits) < p.m ? begin + share(p.m, splits) : p.m;
    tiles.stages = stages, tiles.room = room;
    tiles.rows = points.x.cloud(batch, points.d, p.n);
    tiles.columns = points.y.cloud(batch, points.d, p.m);
    tiles.F = p.F + batch * tiles.rows.stride + first;
    tiles.G = p.G + batch * tiles.columns.stride;
  }
};

constexpr int kSideRows = kSolveThreads / kWarp * kTileRows;  // of a block

// W of stored costs for kSideRows rows and some columns; a warp has kTileRows rows.
template <typename T, class Weights>
struct CostKernel {
  static constexpr int kThreads = kSolveThreads;

  SideSums<T, Weights> sums;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Maker = StoredTileMaker<StoredRows, T, Block>;
    using Layout = typename Maker::Layout;
    sums.for_problems(
        block, kSideRows,
        [&](const RowTiles<T>& tiles, const SideItem<T, Weights>& p, int64_t batch, T*) {
          const Maker maker(block, tiles);
          const int row = block.thread() / kWarp * Layout::kWarpRows;
          if (tiles.first + row >= tiles.last) return;
          for (int64_t j = tiles.begin; j < tiles.end; j += Layout::kWarpColumns) {
            typename Maker::Entries e;
            typename Maker::Entries::Values W;
            maker.load(tiles.first, row, j, e);
            p.weights(e, batch, W);
            for_entries<Layout>([&](int r, int c) {
              const int64_t column = e.column + Layout::column(c);
              if (e.counts(r) && column < tiles.end)
                p.grad_C[(batch * p.n + e.row + Layout::row(r)) * p.m + column] = W[r][c];
            });
          }
        });
  }
};

// V 1 and V y over some columns for kRows rows: a warp makes V for its
// kTileRows rows and a tile of columns and writes it to shared memory, column by column; then its
// lanes turn to the coordinates of y (as many as fit beside each other, the last is the constant 1
// that gives V 1), each with kTileRows sums: one load of y and a few of V, that all lanes share,
// for kTileRows multiply-adds. Their sums over the tile are added to global memory, where each
// entry belongs to one lane.
template <typename T, class Weights, class Tiles>
struct SideSumKernel {
  using Cost = typename Tiles::Cost;
  static constexpr int kThreads = kSolveThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = kSideRows;
  static constexpr int kTile = kWarp * kVector<T>;              // columns
  static constexpr int64_t kPlan = kWarps * kTile * kTileRows;  // shared elements of V

  SideSums<T, Weights> sums;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    sums.for_problems(
        block, kRows,
        [&](const RowTiles<T>& tiles, const SideItem<T, Weights>& p, int64_t batch, T* out) {
          rows(block, tiles, p.weights, batch, p.y + batch * p.m * tiles.d, out);
        });
  }

 private:
  using Entries = TileEntries<T, FmaLayout<T>>;
  static constexpr int kVectors = kTileRows / kVector<T>;  // of a column of V

  template <class Block>
  OTLOSS_DEVICE static void rows(Block& block, const RowTiles<T>& tiles, const Weights& weights,
                                 int64_t batch,
                                 const T* y,  // (m, d)
                                 T* out) {    // (rows, d + 1)
    const int count = static_cast<int>(tiles.last - tiles.first);
    Vector<T>* const V =  // (kTile, kVectors) of this warp
        block.template shared<Vector<T>>() + kArgumentBytes / static_cast<int>(sizeof(Vector<T>)) +
        block.thread() / kWarp * kTile * kVectors;
    using Maker = typename Tiles::template Maker<T, Block>;
    Maker maker(block, tiles, tile_shape<T>(kWarps, tiles.d, Maker::stage_elements(tiles)));
    maker.run(tiles.first, count, [&](const Entries& e) {
      block.warp_sync();  // the tile before was read
      write_weights(e, weights, batch, V + block.thread() % kWarp * kVectors);
      block.warp_sync();
      add_products(block, tiles, e, V, y, out);
    });
  }

  // Column c of lane l is number c kWarp + l in shared memory.
  OTLOSS_DEVICE static void write_weights(const Entries& e, const Weights& weights, int64_t batch,
                                          Vector<T>* V) {
    typename Entries::Values entries;
    weights(e, batch, entries);
#pragma unroll
    for (int c = 0; c < kVector<T>; ++c)
#pragma unroll
      for (int v = 0; v < kVectors; ++v) {
        Vector<T> part;
#pragma unroll
        for (int u = 0; u < kVector<T>; ++u) {
          const int r = v * kVector<T> + u;
          part.at[u] = Cost::gradient_weight(entries[r][c], e.cost[r][c]);
        }
        V[c * kWarp * kVectors + v] = part;
      }
  }

  template <class Block>
  OTLOSS_DEVICE static void add_products(Block& block, const RowTiles<T>& tiles, const Entries& e,
                                         const Vector<T>* V, const T* y, T* out) {
    const int lane = block.thread() % kWarp;
    const int64_t d = tiles.d, first = e.column - lane * kVector<T>;
    int width = 1;  // lanes beside each other: coordinates
    while (width < kWarp && width <= d) width *= 2;
    const int part = lane / width, parts = kWarp / width;
    for (int64_t k0 = 0; k0 <= d; k0 += width) {
      const int64_t k = k0 + lane % width;
      T sum[kTileRows] = {};
      for (int s = part; s < kTile; s += parts) {
        const int64_t j = first + s % kWarp * kVector<T> + s / kWarp;
        if (j >= tiles.end) continue;
        const T value = k < d ? y[j * d + k] : T(1);
#pragma unroll
        for (int v = 0; v < kVectors; ++v) {
          const Vector<T> weights = V[s * kVectors + v];
#pragma unroll
          for (int u = 0; u < kVector<T>; ++u) sum[v * kVector<T> + u] += weights.at[u] * value;
        }
      }
      for (int mask = width; mask < kWarp; mask *= 2)
#pragma unroll
        for (int r = 0; r < kTileRows; ++r) sum[r] += block.shuffle_xor(sum[r], mask);
      if (part != 0 || k > d) continue;
#pragma unroll
      for (int r = 0; r < kTileRows; ++r) {
        if (r >= e.rows) continue;
        T& total = out[(e.local + r) * (d + 1) + k];
        total = first == tiles.begin ? sum[r] : total + sum[r];
      }
    }
  }
};

// By tensor cores, see tensor_side_sums.cuh.
template <class Weights, class Tiles>
struct TensorSideSumKernel {
  static constexpr int kThreads = kSolveThreads;
  static constexpr int kRows = SideSumShape::kRows;

  SideSums<float, Weights> sums;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Sums = TensorSideSums<typename Tiles::Cost, Tiles::kLow, Weights, Block>;
    sums.for_problems(block, kRows,
                      [&](const RowTiles<float>& tiles, const SideItem<float, Weights>& p,
                          int64_t batch, float* out) {  // (rows, d + 1)
                        Sums(block, tiles, p.weights, batch, out).run();
                      });
  }
};

// Adds the splits up: sum and product.
template <typename T, class Weights>
struct JoinKernel {
  static constexpr int kThreads = 256;

  Pack<SideItem<T, Weights>> items;
  int64_t splits;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const SideItem<T, Weights>& p = items.items[block.z()];
    const int64_t d = p.points.d, width = p.n * (d + 1), e = block.x() * kThreads + block.thread();
    if (e >= width) return;
    const int64_t i = e / (d + 1), k = e % (d + 1);
    const int64_t share = SideSums<T, Weights>::share(p.m, splits);
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY) {
      double total = 0;
      for (int64_t split = 0; split * share < p.m; ++split)
        total += static_cast<double>(p.partial[(batch * splits + split) * width + e]);
      (k < d ? p.out.product[(batch * p.n + i) * d + k] : p.out.sum[batch * p.n + i]) =
          static_cast<T>(total);
    }
  }
};

}  // namespace otloss::cuda
