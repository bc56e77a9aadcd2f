// The kernels of side_sums.h:
//
//     CostKernel     W                                    warp: rows and columns
//     SideSumKernel  V 1 and V y of some rows and columns            see there; one for each cost
//     JoinKernel     those of all columns                            thread: an entry
//
// By multiply-adds whoever makes the costs of a solve: this is one pass, and a solve takes many.
//
// A file for each type includes this: together they take minutes to compile.
#pragma once

#include <algorithm>

#include "cuda/gradient/side_sums.h"
#include "cuda/pass/row_sums.cuh"

namespace otloss::cuda {

constexpr int kSideRows = kSolveThreads / kWarp * kTileRows;  // of a block

// What a kernel of the sums is given.
template <typename T, class Weights>
struct SideSums {
  Pack<SideItem<T, Weights>> items;
  T k;  // log2(e) / eps
  int64_t splits;
  int64_t blocks;        // of a problem
  int64_t stages, room;  // of shared memory, see RowTiles

  // Columns of a split: whole tiles.
  static OTLOSS_HOST_DEVICE int64_t share(int64_t m, int64_t splits) {
    constexpr int64_t kTile = 128;
    static_assert(kTile % kPackedAlign == 0, "splits begin at tiles");
    return ceil_div(ceil_div(m, splits), kTile) * kTile;
  }

  // Calls function(tiles, item, batch, out) for this block's columns and rows, at most kSideRows;
  // out (rows, d + 1).
  template <class Block, class F>
  OTLOSS_DEVICE void of_block(Block& block, F&& function) const {
    with_problem(block, items, blocks, [&](const auto& p, int64_t batch, int64_t number) {
      const int64_t split = number % splits, first = number / splits * kSideRows;
      const int64_t begin = split * share(p.m, splits);
      if (first >= p.n || begin >= p.m) return;
      RowTiles<T>& tiles = *block.template shared<RowTiles<T>>();
      static_assert(sizeof(tiles) <= kArgumentBytes, "raise kArgumentBytes");
      if (block.thread() == 0) set(tiles, p, batch, first, begin);
      block.sync();
      function(tiles, p, batch,
               p.partial + ((batch * splits + split) * p.n + first) * (p.points.d + 1));
    });
  }

 private:
  OTLOSS_DEVICE void set(RowTiles<T>& tiles, const SideItem<T, Weights>& p, int64_t batch,
                         int64_t first, int64_t begin) const {
    const PackedPair<T>& points = p.points;
    const int64_t last = first + kSideRows, end = begin + share(p.m, splits);
    tiles.made_by = points.tiles;
    tiles.kind = points.kind, tiles.d = points.d, tiles.symmetric = p.symmetric;
    tiles.k = k, tiles.repair = true;
    tiles.C = points.C + batch * p.n * p.m, tiles.width = p.m;
    tiles.first = first, tiles.last = last < p.n ? last : p.n;
    tiles.begin = begin, tiles.end = end < p.m ? end : p.m;
    tiles.stages = stages, tiles.room = room;
    tiles.rows = points.x.cloud(batch, points.d, p.n);
    tiles.columns = points.y.cloud(batch, points.d, p.m);
    tiles.F = p.F + batch * tiles.rows.stride + first;
    tiles.G = p.G + batch * tiles.columns.stride;
  }
};

// W of stored costs for kSideRows rows and some columns; a warp has kTileRows rows.
template <typename T, class Weights>
struct CostKernel {
  static constexpr int kThreads = kSolveThreads;

  SideSums<T, Weights> sums;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Maker = StoredTileMaker<StoredRows, T, Block>;
    using Layout = typename Maker::Layout;
    sums.of_block(block,
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

// V 1 and V y over some columns for kSideRows rows: a warp makes V for its
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
  static constexpr int kTile = kWarp * kVector<T>;              // columns
  static constexpr int64_t kPlan = kWarps * kTile * kTileRows;  // shared elements of V

  SideSums<T, Weights> sums;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    sums.of_block(
        block, [&](const RowTiles<T>& tiles, const SideItem<T, Weights>& p, int64_t batch, T* out) {
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

// Adds the splits up: sum and product.
template <typename T, class Weights>
struct JoinKernel {
  static constexpr int kThreads = 256;

  SideSums<T, Weights> sums;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    with_problem(block, sums.items, sums.blocks, [&](const auto& p, int64_t batch, int64_t number) {
      const int64_t d = p.points.d, width = p.n * (d + 1), e = number * kThreads + block.thread();
      if (e >= width) return;
      const int64_t i = batch * p.n + e / (d + 1), k = e % (d + 1);
      const int64_t share = sums.share(p.m, sums.splits);
      double total = 0;
      for (int64_t split = 0; split * share < p.m; ++split)
        total += static_cast<double>(p.partial[(batch * sums.splits + split) * width + e]);
      (k < d ? p.out.product[i * d + k] : p.out.sum[i]) = static_cast<T>(total);
    });
  }
};

template <typename T, class Weights>
void sum_sides(const Context& context, const std::vector<SideItem<T, Weights>>& sides, T k) {
  const Limits device = limits(context.device);
  for_each_pack(sides, [&](const Pack<SideItem<T, Weights>>& pack) {
    const PackedPair<T>& points = pack.items[0].points;
    const Shape shape = shape_of<T>(pack);
    const int64_t rows = ceil_div(shape.n, kSideRows), d = points.d;
    // Columns are split until a few rounds of blocks fill the device.
    constexpr int64_t kRounds = 4;
    const int64_t wanted =
        kRounds * device.multiprocessors / std::max<int64_t>(1, shape.problems * rows);
    SideSums<T, Weights> sums{pack, k, 1, 0, kArgumentBytes, 0};
    sums.splits = std::min(std::max<int64_t>(1, wanted), ceil_div(shape.m, sums.share(1, 1)));
    sums.blocks = rows * sums.splits;
    const auto launch_all = [&](const auto& kernel, int64_t shared) {
      launch(context, kernel,
             Grid{shape.problems * kernel.sums.blocks, static_cast<size_t>(shared)});
    };
    if (points.C != nullptr) return launch_all(CostKernel<T, Weights>{sums}, kArgumentBytes);
    for (int i = 0; i < pack.count; ++i) {
      SideItem<T, Weights>& p = sums.items.items[i];
      p.partial = context.scratch<T>(p.batch * sums.splits * p.n * (d + 1));
    }
    dispatch_tiles(points.kind, d, [&](auto tiles) {
      using Kernel = SideSumKernel<T, Weights, decltype(tiles)>;
      constexpr int64_t kElement = sizeof(T), kStages = 2, kPlan = Kernel::kPlan * kElement;
      // A tile of all coordinates if it fits: the rest of the memory caches y.
      sums.stages = kArgumentBytes + kPlan;
      sums.room = std::min(kStages * (d + kTileExtra) * Kernel::kTile * kElement,
                           static_cast<int64_t>(device.shared_per_block) - sums.stages);
      launch_all(Kernel{sums}, sums.stages + sums.room);
    });
    sums.blocks = ceil_div(shape.n * (d + 1), JoinKernel<T, Weights>::kThreads);
    launch_all(JoinKernel<T, Weights>{sums}, 0);
  });
}

}  // namespace otloss::cuda
