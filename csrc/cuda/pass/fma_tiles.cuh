// Tiles of costs by multiply-adds: few coordinates, and float64.
//
// The columns come by tiles through shared memory, copied in the background while the tile before
// is used (two stages). Warps form row groups of equal size; thread p of group w has kTileRows rows
// and kVector neighbouring columns of the tile,
//
//     rows     first + (step * groups + w) * kTileRows + r,   r < kTileRows
//     columns  (tile * threads of a group + p) * kVector + c,  c < kVector
//
// whose kTileRows * kVector sums over the coordinates stay in registers: per coordinate one 16-byte
// load of shared memory, kTileRows values that all lanes share (from L1), and kTileRows * kVector
// multiply-adds. If a tile holds all coordinates it serves all rows of the block; otherwise
// coordinates come in chunks, again for every step of rows.
#pragma once

#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {

template <typename T>
struct FmaLayout {
  static constexpr int kRows = kTileRows, kColumns = kVector<T>, kLanes = kWarp;
  static OTLOSS_HOST_DEVICE constexpr int row(int r) { return r; }
  static OTLOSS_HOST_DEVICE constexpr int column(int c) { return c; }
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

// Makes the costs of a block's rows, tile by tile, for row_sums.cuh.
template <class Cost, bool kDifference, typename T, class Block>
class TileMaker {
 public:
  using Layout = FmaLayout<T>;
  using Entries = TileEntries<T, Layout>;
  static constexpr int kThreads = kSolveThreads, kWarps = kThreads / kWarp;
  static constexpr int kColumns = kVector<T>;

  // With the shape for all of the rows.
  OTLOSS_DEVICE TileMaker(Block& block, const RowTiles<T>& tiles)
      : TileMaker(block, tiles,
                  choose_tile<T>(tiles.last - tiles.first, tiles.end - tiles.begin, tiles.d,
                                 stage_elements(tiles))) {}
  OTLOSS_DEVICE TileMaker(Block& block, const RowTiles<T>& tiles, const TileShape& shape)
      : block_(block),
        p_(tiles),
        shape_(shape),
        stages_(reinterpret_cast<T*>(block.template shared<unsigned char>() + tiles.stages)),
        stage_(stage_elements(tiles)),
        chunks_(kDifference ? 1 : static_cast<int>(ceil_div(tiles.d, shape.coordinates))),
        warps_(kWarps / shape.groups),
        group_(block.thread() / (warps_ * kWarp)),
        position_(block.thread() % (warps_ * kWarp)),
        width_(warps_ * kWarp * kColumns) {}

  // Elements of a stage.
  OTLOSS_HOST_DEVICE static int64_t stage_elements(const RowTiles<T>& tiles) {
    return tiles.room / (2 * static_cast<int64_t>(sizeof(T))) / kPackedAlign * kPackedAlign;
  }

  // Rows that run() takes at most, and the warps that have columns of the same rows.
  OTLOSS_DEVICE int most_rows() const { return kStreamedRows * shape_.groups; }
  OTLOSS_DEVICE int warps() const { return warps_; }
  OTLOSS_DEVICE int warp_of_group() const { return position_ / kWarp; }

  // Calls use(entries) for all tiles of rows [first, first + rows), a whole warp at a time.
  template <class Use>
  OTLOSS_DEVICE void run(int64_t first, int rows, Use&& use) {
    const int chunks = kDifference ? 1 : chunks_;  // known where it can be: sums stay in registers
    const int row_steps = static_cast<int>(ceil_div(rows, shape_.groups * kTileRows));
    const int turns = chunks == 1 ? 1 : row_steps * chunks;  // stages of a tile
    const int64_t steps = ceil_div(p_.end - p_.begin, width_) * turns;
    Entries entries;
    if (steps > 0) load(0, turns);
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
        entries.place(p_, first, row, p_.begin + step / turns * width_ + position_ * kColumns);
        finish(stage + shape_.coordinates * width_, entries);
        use(entries);
      }
    }
    block_.sync();  // before the stages are used again
  }

 private:
  static constexpr bool kNorms = !kDifference && !Cost::kUnitNorm;

  OTLOSS_DEVICE T* stage_of(int64_t step) const { return stages_ + (step % 2) * stage_; }

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
  OTLOSS_DEVICE void finish(const T* extra, Entries& e) const {
    if constexpr (kDifference) {
      for_entries<Layout>(
          [&](int r, int c) { e.cost[r][c] = Cost::from_difference(e.cost[r][c]); });
    } else {
      Vector<T> hy{};
      if constexpr (kNorms) hy = *reinterpret_cast<const Vector<T>*>(extra + width_);
      finish_products<Cost>(p_, hy.at, T(1), e);
    }
    const Vector<T> G = *reinterpret_cast<const Vector<T>*>(extra);
#pragma unroll
    for (int c = 0; c < kColumns; ++c)
      e.G[c] = e.column + c < p_.end ? G.at[c] : static_cast<T>(kLog2Zero);
  }

  Block& block_;
  const RowTiles<T>& p_;
  const TileShape shape_;
  T* const stages_;  // (2, stage) shared
  const int64_t stage_;
  const int chunks_;    // of coordinates
  const int warps_;     // of a row group
  const int group_;     // of this thread
  const int position_;  // in its group
  const int width_;     // columns of a tile
};

}  // namespace otloss::cuda
