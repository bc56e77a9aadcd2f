// Tiles of costs by tensor cores: many coordinates in float32.
//
// Points come as halves (SplitCloud): z = high + low with 11 bits each, so that
//
//     <x, y> = <x_high, y_high> + <x_high, y_low> + <x_low, y_high>
//
// is off by 2^-22 |x| |y| at most; the fourth product would be smaller than that. Halves are exact
// in the products, and sums are float32. A cloud is scaled by one power of two that brings its
// longest point to almost 2^15. That is as far from overflow (65504) as needed, and so far from the
// smallest half, 2^-24, that the low part of a coordinate has all of its bits down to 2^-17 of the
// longest point, and an error of 2^-40 of it below: the low parts need no scale of their own, and
// the three products one sum. What truncation in the tensor cores adds up to is kept small by
// emptying their sums into registers after every stage of at most 64 coordinates.
//
// The warps of a block stand in kRowWarps rows; each has kM x kN products of 16 x 8 (TensorShape):
// 16 x 32 entries at a time, so that their sums stay in registers beside those of all chunks, take
// 6 loads of four matrices for 12 products of depth 16, which keeps shared memory (24 clocks of 128
// bytes) as busy as the tensor cores. Lane l has the entries
//
//     rows     first + 16 m + 8 h + l / 4,        m < kM, h < 2
//     columns  first + 8 n + 2 (l % 4) + c,       n < kN, c < 2
//
// Points lie in shared memory as they do in global memory, 16 bytes of each point side by side, so
// that a row of an 8 x 8 matrix is one of 8 neighbouring groups of banks and copies are contiguous.
// They come in kTensorStages stages; all coordinates of the block's rows stay if there is room.
#pragma once

#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {

template <class Shape>
struct MmaLayout {
  static constexpr int kRows = 2 * Shape::kM, kColumns = 2 * Shape::kN, kLanes = 4;
  static OTLOSS_HOST_DEVICE constexpr int row(int r) { return 8 * r; }
  static OTLOSS_HOST_DEVICE constexpr int column(int c) { return c / 2 * 8 + c % 2; }
};

template <class Cost, class Shape, bool kLow, class Block>
class TensorTileMaker {
 public:
  using Layout = MmaLayout<Shape>;
  using Entries = TileEntries<float, Layout>;

  OTLOSS_DEVICE TensorTileMaker(Block& block, const RowTiles<float>& tiles)
      : block_(block),
        p_(tiles),
        stages_(tensor_stages<Shape>(tiles.d, kPlanes, tiles.room)),
        padded_(static_cast<int>(split_depth(tiles.d))),
        chunks_((padded_ + stages_.depth - 1) / stages_.depth),
        row_(block.thread() / kWarp / Shape::kColumnWarps * Shape::kWarpRows),
        column_(block.thread() / kWarp % Shape::kColumnWarps * Shape::kWarpColumns),
        lane_(block.thread() % kWarp),
        unscale_(1 / tiles.rows.split.scale * (1 / tiles.columns.split.scale)) {}

  // Rows that run() takes at most, and the warps that have columns of the same rows.
  OTLOSS_DEVICE int most_rows() const { return Shape::kRows; }
  OTLOSS_DEVICE int warps() const { return Shape::kColumnWarps; }
  OTLOSS_DEVICE int warp_of_group() const { return column_ / Shape::kWarpColumns; }

  // Calls use(entries) for all tiles of rows [first, first + rows), a whole warp at a time.
  template <class Use>
  OTLOSS_DEVICE void run(int64_t first, int rows, Use&& use) {
    if (chunks_ == 1)
      run_chunks<true>(first, rows, use);
    else
      run_chunks<false>(first, rows, use);
  }

 private:
  static constexpr int kM = Shape::kM, kN = Shape::kN;
  static constexpr int kPlanes = kLow ? 2 : 1;
  static constexpr int kPiece = 8;  // halves of a point side by side, a row of a matrix
  static constexpr bool kNorms = !Cost::kUnitNorm;
  static_assert(kN % 2 == 0, "the columns' matrices are loaded for two products at once");

  // A stage: some coordinates of a tile.
  struct Step {
    int64_t column;  // the first of the tile
    int chunk = 0;   // of coordinates
    int slot = 0;    // in shared memory

    OTLOSS_DEVICE void advance(int chunks) {
      if (++slot == kTensorStages) slot = 0;
      if (++chunk < chunks) return;
      chunk = 0, column += Shape::kColumns;
    }
  };

  template <bool kOneChunk, class Use>
  OTLOSS_DEVICE void run_chunks(int64_t first, int rows, Use&& use) {
    const int chunks = kOneChunk ? 1 : chunks_;
    Step step{p_.begin}, next{p_.begin};
    const auto load_next = [&] {
      if (next.column < p_.end) {
        load(first, next);
        next.advance(chunks);
      }
      block_.commit_copies();
    };
    if (stages_.resident && p_.begin < p_.end)
      copy_points<Shape::kRows>(p_.rows.split, p_.rows.stride, first, 0, padded_, rows_of({0}));
    for (int s = 0; s < kTensorStages - 1; ++s) load_next();
    Entries entries;
    float sums[kM][kN][4];
    for (; step.column < p_.end; step.advance(chunks)) {
      block_.template wait_for_copies<kTensorStages - 2>();
      block_.sync();  // the stage is there, and nobody reads the one before any more
      load_next();
      if (row_ >= rows) continue;  // the same for the whole warp
      add_chunk(step, sums);
      if (step.chunk + 1 < chunks) continue;
      entries.place(p_, first, row_ + lane_ / 4, step.column + column_ + 2 * (lane_ % 4));
      finish(step, sums, entries);
      use(entries);
    }
    block_.sync();  // before the stages are used again
  }

  // ------------------------------------------------------------------------- shared memory

  OTLOSS_DEVICE unsigned char* memory() const {
    return block_.template shared<unsigned char>() + p_.stages;
  }
  // (depth / kPiece, kPlanes, kColumns, kPiece), then the rows' if they are not resident, then G
  // and norms of the columns, (2, kColumns).
  OTLOSS_DEVICE unsigned char* stage(const Step& step) const {
    const int resident = stages_.resident ? padded_ * kRowBytes : 0;
    return memory() + (resident + step.slot * stages_.bytes);
  }
  OTLOSS_DEVICE uint16_t* columns_of(const Step& step) const {
    return reinterpret_cast<uint16_t*>(stage(step));
  }
  // (depth / kPiece, kPlanes, kRows, kPiece); resident, all chunks lie at the beginning.
  OTLOSS_DEVICE uint16_t* rows_of(const Step& step) const {
    const int coordinates = stages_.depth;
    return reinterpret_cast<uint16_t*>(stages_.resident
                                           ? memory() + step.chunk * coordinates * kRowBytes
                                           : stage(step) + coordinates * kColumnBytes);
  }
  OTLOSS_DEVICE float* extra_of(const Step& step) const {
    return reinterpret_cast<float*>(stage(step) + stages_.bytes) - 2 * Shape::kColumns;
  }

  // Coordinates of a chunk.
  OTLOSS_DEVICE int depth_of(int chunk) const {
    const int left = padded_ - chunk * stages_.depth;
    return left < stages_.depth ? left : stages_.depth;
  }

  // Starts copying a stage.
  OTLOSS_DEVICE void load(int64_t first, const Step& step) const {
    const int begin = step.chunk * stages_.depth, depth = depth_of(step.chunk);
    copy_points<Shape::kColumns>(p_.columns.split, p_.columns.stride, step.column, begin, depth,
                                 columns_of(step));
    if (!stages_.resident)
      copy_points<Shape::kRows>(p_.rows.split, p_.rows.stride, first, begin, depth, rows_of(step));
    if (step.chunk == chunks_ - 1) copy_extra(step.column, extra_of(step));
  }

  // Coordinates [begin, begin + depth) of kPoints points; a thread has one of them.
  template <int kPoints>
  OTLOSS_DEVICE void copy_points(const SplitCloud& cloud, int64_t stride, int64_t first, int begin,
                                 int depth, uint16_t* to) const {
    constexpr int kAtOnce = kSolveThreads / kPoints;  // pieces
    static_assert(kSolveThreads % kPoints == 0, "whole pieces");
    const int local = block_.thread() % kPoints;
    const bool inside = first + local < stride;
    const uint16_t* from = cloud.z + begin * 2 * stride;
    if (inside) from += (first + local) * kPiece;
    const int pieces = depth / kPiece * kPlanes;
    for (int p = block_.thread() / kPoints; p < pieces; p += kAtOnce)
      block_.copy_async(to + (p * kPoints + local) * kPiece,
                        from + (p / kPlanes * 2 + p % kPlanes) * stride * kPiece, inside);
  }

  OTLOSS_DEVICE void copy_extra(int64_t first, float* to) const {
    const int local = block_.thread() * kVector<float>;
    if (local >= Shape::kColumns) return;
    const bool inside = first + local < p_.columns.stride;
    const int64_t from = inside ? first + local : 0;
    block_.copy_async(to + local, p_.G + from, inside);
    if (kNorms) block_.copy_async(to + Shape::kColumns + local, p_.columns.norm + from, inside);
  }

  // ------------------------------------------------------------------------------ products

  // Products of a stage, of kRowsM x kColumnsN matrices from the given ones on.
  template <int kRowsM, int kColumnsN>
  OTLOSS_DEVICE void multiply(const Step& step, int m0, int n0,
                              float (&sum)[kRowsM][kColumnsN][4]) const {
    constexpr int kX = Shape::kRows * kPiece, kY = Shape::kColumns * kPiece;  // halves of a piece
    // The row that this lane gives of the four matrices of a load: for x (0, 0), (8, 0), (0, 8),
    // (8, 8) in points and coordinates, for y (0, 0), (0, 8), (8, 0), (8, 8).
    const int matrix = lane_ / 8, row = lane_ % 8;
    const uint16_t* x = rows_of(step) + matrix / 2 * kPlanes * kX +
                        (row_ + 16 * m0 + matrix % 2 * 8 + row) * kPiece;
    const uint16_t* y = columns_of(step) + matrix % 2 * kPlanes * kY +
                        (column_ + 8 * n0 + matrix / 2 * 8 + row) * kPiece;
    const int depths = depth_of(step.chunk) / static_cast<int>(kMmaDepth);
#pragma unroll
    for (int m = 0; m < kRowsM; ++m)
#pragma unroll
      for (int n = 0; n < kColumnsN; ++n)
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[m][n][q] = 0;
#pragma unroll 1
    for (int s = 0; s < depths; ++s, x += 2 * kPlanes * kX, y += 2 * kPlanes * kY) {
      uint32_t high_x[kRowsM][4], high_y[kColumnsN / 2][4];
      load_points(x, high_x);
      load_points(y, high_y);
      multiply_add(high_x, high_y, sum);
      if constexpr (kLow) {
        uint32_t low_y[kColumnsN / 2][4], low_x[kRowsM][4];
        load_points(y + kY, low_y);
        multiply_add(high_x, low_y, sum);
        load_points(x + kX, low_x);
        multiply_add(low_x, high_y, sum);
      }
    }
  }

  // sums += products of a stage, or = for the first chunk. A few matrices at a time: their sums and
  // those of all chunks fit into registers together.
  OTLOSS_DEVICE void add_chunk(const Step& step, float (&sums)[kM][kN][4]) const {
    constexpr int kAtOnce = 4;
    static_assert(kN % kAtOnce == 0, "whole parts");
#pragma unroll
    for (int m = 0; m < kM; ++m)
#pragma unroll
      for (int n0 = 0; n0 < kN; n0 += kAtOnce) {
        float part[1][kAtOnce][4];
        multiply(step, m, n0, part);
#pragma unroll
        for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
          for (int q = 0; q < 4; ++q)
            sums[m][n0 + n][q] =
                step.chunk == 0 ? part[0][n][q] : sums[m][n0 + n][q] + part[0][n][q];
      }
  }

  // 16 points at a time.
  template <int kCount>
  OTLOSS_DEVICE void load_points(const uint16_t* from, uint32_t (&to)[kCount][4]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) block_.load_matrices(from + i * 16 * kPiece, to[i]);
  }

  template <int kRowsM, int kColumnsN, int kPairs>
  OTLOSS_DEVICE void multiply_add(const uint32_t (&x)[kRowsM][4], const uint32_t (&y)[kPairs][4],
                                  float (&sum)[kRowsM][kColumnsN][4]) const {
    static_assert(2 * kPairs == kColumnsN);
#pragma unroll
    for (int m = 0; m < kRowsM; ++m)
#pragma unroll
      for (int n = 0; n < kColumnsN; ++n)
        block_.multiply_add(sum[m][n], x[m], y[n / 2][n % 2 * 2], y[n / 2][n % 2 * 2 + 1]);
  }

  OTLOSS_DEVICE void finish(const Step& step, const float (&sums)[kM][kN][4], Entries& e) const {
    const float* extra = extra_of(step) + column_ + 2 * (lane_ % 4);
    const int64_t to_end = p_.end - e.column;
    const int left = to_end < Shape::kColumns ? static_cast<int>(to_end) : Shape::kColumns;
    float hy[Entries::kColumns] = {};
#pragma unroll
    for (int c = 0; c < Entries::kColumns; ++c)
      if (kNorms) hy[c] = extra[Shape::kColumns + Layout::column(c)];
    for_entries<Layout>(
        [&](int r, int c) { e.cost[r][c] = sums[r / 2][c / 2][r % 2 * 2 + c % 2]; });
    finish_products<Cost>(p_, hy, unscale_, e);
#pragma unroll
    for (int c = 0; c < Entries::kColumns; ++c)
      e.G[c] = Layout::column(c) < left ? extra[Layout::column(c)] : static_cast<float>(kLog2Zero);
  }

  static constexpr int kRowBytes = 2 * kPlanes * Shape::kRows;  // of a coordinate
  static constexpr int kColumnBytes = 2 * kPlanes * Shape::kColumns;

  Block& block_;
  const RowTiles<float>& p_;
  const TensorStages stages_;
  const int padded_;        // coordinates
  const int chunks_;        // of them
  const int row_, column_;  // of this warp in the tile
  const int lane_;
  const float unscale_;  // of the products
};

}  // namespace otloss::cuda
