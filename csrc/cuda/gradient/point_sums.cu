// What the gradients of points need, without a matrix: with V = gradient_weight of the cost's
// gradient, V 1 and V y for the points of one side as rows (CostGradientGroup does the rest). V is
// made tile by tile by a functor, from costs that streamed.cuh makes:
//
//     ScaledPlan     grad P                                          envelope
//     SolvedPlan     P (s + t C + alpha + beta)                      implicit
//     Iterations     sum over the iterations, as in unrolled.cu, of
//                    e (a g_bar + R w), and P (s + t C) of the last
//
// Launches:
//     AbsorbKernel   k f + log2 a for the envelope                   thread: a point
//     SideSumKernel  V 1 and V y of some rows and columns            see there
//     TensorSideSumKernel  the same by tensor cores                  tensor_side_sums.cuh
//     JoinKernel     those of all columns                            thread: an entry
#include "cuda/gradient/point_sums.h"

#include <algorithm>
#include <type_traits>

#include "core/costs.h"
#include "core/math.h"
#include "core/penalty.h"
#include "cuda/device/block.cuh"
#include "cuda/pass/streamed.cuh"
#include "cuda/pass/tensor_side_sums.cuh"

namespace otloss::cuda {
namespace {

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
};

template <typename T>
OTLOSS_DEVICE T plan_of(T F, T G, T kC) {
  const T t = F + G - kC;
  // A clamped exponential stands for 0, so that padding gets exactly 0.
  return t > static_cast<T>(-kExp2Limit) ? fast_exp2(t) : T(0);
}

// ---------------------------------------------------------------------------------- what V is

template <typename T>
struct ScaledPlan {
  static constexpr bool kTensor = true;  // also served by tensor cores

  const T* grad;  // (B,) of the loss
  T coefficient;

  template <class Entries>
  OTLOSS_DEVICE void operator()(const Entries& e, int64_t batch,
                                typename Entries::Values& V) const {
    const T scale = coefficient * grad[batch];
    for_entries<typename Entries::Layout>([&](int r, int c) {
      V[r][c] = scale * plan_of(e.potential(r), e.G[c], e.k * e.cost[r][c]);
    });
  }
};

template <typename T>
struct SolvedPlan {
  static constexpr bool kTensor = true;

  const T* alpha;  // (B, n)
  const T* beta;   // (B, m)
  const T* grad;   // (B,) of the loss
  T coefficient;   // s = coefficient grad
  T of_cost;       // t / s
  T sides;         // of the cloud that receive the same: 2 for a cloud against itself
  int64_t n, m;

  template <class Entries>
  OTLOSS_DEVICE void operator()(const Entries& e, int64_t batch,
                                typename Entries::Values& V) const {
    using Layout = typename Entries::Layout;
    const T s = coefficient * grad[batch], t = of_cost * s;
    T column[Layout::kColumns], row[Layout::kRows];
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) {
      const int64_t j = e.column + Layout::column(c);
      column[c] = j < m ? beta[batch * m + j] : T(0);
    }
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r)
      row[r] = s + (e.counts(r) ? alpha[batch * n + e.row + Layout::row(r)] : T(0));
    for_entries<Layout>([&](int r, int c) {
      const T P = plan_of(e.potential(r), e.G[c], e.k * e.cost[r][c]);
      V[r][c] = sides * P * (row[r] + t * e.cost[r][c] + column[c]);
    });
  }
};

// One side of all iterations: e = exp2(base_i + base_j - k C), to which a side has a first and a
// second factor, and R another exponent where the iteration is apart.
template <typename T>
struct IterationSide {
  const T* plan;    // (B, stride) exponents of the last plan, with the weights
  const T* trace;   // (B, L, length) f, or g
  const T* weight;  // (B, count)
  const T* first;   // (B, L, count) g_bar, or null: the weight
  const T* second;  // (B, L, count) R, or w: where the iteration is apart the exponent
  int64_t count, stride;
  T to_base, to_apart;  // from the trace to exponents; to_apart 0: `second` is the exponent

  struct Value {
    T base, first, apart, second;
  };

  // at: (batch, iteration); inside: whether the point is one.
  OTLOSS_DEVICE Value value(int64_t batch, int64_t at, int64_t length, int64_t i, bool inside,
                            bool is_apart) const {
    const T none = static_cast<T>(kLog2Zero);
    if (!inside || !(weight[batch * count + i] > T(0))) return {none, T(0), none, T(0)};
    const T v = trace[at * length + i], other = second[at * count + i];
    const bool exponent = is_apart && to_apart == T(0);
    return {to_base * v, first ? first[at * count + i] : weight[batch * count + i],
            exponent ? other : to_apart * v, exponent ? T(1) : other};
  }
};

template <typename T>
struct Iterations {
  using Side = IterationSide<T>;
  // Most of the work is on the iterations, and vectors of many columns would not fit into
  // registers.
  static constexpr bool kTensor = false;

  Side rows, columns;
  int64_t L, length;  // iterations, n + m
  const int* apart;   // (B, L)
  const T* grad;      // (B,) of the loss
  T coefficient;
  T of_cost;        // t / s of the last plan
  bool transport;   // the last plan counts
  bool both_sides;  // a cloud against itself: V + V^T

  template <class Entries>
  OTLOSS_DEVICE void operator()(const Entries& e, int64_t batch,
                                typename Entries::Values& V) const {
#pragma unroll
    for (int r = 0; r < kTileRows; ++r)
#pragma unroll
      for (int c = 0; c < kVector<T>; ++c) V[r][c] = T(0);
#pragma unroll 1
    for (int turn = 0; turn < (both_sides ? 2 : 1); ++turn) {
      const Side &x = turn == 0 ? rows : columns, &y = turn == 0 ? columns : rows;
      if (transport) add_plan(e, batch, x, y, V);
#pragma unroll 1
      for (int64_t l = 0; l < L; ++l) add(e, batch, l, x, y, V);
    }
  }

 private:
  template <class Entries>
  OTLOSS_DEVICE void add_plan(const Entries& e, int64_t batch, const Side& x, const Side& y,
                              typename Entries::Values& V) const {
    const T s = coefficient * grad[batch], t = of_cost * s;
    T column[kVector<T>];
#pragma unroll
    for (int c = 0; c < kVector<T>; ++c)
      column[c] = e.column + c < y.count ? y.plan[batch * y.stride + e.column + c]
                                         : static_cast<T>(kLog2Zero);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const T own = x.plan[batch * x.stride + e.row + r];
#pragma unroll
      for (int c = 0; c < kVector<T>; ++c) {
        const T P = plan_of(own, column[c], e.k * e.cost[r][c]);
        V[r][c] += P != T(0) ? P * (s + t * e.cost[r][c]) : T(0);
      }
    }
  }

  template <class Entries>
  OTLOSS_DEVICE void add(const Entries& e, int64_t batch, int64_t l, const Side& x, const Side& y,
                         typename Entries::Values& V) const {
    const int64_t at = batch * L + l;
    const bool is_apart = apart[at] != 0;
    typename Side::Value column[kVector<T>];
#pragma unroll
    for (int c = 0; c < kVector<T>; ++c)
      column[c] = y.value(batch, at, length, e.column + c, e.column + c < y.count, is_apart);
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const typename Side::Value row = x.value(batch, at, length, e.row + r, r < e.rows, is_apart);
#pragma unroll
      for (int c = 0; c < kVector<T>; ++c) {
        const T kC = e.k * e.cost[r][c];
        const T exponential = fast_exp2(row.base + column[c].base - kC);
        const T second = row.second * column[c].second;
        if (is_apart)
          V[r][c] += exponential * row.first * column[c].first +
                     second * plan_of(row.apart, column[c].apart, kC);
        else
          V[r][c] += exponential * (row.first * column[c].first + second);
      }
    }
  }
};

// -------------------------------------------------------------------------------------- kernels

// Potentials of both sides of all groups in base 2, with the logarithms of the weights.
template <typename T>
struct AbsorbKernel {
  static constexpr int kThreads = 256;

  Pack<PointGradientGroup<T>> groups;
  T* F[kMaxGroups];  // (B, packed_stride(n)) out
  T* G[kMaxGroups];  // (B, packed_stride(m)) out
  T k;               // log2(e) / eps

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t group = block.z() / 2;
    const PointGradientGroup<T>& p = groups.items[group];
    const bool rows = block.z() % 2 == 0;
    const int64_t count = rows ? p.n : p.m, stride = packed_stride(count);
    const int64_t i = block.x() * kThreads + block.thread();
    if (i >= stride) return;
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY) {
      T value = static_cast<T>(kLog2Zero);
      if (i < count)
        value = k * (rows ? p.f : p.g)[batch * count + i] +
                log2_weight((rows ? p.a : p.b)[batch * count + i]);
      (rows ? F : G)[group][batch * stride + i] = value;
    }
  }
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
  OTLOSS_DEVICE void for_problems(const Block& block, int most_rows, F&& function) const {
    const SideItem<T, Weights>& p = items.items[block.z()];
    const int64_t split = block.x() % splits, first = block.x() / splits * most_rows;
    const int64_t begin = split * share(p.m, splits);
    if (first >= p.n || begin >= p.m) return;
    RowTiles<T> tiles{};
    tiles.made_by = p.points.tiles;
    tiles.kind = p.points.kind, tiles.d = p.points.d, tiles.symmetric = p.symmetric;
    tiles.k = k;
    tiles.first = first, tiles.last = first + most_rows < p.n ? first + most_rows : p.n;
    tiles.begin = begin;
    tiles.end = begin + share(p.m, splits) < p.m ? begin + share(p.m, splits) : p.m;
    tiles.stages = stages, tiles.room = room;
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY) {
      tiles.rows = packed_cloud(p.points.x, batch, tiles.d, p.n);
      tiles.columns = packed_cloud(p.points.y, batch, tiles.d, p.m);
      tiles.split_rows = p.points.split_x.cloud(batch, tiles.d, p.n);
      tiles.split_columns = p.points.split_y.cloud(batch, tiles.d, p.m);
      tiles.F = p.F + batch * tiles.rows.stride + first;
      tiles.G = p.G + batch * tiles.columns.stride;
      function(tiles, p, batch,
               p.partial + ((batch * splits + split) * p.n + first) * (tiles.d + 1));
    }
  }
};

// V 1 and V y over some columns for kRows rows: a warp makes V for its
// kTileRows rows and a tile of columns and writes it to shared memory, column by column; then its
// lanes turn to the coordinates of y (as many as fit beside each other, the last is the constant 1
// that gives V 1), each with kTileRows sums: one load of y and a few of V, that all lanes share,
// for kTileRows multiply-adds. Their sums over the tile are added to global memory, where each
// entry belongs to one lane.
template <typename T, class Weights>
struct SideSumKernel {
  static constexpr int kThreads = kSolveThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = kWarps * kTileRows;
  static constexpr int kTile = kWarp * kVector<T>;              // columns
  static constexpr int64_t kPlan = kWarps * kTile * kTileRows;  // shared elements of V

  SideSums<T, Weights> sums;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    sums.for_problems(
        block, kRows,
        [&](const RowTiles<T>& tiles, const SideItem<T, Weights>& p, int64_t batch, T* out) {
          dispatch_tiles(tiles.kind, tiles.d, [&](auto cost, auto difference) {
            rows<decltype(cost), decltype(difference)::value>(block, tiles, p.weights, batch,
                                                              p.y + batch * p.m * tiles.d, out);
          });
        });
  }

 private:
  using Entries = TileEntries<T, FmaLayout<T>>;
  static constexpr int kVectors = kTileRows / kVector<T>;  // of a column of V

  template <class Cost, bool kDifference, class Block>
  OTLOSS_NOINLINE static void rows(Block block, const RowTiles<T>& tiles, const Weights& weights,
                                   int64_t batch,
                                   const T* y,  // (m, d)
                                   T* out) {    // (rows, d + 1)
    const int count = static_cast<int>(tiles.last - tiles.first);
    Vector<T>* const V =  // (kTile, kVectors) of this warp
        block.template shared<Vector<T>>() + block.thread() / kWarp * kTile * kVectors;
    using Maker = TileMaker<Cost, kDifference, T, Block>;
    Maker maker(block, tiles, tile_shape<T>(kWarps, tiles.d, Maker::stage_elements(tiles)));
    maker.run(tiles.first, count, [&](const Entries& e) {
      block.warp_sync();  // the tile before was read
      write_weights<Cost>(e, weights, batch, V + block.thread() % kWarp * kVectors);
      block.warp_sync();
      add_products(block, tiles, e, V, y, out);
    });
  }

  // Column c of lane l is number c kWarp + l in shared memory.
  template <class Cost>
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
template <class Weights>
struct TensorSideSumKernel {
  static constexpr int kThreads = kSolveThreads;
  static constexpr int kRows = SideSumShape::kRows;

  SideSums<float, Weights> sums;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    sums.for_problems(block, kRows,
                      [&](const RowTiles<float>& tiles, const SideItem<float, Weights>& p,
                          int64_t batch, float* out) {
                        dispatch_tensor_tiles(tiles.kind, tiles.made_by, [&](auto cost, auto low) {
                          rows<decltype(cost), decltype(low)::value>(block, tiles, p.weights, batch,
                                                                     out);
                        });
                      });
  }

 private:
  template <class Cost, bool kLow, class Block>
  OTLOSS_NOINLINE static void rows(Block block, const RowTiles<float>& tiles,
                                   const Weights& weights, int64_t batch,
                                   float* out) {  // (rows, d + 1)
    TensorSideSums<Cost, kLow, Weights, Block>(block, tiles, weights, batch, out).run();
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

// The kernel, for up to n rows in each of the items.
template <typename T, class Weights>
void launch_sums(const Context& context, SideSums<T, Weights> sums, int64_t n, Grid grid) {
  using Kernel = SideSumKernel<T, Weights>;
  constexpr int64_t kElement = sizeof(T), kStages = 2, kPlan = Kernel::kPlan * kElement;
  const int64_t d = sums.items.items[0].points.d;
  // A tile of all coordinates if it fits: the rest of the memory caches y.
  sums.stages = kPlan;
  sums.room = std::min(kStages * (d + kTileExtra) * Kernel::kTile * kElement,
                       static_cast<int64_t>(limits(context.device).shared_per_block) - sums.stages);
  grid.x = ceil_div(n, Kernel::kRows) * sums.splits;
  grid.shared = static_cast<size_t>(sums.stages + sums.room);
  launch(context, Kernel{sums}, grid);
}

template <class Weights>
void launch_tensor_sums(const Context& context, SideSums<float, Weights> sums, int64_t n,
                        Grid grid) {
  using Kernel = TensorSideSumKernel<Weights>;
  const PackedPair<float>& points = sums.items.items[0].points;
  const int64_t bytes = static_cast<int64_t>(limits(context.device).shared_per_block);
  sums.stages = 0;
  sums.room = tensor_room<SideSumShape>(points.d, planes_of(points.tiles), bytes);
  grid.x = ceil_div(n, Kernel::kRows) * sums.splits;
  grid.shared = static_cast<size_t>(sums.room);
  launch(context, Kernel{sums}, grid);
}

template <typename T, class Weights>
constexpr bool kTensorSums = std::is_same_v<T, float> && Weights::kTensor;

// Sets the sums of all items, their `partial` left open.
template <typename T, class Weights>
void sum_sides(const Context& context, const std::vector<SideItem<T, Weights>>& sides, T k) {
  const Limits device = limits(context.device);
  for_each_pack(sides, [&](const Pack<SideItem<T, Weights>>& pack) {
    const PackedPair<T>& points = pack.items[0].points;
    const bool tensor = kTensorSums<T, Weights> && points.tiles != TileKind::kFma;
    const int64_t rows = tensor ? SideSumShape::kRows : SideSumKernel<T, Weights>::kRows;
    int64_t n = 1, m = 1, batch = 1, blocks = 0;
    for (int i = 0; i < pack.count; ++i) {
      const SideItem<T, Weights>& p = pack.items[i];
      n = std::max(n, p.n), m = std::max(m, p.m), batch = std::max(batch, p.batch);
      blocks += ceil_div(p.n, rows) * p.batch;
    }
    // Columns are split until a few rounds of blocks fill the device.
    constexpr int64_t kRounds = 4;
    const int64_t wanted =
        std::max<int64_t>(1, kRounds * device.multiprocessors / std::max<int64_t>(1, blocks));
    SideSums<T, Weights> sums{pack, k, 1, 0, 0};
    sums.splits = std::min(wanted, ceil_div(m, SideSums<T, Weights>::share(1, 1)));
    for (int i = 0; i < pack.count; ++i) {
      SideItem<T, Weights>& p = sums.items.items[i];
      p.partial = context.scratch<T>(p.batch * sums.splits * p.n * (points.d + 1));
    }
    Grid grid;
    grid.y = std::min(batch, kGridY);
    grid.z = pack.count;
    if constexpr (kTensorSums<T, Weights>)
      if (tensor) launch_tensor_sums(context, sums, n, grid);
    if (!tensor) launch_sums(context, sums, n, grid);
    grid.x = ceil_div(n * (points.d + 1), JoinKernel<T, Weights>::kThreads);
    launch(context, JoinKernel<T, Weights>{sums.items, sums.splits}, grid);
  });
}

template <typename T>
PackedPair<T> exchanged(const PackedPair<T>& pair) {
  PackedPair<T> other = pair;
  std::swap(other.x, other.y);
  std::swap(other.split_x, other.split_y);
  return other;
}

// t / s of the derivative P (s + t C) of <P, C>.
template <typename T>
T of_cost(Objective objective, double eps) {
  return static_cast<T>(objective == Objective::kTransport ? -1 / eps : 0.0);
}

// The envelope's, their exponents made.
template <typename T>
std::vector<SideItem<T, ScaledPlan<T>>> absorbed_sides(
    const Context& context, const std::vector<PointGradientGroup<T>>& groups, T k) {
  std::vector<SideItem<T, ScaledPlan<T>>> sides;
  if (groups.empty()) return sides;
  Packer<T> packer(context, tiles_of(context, groups[0].points));
  for_each_pack(groups, [&](const Pack<PointGradientGroup<T>>& pack) {
    AbsorbKernel<T> absorb{pack, {}, {}, k};
    int64_t points = 1, batch = 1;
    for (int i = 0; i < pack.count; ++i) {
      const PointGradientGroup<T>& p = pack.items[i];
      const int64_t n_stride = packed_stride(p.n), m_stride = packed_stride(p.m);
      points = std::max(points, std::max(n_stride, m_stride));
      batch = std::max(batch, p.batch);
      T* const F = absorb.F[i] = context.scratch<T>(p.batch * n_stride);
      T* const G = absorb.G[i] = context.scratch<T>(p.batch * m_stride);
      sides.push_back({p.batch, p.n, p.m, p.symmetric, packer(p.batch, p.n, p.m, p.points),
                       p.points.zy, F, G, ScaledPlan<T>{p.grad, p.coefficient},
                       PointSums<T>{p.sum, p.product}, nullptr});
    }
    Grid grid;
    grid.x = ceil_div(points, AbsorbKernel<T>::kThreads);
    grid.y = std::min(batch, kGridY);
    grid.z = 2 * pack.count;
    launch(context, absorb, grid);
  });
  return sides;
}

}  // namespace

template <typename T>
void point_gradient_sums(const Context& context, const std::vector<PointGradientGroup<T>>& groups,
                         double eps) {
  const T k = static_cast<T>(kLog2E / eps);
  sum_sides(context, absorbed_sides(context, groups, k), k);
}

template <typename T>
void implicit_point_sums(const Context& context, const Pack<ImplicitGroup<T>>& pack,
                         const PlanOfPoints<T> (&plans)[kMaxGroups], double eps,
                         Objective objective) {
  std::vector<SideItem<T, SolvedPlan<T>>> sides;
  for (int i = 0; i < pack.count; ++i) {
    const ImplicitGroup<T>& p = pack.items[i];
    const PlanOfPoints<T>& plan = plans[i];
    const T of_C = of_cost<T>(objective, eps), both = p.symmetric ? T(2) : T(1);
    if (p.made.x.sum)
      sides.push_back(
          {p.batch, p.n, p.m, p.symmetric, plan.points, p.made.points.zy, plan.F, plan.G,
           SolvedPlan<T>{plan.alpha, plan.beta, p.grad, p.coefficient, of_C, both, p.n, p.m},
           p.made.x, nullptr});
    if (p.made.y.sum)
      sides.push_back(
          {p.batch, p.m, p.n, p.symmetric, exchanged(plan.points), p.made.points.zx, plan.G, plan.F,
           SolvedPlan<T>{plan.beta, plan.alpha, p.grad, p.coefficient, of_C, both, p.m, p.n},
           p.made.y, nullptr});
  }
  sum_sides(context, sides, static_cast<T>(kLog2E / eps));
}

template <typename T>
void unrolled_point_sums(const Context& context, const Pack<UnrolledGroup<T>>& pack,
                         const IterationsOfPoints<T> (&iterations)[kMaxGroups], double eps,
                         Objective objective) {
  std::vector<SideItem<T, Iterations<T>>> sides;
  for (int i = 0; i < pack.count; ++i) {
    const UnrolledGroup<T>& p = pack.items[i];
    const IterationsOfPoints<T>& all = iterations[i];
    const Penalty x{1 / p.penalties.rho_x}, y{1 / p.penalties.rho_y};
    const double k = kLog2E / eps;
    const IterationSide<T> rows{all.F,
                                p.trace,
                                p.a,
                                nullptr,
                                all.R,
                                p.n,
                                packed_stride(p.n),
                                static_cast<T>(k),
                                static_cast<T>(k / x.damping(eps))};
    const IterationSide<T> columns{all.G,
                                   p.trace + p.n,
                                   p.b,
                                   all.g_bar,
                                   all.w,
                                   p.m,
                                   packed_stride(p.m),
                                   static_cast<T>(k / y.damping(eps)),
                                   T(0)};
    Iterations<T> weights{rows,
                          columns,
                          p.L,
                          p.n + p.m,
                          all.apart,
                          p.grad,
                          p.coefficient,
                          of_cost<T>(objective, eps),
                          objective == Objective::kTransport,
                          p.made.symmetric};
    if (p.made.x.sum)
      sides.push_back({p.batch, p.n, p.m, p.made.symmetric, all.points, p.made.points.zy, all.F,
                       all.G, weights, p.made.x, nullptr});
    std::swap(weights.rows, weights.columns);
    if (p.made.y.sum)
      sides.push_back({p.batch, p.m, p.n, p.made.symmetric, exchanged(all.points), p.made.points.zx,
                       all.G, all.F, weights, p.made.y, nullptr});
  }
  sum_sides(context, sides, static_cast<T>(kLog2E / eps));
}

#define OTLOSS_INSTANTIATE(T)                                                                  \
  template void point_gradient_sums(const Context&, const std::vector<PointGradientGroup<T>>&, \
                                    double);                                                   \
  template void implicit_point_sums(const Context&, const Pack<ImplicitGroup<T>>&,             \
                                    const PlanOfPoints<T>(&)[kMaxGroups], double, Objective);  \
  template void unrolled_point_sums(const Context&, const Pack<UnrolledGroup<T>>&,             \
                                    const IterationsOfPoints<T>(&)[kMaxGroups], double,        \
                                    Objective);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss::cuda
