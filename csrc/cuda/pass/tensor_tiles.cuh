// Tiles of costs by tensor cores: many coordinates in float32.
//
// Points come as halves (PackedCloud), z = high + low with 11 bits each, and
//
//     <x, y> = <x_high, y_high> + <x_high, y_low> + <x_low, y_high>
//
// is off by 2^-22 |x| |y| at most. A cloud is scaled by one power of two that brings its longest
// point to almost 2^15: low parts keep all bits down to 2^-17 of the longest point and need no
// scale of their own. The tensor cores truncate, so their sums go to registers after every stage.
//
// A warp has 16 rows and all kTensorColumns columns of a tile, 16 x 32 entries at a time: 6 loads
// of four matrices for 12 products of depth 16, which keeps shared memory as busy as the tensor
// cores. Lane l has the entries
//
//     rows     first + 8 h + l / 4,               h < 2
//     columns  first + 8 n + 2 (l % 4) + c,       n < kN, c < 2
//
// In shared memory as in global memory 16 bytes of neighbouring points are side by side, so that
// matrices have no conflicts of banks and copies are contiguous.
#pragma once

#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {

struct MmaLayout {
  static constexpr int kRows = 2, kColumns = kTensorColumns / 4, kLanes = 4;
  static OTLOSS_HOST_DEVICE constexpr int row(int r) { return 8 * r; }
  static OTLOSS_HOST_DEVICE constexpr int column(int c) { return c / 2 * 8 + c % 2; }
};

template <class Cost, bool kLow, class Block>
class TensorTileMaker {
 public:
  using Layout = MmaLayout;
  using Entries = TileEntries<float, Layout>;
  static constexpr int kRows = kTensorRows;
  static constexpr int kSharing = 1;

  OTLOSS_DEVICE TensorTileMaker(Block& block, const RowTiles<float>& tiles)
      : block_(block),
        p_(tiles),
        stages_(tensor_stages(tiles.d, kPlanes, tiles.room)),
        padded_(static_cast<int>(split_depth(tiles.d))),
        chunks_((padded_ + stages_.depth - 1) / stages_.depth),
        row_(block.thread() / kWarp * 16),
        lane_(block.thread() % kWarp),
        unscale_(1 / tiles.rows.scale * (1 / tiles.columns.scale)),
        e_(rows_of(block, tiles)),
        norms_(tiles, e_) {}

  OTLOSS_DEVICE int64_t row() const { return e_.row; }

  template <class Use>
  OTLOSS_DEVICE void run(Use&& use) {
    chunks_ == 1 ? run_chunks<true>(use) : run_chunks<false>(use);
  }

 private:
  static constexpr int kN = kTensorColumns / 8;
  static constexpr int kPlanes = kLow ? 2 : 1;
  static constexpr int kPiece = 8;  // halves of a point side by side, a row of a matrix
  static constexpr bool kNorms = !Cost::kUnitNorm;
  static constexpr int kAtOnce = 4;  // products whose sums are in registers
  static_assert(kN % kAtOnce == 0 && kAtOnce % 2 == 0, "a load is of the matrices of two");

  OTLOSS_DEVICE static Entries rows_of(Block& block, const RowTiles<float>& p) {
    Entries e;
    e.set_rows(p, p.first + block.thread() / kWarp * 16 + block.thread() % kWarp / 4);
    return e;
  }

  template <bool kOneChunk, class Use>
  OTLOSS_DEVICE void run_chunks(Use&& use) {
    const int chunks = kOneChunk ? 1 : chunks_;
    if (stages_.resident && p_.begin < p_.end)
      copy_points<kTensorRows>(p_.rows, p_.first, 0, padded_, rows_of({0}));
    float sums[kN][4];
    const auto work = [&](const TileStage& step) {
      if (p_.first + row_ >= p_.last) return;  // the same for the whole warp
      add_chunk(step, sums);
      if (step.chunk + 1 < chunks) return;
      e_.column = step.column + 2 * (lane_ % 4);
      finish(step, sums);
      use(e_);
    };
    for_stages<kTensorStages, kTensorColumns>(
        block_, p_.begin, p_.end, chunks, [&](const TileStage& s) { load(s); }, work);
  }

  // ------------------------------------------------------------------------- shared memory

  OTLOSS_DEVICE unsigned char* memory() const {
    return block_.template shared<unsigned char>() + kArgumentBytes;
  }
  // (depth / kPiece, kPlanes, kTensorColumns, kPiece), then the rows' if they are not resident,
  // then G and norms of the columns, (2, kTensorColumns).
  OTLOSS_DEVICE unsigned char* stage(const TileStage& step) const {
    const int resident = stages_.resident ? padded_ * kRowBytes : 0;
    return memory() + (resident + step.slot * stages_.bytes);
  }
  OTLOSS_DEVICE uint16_t* columns_of(const TileStage& step) const {
    return reinterpret_cast<uint16_t*>(stage(step));
  }
  // (depth / kPiece, kPlanes, kTensorRows, kPiece); resident, all chunks lie at the beginning.
  OTLOSS_DEVICE uint16_t* rows_of(const TileStage& step) const {
    const int coordinates = stages_.depth;
    return reinterpret_cast<uint16_t*>(stages_.resident
                                           ? memory() + step.chunk * coordinates * kRowBytes
                                           : stage(step) + coordinates * kColumnBytes);
  }
  OTLOSS_DEVICE float* extra_of(const TileStage& step) const {
    return reinterpret_cast<float*>(stage(step) + stages_.bytes) - 2 * kTensorColumns;
  }

  // Coordinates of a chunk.
  OTLOSS_DEVICE int depth_of(int chunk) const {
    const int left = padded_ - chunk * stages_.depth;
    return left < stages_.depth ? left : stages_.depth;
  }

  // Starts copying a stage.
  OTLOSS_DEVICE void load(const TileStage& step) const {
    const int begin = step.chunk * stages_.depth, depth = depth_of(step.chunk);
    copy_points<kTensorColumns>(p_.columns, step.column, begin, depth, columns_of(step));
    if (!stages_.resident) copy_points<kTensorRows>(p_.rows, p_.first, begin, depth, rows_of(step));
    if (step.chunk == chunks_ - 1) copy_extra(step.column, extra_of(step));
  }

  // Coordinates [begin, begin + depth) of kPoints points; a thread has one of them.
  template <int kPoints>
  OTLOSS_DEVICE void copy_points(const PackedCloud<float>& cloud, int64_t first, int begin,
                                 int depth, uint16_t* to) const {
    constexpr int kPieces = kSolveThreads / kPoints;  // at once
    static_assert(kSolveThreads % kPoints == 0, "whole pieces");
    const int local = block_.thread() % kPoints;
    const uint16_t* const from = cloud.halves + begin * 2 * cloud.stride + (first + local) * kPiece;
    const int pieces = depth / kPiece * kPlanes;
    for (int p = block_.thread() / kPoints; p < pieces; p += kPieces)
      block_.copy_async(to + (p * kPoints + local) * kPiece,
                        from + (p / kPlanes * 2 + p % kPlanes) * cloud.stride * kPiece);
  }

  OTLOSS_DEVICE void copy_extra(int64_t first, float* to) const {
    const int local = block_.thread() * kVector<float>;
    if (local >= kTensorColumns) return;
    block_.copy_async(to + local, p_.G + first + local);
    if (kNorms) block_.copy_async(to + kTensorColumns + local, p_.columns.norm + first + local);
  }

  // ------------------------------------------------------------------------------ products

  // Products of a stage with kAtOnce matrices of columns from number n0 on.
  OTLOSS_DEVICE void multiply(const TileStage& step, int n0, float (&sum)[kAtOnce][4]) const {
    constexpr int kX = kTensorRows * kPiece, kY = kTensorColumns * kPiece;  // halves of a piece
    // The row that this lane gives of the four matrices of a load: for x (0, 0), (8, 0), (0, 8),
    // (8, 8) in points and coordinates, for y (0, 0), (0, 8), (8, 0), (8, 8).
    const int matrix = lane_ / 8, row = lane_ % 8;
    const uint16_t* x =
        rows_of(step) + matrix / 2 * kPlanes * kX + (row_ + matrix % 2 * 8 + row) * kPiece;
    const uint16_t* y =
        columns_of(step) + matrix % 2 * kPlanes * kY + (8 * n0 + matrix / 2 * 8 + row) * kPiece;
    const int depths = depth_of(step.chunk) / static_cast<int>(kMmaDepth);
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
      for (int q = 0; q < 4; ++q) sum[n][q] = 0;
#pragma unroll 1
    for (int s = 0; s < depths; ++s, x += 2 * kPlanes * kX, y += 2 * kPlanes * kY) {
      uint32_t high_x[4], high_y[kAtOnce / 2][4];
      block_.load_matrices(x, high_x);
      load_columns(y, high_y);
      multiply_add(high_x, high_y, sum);
      if constexpr (kLow) {
        uint32_t low_x[4], low_y[kAtOnce / 2][4];
        load_columns(y + kY, low_y);
        multiply_add(high_x, low_y, sum);
        block_.load_matrices(x + kX, low_x);
        multiply_add(low_x, high_y, sum);
      }
    }
  }

  // sums += products of a stage, or = for the first chunk.
  OTLOSS_DEVICE void add_chunk(const TileStage& step, float (&sums)[kN][4]) const {
#pragma unroll
    for (int n0 = 0; n0 < kN; n0 += kAtOnce) {
      float part[kAtOnce][4];
      multiply(step, n0, part);
#pragma unroll
      for (int n = 0; n < kAtOnce; ++n)
#pragma unroll
        for (int q = 0; q < 4; ++q)
          sums[n0 + n][q] = step.chunk == 0 ? part[n][q] : sums[n0 + n][q] + part[n][q];
    }
  }

  // 16 points at a time.
  template <int kCount>
  OTLOSS_DEVICE void load_columns(const uint16_t* from, uint32_t (&to)[kCount][4]) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) block_.load_matrices(from + i * 16 * kPiece, to[i]);
  }

  OTLOSS_DEVICE void multiply_add(const uint32_t (&x)[4], const uint32_t (&y)[kAtOnce / 2][4],
                                  float (&sum)[kAtOnce][4]) const {
#pragma unroll
    for (int n = 0; n < kAtOnce; ++n)
      block_.multiply_add(sum[n], x, y[n / 2][n % 2 * 2], y[n / 2][n % 2 * 2 + 1]);
  }

  OTLOSS_DEVICE void finish(const TileStage& step, const float (&sums)[kN][4]) {
    const float* extra = extra_of(step) + 2 * (lane_ % 4);
    float hy[Layout::kColumns] = {};
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c)
      if (kNorms) hy[c] = extra[kTensorColumns + Layout::column(c)];
    for_entries<Layout>([&](int r, int c) { e_.cost[r][c] = sums[c / 2][r * 2 + c % 2]; });
    finish_products<Cost>(p_, norms_, hy, unscale_, e_);
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) e_.G[c] = extra[Layout::column(c)];
  }

  static constexpr int kRowBytes = 2 * kPlanes * kTensorRows;  // of a coordinate
  static constexpr int kColumnBytes = 2 * kPlanes * kTensorColumns;

  Block& block_;
  const RowTiles<float>& p_;
  const TensorStages stages_;
  const int padded_;      // coordinates
  const int chunks_;      // of them
  const int row_, lane_;  // row_: of this warp in the block
  const float unscale_;   // of the products
  Entries e_;
  const RowNorms<float, Layout> norms_;
};

}  // namespace otloss::cuda
