// Sums over the rows of a cost matrix that is made from the points on the way and never stored.
//
// A block has some of the rows and passes over all columns, so that its sums need nobody else. The
// columns come by tiles through shared memory, copied in the background while the tile before is
// used (two stages). Warps form row groups of equal size; thread p of group w has kTileRows rows
// and kVector neighbouring columns of the tile,
//
//     rows     first + (step * groups + w) * kTileRows + r,   r < kTileRows
//     columns  (tile * threads of a group + p) * kVector + c,  c < kVector
//
// whose kTileRows * kVector sums over the coordinates stay in registers: per coordinate one 16-byte
// load of shared memory, kTileRows values that all lanes share (from L1), and kTileRows * kVector
// multiply-adds. Then one exponential per entry and a reduction of kTileRows values over the warp,
// in float32 9 shuffles for 32 entries of a lane. If a tile holds all coordinates it serves all
// rows of the block; otherwise coordinates come in chunks, again for every step of rows.
//
// As in the dense pass no maximum is subtracted: the last potential is the guess that keeps the
// exponents near 0. Points whose sums leave the trusted range get their maximum from a second
// sweep and their sum from a third. Sums of a tile are in the working precision, sums over tiles in
// double.
//
// Costs up to kDirectDims coordinates come from differences, beyond from inner products, with
// entries that lost more than half of their digits computed again from the difference, as in
// csrc/cpu/points.cpp.
#pragma once

#include <limits>
#include <type_traits>

#include "block.cuh"
#include "costs.h"
#include "math.h"
#include "plan.h"
#include "reduce.cuh"
#include "team.cuh"

namespace otloss::cuda {

// Neighbouring columns of a thread, loaded at once.
template <typename T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));

template <typename T>
struct alignas(16) Vector {
  T at[kVector<T>];
};

// A prepared cloud (see CloudGroup) coordinate by coordinate.
template <typename T>
struct PackedCloud {
  const T* z;      // (d, stride) points, 0 from `count` on
  const T* norm;   // (stride,) see CloudGroup, 0 from `count` on
  int64_t count;   // points
  int64_t stride;  // packed_stride(count)
};

// Cloud `batch` of (B, d + 1, stride) values, points and then norms.
template <typename T>
OTLOSS_HOST_DEVICE PackedCloud<T> packed_cloud(const T* clouds, int64_t batch, int64_t d,
                                               int64_t count) {
  const int64_t stride = packed_stride(count);
  const T* z = clouds + batch * (d + 1) * stride;
  return {z, z + d * stride, count, stride};
}

// Some rows against some columns.
template <typename T>
struct RowTiles {
  CostKind kind;
  int64_t d;
  bool symmetric;  // rows and columns are one cloud
  T k;             // log2(e) / eps
  PackedCloud<T> rows, columns;
  int64_t first, last;  // rows; first a multiple of kTileRows
  int64_t begin, end;   // columns; begin a multiple of kPackedAlign
  const T* F;           // (last - first,) potentials of the rows in base 2
  const T* G;           // (columns.stride,) of the columns, with the logarithm of their weights;
                        // may be written by other blocks
  int64_t stages;       // bytes of shared memory before the (2, stage) elements of the stages
  int64_t stage;        // elements of a stage
};

// How a block's threads are laid over rows and columns.
struct TileShape {
  int groups;       // row groups
  int coordinates;  // of a stage
};

// Rows of a stage beside the coordinates: G and norms.
constexpr int kTileExtra = 2;

// With so many row groups; coordinates 0: a tile does not fit.
template <typename T>
OTLOSS_HOST_DEVICE TileShape tile_shape(int groups, int64_t d, int64_t stage) {
  const int64_t fit = stage / (kSolveThreads / groups * kVector<T>)-kTileExtra;
  if (fit < 1) return {groups, 0};
  return {groups, static_cast<int>(ceil_div(d, ceil_div(d, fit)))};
}

// The shape with the least padding whose tiles are used often enough to hide their loading.
template <typename T>
OTLOSS_HOST_DEVICE TileShape choose_tile(int64_t rows, int64_t columns, int64_t d, int64_t stage) {
  // Rows of a step for which the arithmetic takes as long as the loading of a column: a
  // multiply-add at 128 per clock against 4 bytes at 24 per clock from L2.
  constexpr double kReuse = 21;
  TileShape best{1, 0};
  double least = 0;
  for (int groups = 1; groups <= kSolveThreads / kWarp; groups *= 2) {
    const TileShape shape = tile_shape<T>(groups, d, stage);
    if (shape.coordinates < (d <= kDirectDims ? d : 1)) continue;
    const int64_t width = kSolveThreads / groups * kVector<T>, step = groups * kTileRows;
    const double reuse = static_cast<double>(shape.coordinates >= d && rows > step ? rows : step);
    const double entries = static_cast<double>(ceil_div(rows, step) * step) *
                           static_cast<double>(ceil_div(columns, width) * width);
    const double time = entries * (reuse < kReuse ? kReuse / reuse : 1);
    if (best.coordinates > 0 && !(time < least)) continue;
    least = time;
    best = shape;
  }
  return best;
}

// One entry.
template <typename T>
OTLOSS_DEVICE T pair_cost(CostKind kind, int64_t d, bool symmetric, const PackedCloud<T>& x,
                          int64_t i, const PackedCloud<T>& y, int64_t j) {
  // A point is at distance 0 from itself; one of zero norm has no direction and costs 1.
  if (symmetric && i == j && (kind != CostKind::kCosine || x.norm[i] > T(0))) return T(0);
  T sum = T(0);
  for (int64_t k = 0; k < d; ++k) {
    const T xk = x.z[k * x.stride + i], yk = y.z[k * y.stride + j];
    sum += kind == CostKind::kCosine ? xk * yk : (xk - yk) * (xk - yk);
  }
  if (kind == CostKind::kCosine) return Cosine::from_product(T(0), T(0), sum);
  return kind == CostKind::kEuclidean ? Euclidean::from_difference(sum) : sum;
}

// The entries of a thread in one tile.
template <typename T>
struct TileEntries {
  int64_t row, column;  // the first ones
  int local;            // row - first row of the call
  int rows;             // that count: from there on plans are 0 and costs may be anything finite
  T k;
  const T* F;       // (rows,)
  T G[kVector<T>];  // kLog2Zero for columns that do not count
  T cost[kTileRows][kVector<T>];

  OTLOSS_DEVICE T potential(int r) const { return r < rows ? F[r] : static_cast<T>(kLog2Zero); }
  OTLOSS_DEVICE T exponent(T potential, int r, int c) const {
    return potential + (G[c] - k * cost[r][c]);
  }
};

// Makes the costs of a block's rows, tile by tile.
template <class Cost, bool kDifference, typename T, class Block>
class TileMaker {
 public:
  static constexpr int kThreads = kSolveThreads, kWarps = kThreads / kWarp;
  static constexpr int kColumns = kVector<T>;

  OTLOSS_DEVICE TileMaker(Block& block, const RowTiles<T>& tiles, const TileShape& shape)
      : block_(block),
        p_(tiles),
        shape_(shape),
        stages_(reinterpret_cast<T*>(block.template shared<unsigned char>() + tiles.stages)),
        chunks_(kDifference ? 1 : static_cast<int>(ceil_div(tiles.d, shape.coordinates))),
        warps_(kWarps / shape.groups),
        group_(block.thread() / (warps_ * kWarp)),
        position_(block.thread() % (warps_ * kWarp)),
        width_(warps_ * kWarp * kColumns) {}

  OTLOSS_DEVICE int warps() const { return warps_; }
  OTLOSS_DEVICE int warp_of_group() const { return position_ / kWarp; }

  // Calls use(entries) for all tiles of rows [first, first + rows), a whole warp at a time.
  template <class Use>
  OTLOSS_DEVICE void run(int64_t first, int rows, Use&& use) {
    const int chunks = kDifference ? 1 : chunks_;  // known where it can be: sums stay in registers
    const int row_steps = static_cast<int>(ceil_div(rows, shape_.groups * kTileRows));
    const int turns = chunks == 1 ? 1 : row_steps * chunks;  // stages of a tile
    const int64_t steps = ceil_div(p_.end - p_.begin, width_) * turns;
    TileEntries<T> entries;
    load(0, turns);
    for (int64_t step = 0; step < steps; ++step) {
      block_.wait_for_copies();
      block_.sync();  // the stage is there, and nobody reads the other one any more
      if (step + 1 < steps) load(step + 1, turns);
      const int turn = static_cast<int>(step % turns), chunk = turn % chunks;
      const int begin = chunks == 1 ? 0 : turn / chunks;
      const int end = chunks == 1 ? row_steps : begin + 1;
      const T* stage = stage_of(step) + position_ * kColumns;
      for (int row_step = begin; row_step < end; ++row_step) {
        const int row = (row_step * shape_.groups + group_) * kTileRows;
        if (row >= rows) continue;  // the same for the whole warp
        if (chunk == 0)
#pragma unroll
          for (int r = 0; r < kTileRows; ++r)
#pragma unroll
            for (int c = 0; c < kColumns; ++c) entries.cost[r][c] = T(0);
        accumulate(first + row, chunk, stage, entries.cost);
        if (chunk < chunks - 1) continue;
        entries.row = first + row, entries.local = row;
        entries.column = p_.begin + step / turns * width_ + position_ * kColumns;
        finish(stage + shape_.coordinates * width_, entries);
        use(entries);
      }
    }
    block_.sync();  // before the stages are used again
  }

 private:
  static constexpr bool kNorms = !kDifference && !Cost::kUnitNorm;

  OTLOSS_DEVICE T* stage_of(int64_t step) const { return stages_ + (step % 2) * p_.stage; }

  // Coordinates of chunk `chunk`.
  OTLOSS_DEVICE int coordinates(int chunk) const {
    const int64_t left = p_.d - static_cast<int64_t>(chunk) * shape_.coordinates;
    return static_cast<int>(left < shape_.coordinates ? left : shape_.coordinates);
  }

  // Starts copying stage `step`: some coordinates of a tile of columns, their G and norms.
  OTLOSS_DEVICE void load(int64_t step, int turns) {
    const int chunk = static_cast<int>(step % turns) % chunks_, count = coordinates(chunk);
    const int64_t j = p_.begin + step / turns * width_ + position_ * kColumns;
    const bool inside = j < p_.columns.stride;
    const int64_t from = inside ? j : 0, stride = p_.columns.stride;
    const T* z = p_.columns.z + static_cast<int64_t>(chunk) * shape_.coordinates * stride + from;
    T* to = stage_of(step) + position_ * kColumns;
    for (int k = group_; k < count; k += shape_.groups)
      block_.copy_async(to + k * width_, z + k * stride, inside);
    to += shape_.coordinates * width_;
    if (group_ == 0) block_.copy_async(to, p_.G + from, inside);
    if (kNorms && group_ == shape_.groups - 1)
      block_.copy_async(to + width_, p_.columns.norm + from, inside);
    block_.commit_copies();
  }

  // sum_rc += sum_k x_rk y_ck, or the squared differences, over the coordinates of a stage.
  OTLOSS_DEVICE void accumulate(int64_t row, int chunk, const T* y,
                                T (&sum)[kTileRows][kColumns]) const {
    const int count = coordinates(chunk);
    const int64_t stride = p_.rows.stride;
    const T* x = p_.rows.z + static_cast<int64_t>(chunk) * shape_.coordinates * stride + row;
#pragma unroll 2
    for (int k = 0; k < count; ++k, x += stride, y += width_) {
      const Vector<T> own = *reinterpret_cast<const Vector<T>*>(y);
      T xs[kTileRows];
#pragma unroll
      for (int v = 0; v < kTileRows; v += kColumns) {
        const Vector<T> part = block_.load_constant(reinterpret_cast<const Vector<T>*>(x + v));
#pragma unroll
        for (int c = 0; c < kColumns; ++c) xs[v + c] = part.at[c];
      }
#pragma unroll
      for (int r = 0; r < kTileRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const T difference = xs[r] - own.at[c];
          sum[r][c] += kDifference ? difference * difference : xs[r] * own.at[c];
        }
    }
  }

  // From the sums in e.cost to costs. `extra`: G and norms of the thread's columns.
  OTLOSS_DEVICE void finish(const T* extra, TileEntries<T>& e) const {
    const Vector<T> G = *reinterpret_cast<const Vector<T>*>(extra);
    Vector<T> hy{};
    if constexpr (kNorms) hy = *reinterpret_cast<const Vector<T>*>(extra + width_);
    unsigned cancelled = 0;  // entries that lost too many digits
#pragma unroll
    for (int r = 0; r < kTileRows; ++r) {
      const T hx = kNorms ? p_.rows.norm[e.row + r] : T(0);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        T& cost = e.cost[r][c];
        if constexpr (kNorms) {
          const T squares = hx + hy.at[c];
          if (squares - T(2) * cost <= cancellation_limit<T>() * squares)
            cancelled |= 1u << (r * kColumns + c);
        }
        cost = kDifference ? from_difference(cost) : Cost::from_product(hx, hy.at[c], cost);
      }
    }
    if constexpr (Cost::kUnitNorm)
      if (p_.symmetric) cancelled = itself(e);
    e.k = p_.k;
    e.F = p_.F + (e.row - p_.first);
    e.rows = static_cast<int>(p_.last - e.row < kTileRows ? p_.last - e.row : kTileRows);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      e.G[c] = e.column + c < p_.end ? G.at[c] : static_cast<T>(kLog2Zero);
#pragma unroll 1
    for (int entry = 0; cancelled != 0; ++entry, cancelled >>= 1) {
      const int64_t i = e.row + entry / kColumns, j = e.column + entry % kColumns;
      if ((cancelled & 1u) == 0 || i >= p_.last || j >= p_.end) continue;
      const T exact = pair_cost(Cost::kKind, p_.d, p_.symmetric, p_.rows, i, p_.columns, j);
#pragma unroll
      for (int r = 0; r < kTileRows; ++r)
#pragma unroll
        for (int c = 0; c < kColumns; ++c)
          if (entry == r * kColumns + c) e.cost[r][c] = exact;
    }
  }

  OTLOSS_DEVICE static T from_difference(T d2) {
    if constexpr (kDifference)
      return Cost::from_difference(d2);
    else
      return d2;
  }

  // The entries on the diagonal.
  OTLOSS_DEVICE static unsigned itself(const TileEntries<T>& e) {
    unsigned entries = 0;
    for (int r = 0; r < kTileRows; ++r) {
      const int64_t c = e.row + r - e.column;
      if (c >= 0 && c < kColumns) entries |= 1u << (r * kColumns + static_cast<int>(c));
    }
    return entries;
  }

  Block& block_;
  const RowTiles<T>& p_;
  const TileShape shape_;
  T* const stages_;     // (2, stage) shared
  const int chunks_;    // of coordinates
  const int warps_;     // of a row group
  const int group_;     // of this thread
  const int position_;  // in its group
  const int width_;     // columns of a tile
};

// Calls function(Cost, std::bool_constant<whether from differences>).
template <class F>
OTLOSS_DEVICE void dispatch_tiles(CostKind kind, int64_t d, F&& function) {
  const bool difference = d <= kDirectDims;
  if (kind == CostKind::kCosine)
    function(Cosine{}, std::false_type{});
  else if (kind == CostKind::kEuclidean)
    difference ? function(Euclidean{}, std::true_type{}) : function(Euclidean{}, std::false_type{});
  else
    difference ? function(SqEuclidean{}, std::true_type{})
               : function(SqEuclidean{}, std::false_type{});
}

// ------------------------------------------------------------------------------------ row sums

// What is added up over the columns j of row i, with t_ij = F_i + G_j - k C_ij.
enum class RowSum {
  kPlan,     // exp2(t_ij)
  kLargest,  // the largest t_ij
  kCost      // exp2(t_ij) C_ij
};

template <typename T>
struct RowSums {
  RowTiles<T> tiles;
  RowSum what;
  T* out;        // (last - first,)
  int64_t sums;  // bytes of shared memory before the kStreamedSums doubles
};

OTLOSS_DEVICE double join_sums(RowSum what, double x, double y) {
  return what == RowSum::kLargest ? Max::join(x, y) : Sum::join(x, y);
}

// Joined over the warp: lane l gets row l / (kWarp / kTileRows) of the tile.
template <RowSum kWhat, typename T, class Block>
OTLOSS_DEVICE T tile_sum(Block& block, const TileEntries<T>& e) {
  using Join = std::conditional_t<kWhat == RowSum::kLargest, Max, Sum>;
  T sums[kTileRows];
#pragma unroll
  for (int r = 0; r < kTileRows; ++r) {
    const T F = e.potential(r);
#pragma unroll
    for (int c = 0; c < kVector<T>; ++c) {
      const T t = e.exponent(F, r, c);
      T term = t;
      if constexpr (kWhat == RowSum::kPlan) term = fast_exp2_unclamped(t);
      if constexpr (kWhat == RowSum::kCost)  // a clamped exponential stands for 0
        term = t > static_cast<T>(-kExp2Limit) ? fast_exp2(t) * e.cost[r][c] : T(0);
      sums[r] = c == 0 ? term : Join::join(sums[r], term);
    }
  }
  return scatter_reduce<Join>(block, sums);
}

// Not inlined: each is a few hundred instructions, called a few times per pass.
template <class Cost, bool kDifference, typename T, class Block>
OTLOSS_NOINLINE void sum_rows(Block block, const RowSums<T>& p) {
  constexpr int kLanes = kWarp / kTileRows;
  const RowTiles<T>& tiles = p.tiles;
  double* const sums = reinterpret_cast<double*>(block.template shared<unsigned char>() + p.sums);
  const T start = p.what == RowSum::kLargest ? std::numeric_limits<T>::lowest() : T(0);
  const TileShape shape =
      choose_tile<T>(tiles.last - tiles.first, tiles.end - tiles.begin, tiles.d, tiles.stage);
  TileMaker<Cost, kDifference, T, Block> maker(block, tiles, shape);
  const int lane = block.thread() % kWarp, most = kStreamedRows * shape.groups;
  for (int64_t first = tiles.first; first < tiles.last; first += most) {
    const int rows = static_cast<int>(tiles.last - first < most ? tiles.last - first : most);
    for (int s = block.thread(); s < kStreamedSums; s += kSolveThreads)
      sums[s] = static_cast<double>(start);
    maker.run(first, rows, [&](const TileEntries<T>& e) {
      const T joined = p.what == RowSum::kPlan   ? tile_sum<RowSum::kPlan>(block, e)
                       : p.what == RowSum::kCost ? tile_sum<RowSum::kCost>(block, e)
                                                 : tile_sum<RowSum::kLargest>(block, e);
      if (lane % kLanes != 0) return;
      double& total = sums[maker.warp_of_group() * most + e.local + lane / kLanes];
      total = join_sums(p.what, total, static_cast<double>(joined));
    });
    for (int row = block.thread(); row < rows; row += kSolveThreads) {
      double total = sums[row];
      for (int w = 1; w < maker.warps(); ++w)
        total = join_sums(p.what, total, sums[w * most + row]);
      p.out[first - tiles.first + row] = static_cast<T>(total);
    }
    block.sync();
  }
}

template <typename T, class Block>
OTLOSS_DEVICE void reduce_rows(Block& block, const RowSums<T>& args) {
  dispatch_tiles(args.tiles.kind, args.tiles.d, [&](auto cost, auto difference) {
    sum_rows<decltype(cost), decltype(difference)::value>(block, args);
  });
}

// Exact potentials from the guess F: F_i -= log2 sum_j exp2(F_i + G_j - k C_ij), and those sums, s.
// Rows of weight 0 get F = 0, s = 1.
template <typename T, class Block>
OTLOSS_NOINLINE void softmin(Block block, RowSums<T> args,
                             const T* weight,  // (rows,)
                             T* F,             // (rows,)
                             T* s,             // (rows,)
                             T* scratch) {     // (2, rows)
  const int rows = static_cast<int>(args.tiles.last - args.tiles.first);
  T *const shift = scratch, *const sum = scratch + rows;
  const auto untrusted = [&](int i) { return weight[i] > T(0) && !trusted(s[i]); };
  const auto reduce = [&](RowSum what, const T* guess, T* out) {
    args.what = what, args.tiles.F = guess, args.out = out;
    reduce_rows(block, args);
  };
  reduce(RowSum::kPlan, F, s);
  int* const flag = reinterpret_cast<int*>(block.template shared<unsigned char>() + args.sums);
  if (block.thread() == 0) *flag = 0;
  block.sync();
  for (int i = block.thread(); i < rows; i += kSolveThreads)
    if (untrusted(i)) *flag = 1;
  block.sync();
  const bool again = *flag != 0;
  block.sync();
  if (again) {
    reduce(RowSum::kLargest, F, shift);
    for (int i = block.thread(); i < rows; i += kSolveThreads)
      shift[i] = untrusted(i) ? F[i] - shift[i] : F[i];
    block.sync();
    reduce(RowSum::kPlan, shift, sum);
  }
  for (int i = block.thread(); i < rows; i += kSolveThreads) {
    const T before = F[i];
    if (again && untrusted(i)) {
      F[i] = shift[i] - fast_log2(sum[i]);
      const T t = before - F[i], limit = static_cast<T>(kExp2Limit);
      s[i] = fast_exp2(t < limit ? t : limit);
    } else {
      F[i] = before - fast_log2(s[i]);
    }
    if (!(weight[i] > T(0))) F[i] = T(0), s[i] = T(1);
  }
  block.sync();
}

}  // namespace otloss::cuda
