// The kernels of side_sums.h:
//
//     CostKernel     W                                    warp: rows and columns
//     SideSumKernel  V 1 and V y of some rows and columns            see there; one for each cost
//     JoinKernel     those of all columns                            thread: an entry
//
// By multiply-adds whoever makes the costs of a solve: this is one pass, and a solve takes many.
#include "cuda/gradient/side_sums.h"

#include "cuda/pass/sweeps.cuh"

namespace otloss::cuda {
namespace {

constexpr int kSideRows = kSolveThreads / kWarp * kTileRows;  // of a block

// What a kernel of the sums is given.
template <typename T, class Weights>
struct SideSums {
  Pack<SideItem<T, Weights>> items;
  T k;  // log2(e) / eps
  int64_t splits;
  int64_t blocks;  // of a problem

  // Calls function(tiles, item, batch, out) for this block's columns and rows, at most kSideRows;
  // out (n, d + 1).
  template <class Block, class F>
  OTLOSS_DEVICE void of_block(Block& block, F&& function) const {
    with_problem(block, items, blocks, [&](const auto& p, int64_t batch, int64_t number) {
      RowTiles<T>& tiles = *block.template shared<RowTiles<T>>();
      static_assert(sizeof(tiles) <= kArgumentBytes, "raise kArgumentBytes");
      if (block.thread() == 0) {
        tiles = p.points.tiles(batch, p.n, p.m, p.symmetric, k);
        tiles.F = p.F + batch * tiles.rows.stride, tiles.G = p.G + batch * tiles.columns.stride;
        tiles.cut(number, kSideRows, splits);
      }
      block.sync();
      if (tiles.first == tiles.last) return;
      function(tiles, p, batch,
               p.partial + (batch * splits + number % splits) * p.n * (p.points.d + 1));
    });
  }
};

// W of stored costs for kSideRows rows and some columns; a warp has kTileRows rows.
template <typename T, class Weights>
struct CostKernel {
  static constexpr int kThreads = kSolveThreads;

  SideSums<T, Weights> sums;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Maker = StoredTileMaker<StoredRows<T>, T, Block>;
    using Layout = typename Maker::Layout;
    static_assert(Maker::kRows == kSideRows);
    sums.of_block(block,
                  [&](const RowTiles<T>& tiles, const SideItem<T, Weights>& p, int64_t batch, T*) {
                    Maker(block, tiles).run([&](const typename Maker::Entries& e) {
                      typename Maker::Entries::Values W;
                      p.weights(e, batch, W);
                      for_entries<Layout>([&](int r, int c) {
                        const int64_t column = e.column + Layout::column(c);
                        if (e.counts(r) && column < tiles.end)
                          p.grad_C[(batch * p.n + e.row + Layout::row(r)) * p.m + column] = W[r][c];
                      });
                    });
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
  static constexpr int kTile = kWarp * kVector<T>;  // columns
  // Bytes of shared memory before the stages: V of each warp.
  static constexpr int64_t kStages =
      kArgumentBytes + kWarps * kTile * kTileRows * static_cast<int64_t>(sizeof(T));

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
                                 T* out) {    // (n, d + 1)
    Vector<T>* const V =                      // (kTile, kVectors) of this warp
        block.template shared<Vector<T>>() + kArgumentBytes / static_cast<int>(sizeof(Vector<T>)) +
        block.thread() / kWarp * kTile * kVectors;
    typename Tiles::template Maker<T, Block> maker(block, tiles, kStages);
    maker.run([&](const Entries& e) {
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
        T& total = out[(e.row + r) * (d + 1) + k];
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
      const int64_t columns = columns_of_part(p.m, sums.splits);
      double total = 0;
      for (int64_t split = 0; split * columns < p.m; ++split)
        total += static_cast<double>(p.partial[(batch * sums.splits + split) * width + e]);
      (k < d ? p.out.product[i * d + k] : p.out.sum[i]) = static_cast<T>(total);
    });
  }
};

}  // namespace

template <typename T, class Weights>
void sum_sides(const Context& context, const std::vector<SideItem<T, Weights>>& sides, T k) {
  for_each_pack(sides, [&](const Pack<SideItem<T, Weights>>& pack) {
    const PackedPair<T>& points = pack.items[0].points;
    const Shape shape = shape_of<T>(pack);
    const int64_t d = points.d;
    const SweepCut cut = products_plan(context, shape, d, points.C != nullptr).cuts[0];
    SideSums<T, Weights> sums{pack, k, cut.parts, ceil_div(shape.n, kSideRows) * cut.parts};
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
      launch_all(Kernel{sums}, Kernel::kStages + kFmaRoom);
    });
    sums.blocks = ceil_div(shape.n * (d + 1), JoinKernel<T, Weights>::kThreads);
    launch_all(JoinKernel<T, Weights>{sums}, 0);
  });
}

#define OTLOSS_INSTANTIATE(T, Weights) \
  template void sum_sides(const Context&, const std::vector<SideItem<T, Weights<T>>>&, T);
OTLOSS_INSTANTIATE(float, SolvedPlan)
OTLOSS_INSTANTIATE(float, Iterations)
OTLOSS_INSTANTIATE(double, SolvedPlan)
OTLOSS_INSTANTIATE(double, Iterations)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss::cuda
