// Solves and gradients of problems whose costs are made from points and never stored, in memory
// O((n + m) d).
//
//     PackKernel        points by coordinates, so that a warp reads neighbouring points
//     StreamedKernel    the whole solve (solve.cuh) on the sums of streamed.cuh
//     AbsorbKernel      k f + log2 a for the gradient                     thread: a point
//     PlanSumKernel    V 1 and V y of some rows and columns              see there
//     JoinKernel        those of all columns                              thread: an entry
//
// The solve is one cooperative kernel that decides on the device when to stop, like that of stored
// costs, because a sequence of launches would need four per pass at 2 to 4 us, up to `max_iters` of
// them whether needed or not; a barrier takes 1 to 1.5 us. Blocks own rows and, for the column
// update, columns, so that no partial sums are exchanged: what they exchange are potentials.
#include "streamed.h"

#include <algorithm>
#include <map>

#include "solve.cuh"
#include "streamed.cuh"

namespace otloss::cuda {

// A group of gradients with its workspace.
template <typename T>
struct GradientItem {
  PointGradientGroup<T> group;
  PackedPair<T> points;
  T* F;        // (B, packed_stride(n)) potentials in base 2, with the weights
  T* G;        // (B, packed_stride(m))
  T* partial;  // (B, splits, n, d + 1) V y and V 1 of each split of the columns
};

namespace {

// A tile of kWarp points and kWarp coordinates through shared memory.
template <typename T>
struct PackKernel {
  static constexpr int kThreads = 256;
  static constexpr int kLines = kThreads / kWarp;
  static_assert(kPackedAlign == kWarp, "a block makes whole lines");

  int64_t batch, n, d, stride;
  const T* z;     // (B, n, d)
  const T* norm;  // (B, n)
  T* packed;      // (B, d + 1, stride) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    T* tile = block.template shared<T>();  // (kWarp, kWarp + 1)
    const int lane = block.thread() % kWarp, line = block.thread() / kWarp;
    const int64_t first = block.x() * kWarp, k0 = block.z() * kWarp;
    for (int64_t b = block.y(); b < batch; b += kGridY) {
      for (int row = line; row < kWarp; row += kLines) {
        const int64_t i = first + row, k = k0 + lane;
        T value = T(0);
        if (i < n && k < d) value = z[(b * n + i) * d + k];
        if (i < n && k == d) value = norm[b * n + i];
        tile[row * (kWarp + 1) + lane] = value;
      }
      block.sync();
      for (int row = line; row < kWarp && k0 + row <= d; row += kLines)
        packed[(b * (d + 1) + k0 + row) * stride + first + lane] = tile[lane * (kWarp + 1) + row];
      block.sync();
    }
  }
};

// (B, d + 1, packed_stride(n))
template <typename T>
const T* pack(const Context& context, int64_t batch, int64_t n, int64_t d, const T* z,
              const T* norm) {
  const int64_t stride = packed_stride(n);
  T* packed = context.scratch<T>(batch * (d + 1) * stride);
  Grid grid;
  grid.x = stride / kWarp;
  grid.y = std::min(batch, kGridY);
  grid.z = ceil_div(d + 1, kWarp);
  grid.shared = kWarp * (kWarp + 1) * sizeof(T);
  launch(context, PackKernel<T>{batch, n, d, stride, z, norm, packed}, grid);
  return packed;
}

// ------------------------------------------------------------------------------------ gradient

// Potentials of both sides of all groups in base 2, with the logarithms of the weights.
template <typename T>
struct AbsorbKernel {
  static constexpr int kThreads = 256;

  Pack<GradientItem<T>> items;
  T k;  // log2(e) / eps

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const GradientItem<T>& item = items.items[block.z() / 2];
    const PointGradientGroup<T>& p = item.group;
    const bool rows = block.z() % 2 == 0;
    const int64_t count = rows ? p.n : p.m, stride = packed_stride(count);
    const int64_t i = block.x() * kThreads + block.thread();
    if (i >= stride) return;
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY) {
      T value = static_cast<T>(kLog2Zero);
      if (i < count)
        value = k * (rows ? p.f : p.g)[batch * count + i] +
                log2_weight((rows ? p.a : p.b)[batch * count + i]);
      (rows ? item.F : item.G)[batch * stride + i] = value;
    }
  }
};

// V 1 and V y over some columns for kRows rows: a warp makes V = gradient_weight(plan) for its
// kTileRows rows and a tile of columns and writes it to shared memory, column by column; then its
// lanes turn to the coordinates of y (as many as fit beside each other, the last is the constant 1
// that gives V 1), each with kTileRows sums: one load of y and a few of V, that all lanes share,
// for kTileRows multiply-adds. Their sums over the tile are added to global memory, where each
// entry belongs to one lane.
template <typename T>
struct PlanSumKernel {
  static constexpr int kThreads = kSolveThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = kWarps * kTileRows;
  static constexpr int kTile = kWarp * kVector<T>;              // columns
  static constexpr int64_t kPlan = kWarps * kTile * kTileRows;  // shared elements of V
  static_assert(kTile % kPackedAlign == 0, "splits begin at tiles");

  Pack<GradientItem<T>> items;
  T k;  // log2(e) / eps
  int64_t splits;
  int64_t stage;  // shared elements of a stage

  // Columns of a split.
  static OTLOSS_HOST_DEVICE int64_t share(int64_t m, int64_t splits) {
    return ceil_div(ceil_div(m, splits), kTile) * kTile;
  }

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const GradientItem<T>& item = items.items[block.z()];
    const PointGradientGroup<T>& p = item.group;
    const int64_t split = block.x() % splits, first = block.x() / splits * kRows;
    const int64_t begin = split * share(p.m, splits);
    if (first >= p.n || begin >= p.m) return;
    RowTiles<T> tiles{};
    tiles.kind = p.points.kind, tiles.d = p.points.d, tiles.symmetric = p.symmetric;
    tiles.k = k;
    tiles.first = first, tiles.last = first + kRows < p.n ? first + kRows : p.n;
    tiles.begin = begin;
    tiles.end = begin + share(p.m, splits) < p.m ? begin + share(p.m, splits) : p.m;
    tiles.stages = kPlan * static_cast<int64_t>(sizeof(T)), tiles.stage = stage;
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY) {
      tiles.rows = packed_cloud(item.points.x, batch, tiles.d, p.n);
      tiles.columns = packed_cloud(item.points.y, batch, tiles.d, p.m);
      tiles.F = item.F + batch * tiles.rows.stride + first;
      tiles.G = item.G + batch * tiles.columns.stride;
      T* out = item.partial + ((batch * splits + split) * p.n + first) * (tiles.d + 1);
      dispatch_tiles(tiles.kind, tiles.d, [&](auto cost, auto difference) {
        rows<decltype(cost), decltype(difference)::value>(
            block, tiles, p.coefficient * p.grad[batch], p.points.zy + batch * p.m * tiles.d, out);
      });
    }
  }

 private:
  static constexpr int kVectors = kTileRows / kVector<T>;  // of a column of V

  template <class Cost, bool kDifference, class Block>
  OTLOSS_NOINLINE static void rows(Block block, const RowTiles<T>& tiles, T scale,
                                   const T* y,  // (m, d)
                                   T* out) {    // (rows, d + 1)
    const int count = static_cast<int>(tiles.last - tiles.first);
    Vector<T>* const V =  // (kTile, kVectors) of this warp
        block.template shared<Vector<T>>() + block.thread() / kWarp * kTile * kVectors;
    TileMaker<Cost, kDifference, T, Block> maker(block, tiles,
                                                 tile_shape<T>(kWarps, tiles.d, tiles.stage));
    maker.run(tiles.first, count, [&](const TileEntries<T>& e) {
      block.warp_sync();  // the tile before was read
      write_weights<Cost>(e, scale, V + block.thread() % kWarp * kVectors);
      block.warp_sync();
      add_products(block, tiles, e, V, y, out);
    });
  }

  // Column c of lane l is number c kWarp + l in shared memory.
  template <class Cost>
  OTLOSS_DEVICE static void write_weights(const TileEntries<T>& e, T scale, Vector<T>* V) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      Vector<T> column[kVector<T>];
#pragma unroll
      for (int u = 0; u < kVector<T>; ++u) {
        const int r = v * kVector<T> + u;
        const T F = e.potential(r);
#pragma unroll
        for (int c = 0; c < kVector<T>; ++c) {
          const T t = e.exponent(F, r, c);
          // A clamped exponential stands for 0, so that padding gets exactly 0.
          const T w = t > static_cast<T>(-kExp2Limit) ? scale * fast_exp2(t) : T(0);
          column[c].at[u] = Cost::gradient_weight(w, e.cost[r][c]);
        }
      }
#pragma unroll
      for (int c = 0; c < kVector<T>; ++c) V[c * kWarp * kVectors + v] = column[c];
    }
  }

  template <class Block>
  OTLOSS_DEVICE static void add_products(Block& block, const RowTiles<T>& tiles,
                                         const TileEntries<T>& e, const Vector<T>* V, const T* y,
                                         T* out) {
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
template <typename T>
struct JoinKernel {
  static constexpr int kThreads = 256;

  Pack<GradientItem<T>> items;
  int64_t splits;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const GradientItem<T>& item = items.items[block.z()];
    const PointGradientGroup<T>& p = item.group;
    const int64_t d = p.points.d, width = p.n * (d + 1), e = block.x() * kThreads + block.thread();
    if (e >= width) return;
    const int64_t i = e / (d + 1), k = e % (d + 1), share = PlanSumKernel<T>::share(p.m, splits);
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY) {
      double total = 0;
      for (int64_t split = 0; split * share < p.m; ++split)
        total += static_cast<double>(item.partial[(batch * splits + split) * width + e]);
      (k < d ? p.product[(batch * p.n + i) * d + k] : p.sum[batch * p.n + i]) =
          static_cast<T>(total);
    }
  }
};

}  // namespace

// Packs each cloud of a call once.
template <typename T>
class Packer {
 public:
  explicit Packer(const Context& context) : context_(context) {}

  PackedPair<T> operator()(int64_t batch, int64_t n, int64_t m, const PointPair<T>& points) {
    return {points.kind, points.d, packed(batch, n, points.d, points.zx, points.hx),
            packed(batch, m, points.d, points.zy, points.hy)};
  }

 private:
  const T* packed(int64_t batch, int64_t n, int64_t d, const T* z, const T* norm) {
    const T*& result = packed_[z];
    if (result == nullptr) result = pack(context_, batch, n, d, z, norm);
    return result;
  }

  const Context& context_;
  std::map<const T*, const T*> packed_;
};

template <typename T>
void solve_streamed(const Context& context, const std::vector<SolveGroup<T>>& groups,
                    const SolveOptions& options) {
  Packer<T> packer(context);
  for_each_pack(groups, [&](const Pack<SolveGroup<T>>& pack) {
    const Shape shape = shape_of(pack);
    if (shape.problems == 0) return;
    const SolvePlan plan = choose_streamed_plan(shape, pack.items[0].points.d,
                                                limits(context.device), forced_regime());
    StreamedKernel<T> kernel{solve_arguments(context, pack, options, shape, plan)};
    SolveArguments<T>& arguments = kernel.arguments;
    for (int i = 0; i < pack.count; ++i) {
      const SolveGroup<T>& p = pack.items[i];
      arguments.points[i] = packer(p.batch, p.n, p.m, p.points);
    }
    arguments.streamed = context.scratch<T>(plan.teams * kStreamedVectors * plan.vector_length);
    launch(context, kernel, solve_grid(plan));
  });
}

template <typename T>
void point_gradient_sums(const Context& context, const std::vector<PointGradientGroup<T>>& groups,
                         double eps) {
  using Kernel = PlanSumKernel<T>;
  Packer<T> packer(context);
  const Limits device = limits(context.device);
  const T k = static_cast<T>(kLog2E / eps);
  for_each_pack(groups, [&](const Pack<PointGradientGroup<T>>& pack) {
    int64_t n = 1, m = 1, batch = 1, blocks = 0;
    for (int i = 0; i < pack.count; ++i) {
      const PointGradientGroup<T>& p = pack.items[i];
      n = std::max(n, p.n), m = std::max(m, p.m), batch = std::max(batch, p.batch);
      blocks += ceil_div(p.n, Kernel::kRows) * p.batch;
    }
    // Columns are split until a few rounds of blocks fill the device.
    constexpr int64_t kRounds = 4;
    const int64_t wanted =
        std::max<int64_t>(1, kRounds * device.multiprocessors / std::max<int64_t>(1, blocks));
    const int64_t splits = std::min(wanted, ceil_div(m, Kernel::kTile));
    const int64_t d = pack.items[0].points.d;
    Pack<GradientItem<T>> items{};
    items.count = pack.count;
    for (int i = 0; i < pack.count; ++i) {
      const PointGradientGroup<T>& p = pack.items[i];
      items.items[i] = {p, packer(p.batch, p.n, p.m, p.points),
                        context.scratch<T>(p.batch * packed_stride(p.n)),
                        context.scratch<T>(p.batch * packed_stride(p.m)),
                        context.scratch<T>(p.batch * splits * p.n * (d + 1))};
    }
    Grid grid;
    grid.x = ceil_div(packed_stride(std::max(n, m)), AbsorbKernel<T>::kThreads);
    grid.y = std::min(batch, kGridY);
    grid.z = 2 * pack.count;
    launch(context, AbsorbKernel<T>{items, k}, grid);
    // A tile of all coordinates if it fits: the rest of the memory caches y.
    const int64_t left = static_cast<int64_t>(device.shared_per_block / sizeof(T)) - Kernel::kPlan;
    const int64_t stage =
        std::min((d + kTileExtra) * Kernel::kTile, left / 2 / kPackedAlign * kPackedAlign);
    grid.x = ceil_div(n, Kernel::kRows) * splits;
    grid.z = pack.count;
    grid.shared = static_cast<size_t>(Kernel::kPlan + 2 * stage) * sizeof(T);
    launch(context, Kernel{items, k, splits, stage}, grid);
    grid.x = ceil_div(n * (d + 1), JoinKernel<T>::kThreads);
    grid.shared = 0;
    launch(context, JoinKernel<T>{items, splits}, grid);
  });
}

#define OTLOSS_INSTANTIATE(T)                                                                  \
  template void solve_streamed(const Context&, const std::vector<SolveGroup<T>>&,              \
                               const SolveOptions&);                                           \
  template void point_gradient_sums(const Context&, const std::vector<PointGradientGroup<T>>&, \
                                    double);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss::cuda
