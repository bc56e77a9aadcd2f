// Tiles of costs by multiply-adds: few coordinates, and float64.
//
// A warp has kTileRows rows, all warps the same columns. Those come by tiles through shared memory,
// kChunk coordinates at a time, copied in the background while the ones before are used (two
// stages). Lane l has kVector neighbouring columns of a tile, whose kTileRows * kVector sums over
// the coordinates stay in registers: per coordinate one 16-byte load of shared memory, kTileRows
// values that all lanes share (from L1), and kTileRows * kVector multiply-adds.
#pragma once

#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {

template <typename T>
struct FmaLayout {
  static constexpr int kRows = kTileRows, kColumns = kVector<T>, kLanes = kWarp;
  static OTLOSS_HOST_DEVICE constexpr int row(int r) { return r; }
  static OTLOSS_HOST_DEVICE constexpr int column(int c) { return c; }
};

template <class Cost, bool kDifference, typename T, class Block>
class TileMaker {
 public:
  using Layout = FmaLayout<T>;
  using Entries = TileEntries<T, Layout>;
  static constexpr int kWarps = kSolveThreads / kWarp, kColumns = kVector<T>;
  static constexpr int kWidth = kWarp * kColumns;  // columns of a tile
  static constexpr int kRows = kWarps * kTileRows;
  static constexpr int kSharing = 1;

  // stages: where they are in shared memory, in bytes.
  OTLOSS_DEVICE TileMaker(Block& block, const RowTiles<T>& tiles, int64_t stages = kArgumentBytes)
      : block_(block),
        p_(tiles),
        stages_(reinterpret_cast<T*>(block.template shared<unsigned char>() + stages)),
        chunks_(kDifference ? 1 : static_cast<int>(ceil_div(tiles.d, kChunk))),
        lane_(block.thread() % kWarp),
        e_(rows_of(block, tiles)),
        norms_(tiles, e_) {}

  OTLOSS_DEVICE int64_t row() const { return e_.row; }

  template <class Use>
  OTLOSS_DEVICE void run(Use&& use) {
    const int chunks = kDifference ? 1 : chunks_;  // known where it can be
    const auto work = [&](const TileStage& step) {
      if (e_.row >= p_.last) return;  // the same for the whole warp
      if (step.chunk == 0) for_entries<Layout>([&](int r, int c) { e_.cost[r][c] = T(0); });
      const T* stage = stage_of(step) + lane_ * kColumns;
      accumulate(step.chunk, stage);
      if (step.chunk < chunks - 1) return;
      e_.column = step.column + lane_ * kColumns;
      finish(stage + kChunk * kWidth);
      use(e_);
    };
    for_stages<2, kWidth>(
        block_, p_.begin, p_.end, chunks, [&](const TileStage& s) { load(s); }, work);
  }

 private:
  static constexpr int kChunk = kFmaChunk;
  static constexpr bool kNorms = !kDifference && !Cost::kUnitNorm;
  static_assert(kDirectDims <= kChunk, "differences come in one chunk");
  static_assert(kPackedAlign % kWidth == 0 && kPackedAlign % kTileRows == 0, "they are there");
  static_assert(2 * (kChunk + 2) * kWidth * sizeof(T) == kFmaRoom);

  OTLOSS_DEVICE static Entries rows_of(Block& block, const RowTiles<T>& p) {
    Entries e;
    e.set_rows(p, p.first + block.thread() / kWarp * kTileRows);
    return e;
  }
  // (kChunk, kWidth) coordinates, (kWidth,) G, (kWidth,) norms.
  OTLOSS_DEVICE T* stage_of(const TileStage& step) const {
    return stages_ + step.slot * ((kChunk + 2) * kWidth);
  }
  // Coordinates of chunk `chunk`.
  OTLOSS_DEVICE int coordinates(int chunk) const {
    const int64_t left = p_.d - static_cast<int64_t>(chunk) * kChunk;
    return static_cast<int>(left < kChunk ? left : kChunk);
  }

  // Starts copying a stage: some coordinates of a tile of columns, their G and norms.
  OTLOSS_DEVICE void load(const TileStage& step) const {
    const int count = coordinates(step.chunk), warp = block_.thread() / kWarp;
    const int64_t j = step.column + lane_ * kColumns, stride = p_.columns.stride;
    const T* z = p_.columns.z + static_cast<int64_t>(step.chunk) * kChunk * stride + j;
    T* const to = stage_of(step) + lane_ * kColumns;
    for (int k = warp; k < count; k += kWarps) block_.copy_async(to + k * kWidth, z + k * stride);
    if (warp == 0) block_.copy_async(to + kChunk * kWidth, p_.G + j);
    if (kNorms && warp == kWarps - 1)
      block_.copy_async(to + (kChunk + 1) * kWidth, p_.columns.norm + j);
  }

  // Adds x_rk y_ck, or the squared differences, over the coordinates k of a stage.
  OTLOSS_DEVICE void accumulate(int chunk, const T* y) {
    const int count = coordinates(chunk);
    const int64_t stride = p_.rows.stride;
    const T* x = p_.rows.z + static_cast<int64_t>(chunk) * kChunk * stride + e_.row;
#pragma unroll 2
    for (int k = 0; k < count; ++k, x += stride, y += kWidth) {
      const Vector<T> own = *reinterpret_cast<const Vector<T>*>(y);
      T xs[kTileRows];
#pragma unroll
      for (int v = 0; v < kTileRows; v += kColumns) {
        const Vector<T> part = block_.load_constant(reinterpret_cast<const Vector<T>*>(x + v));
#pragma unroll
        for (int c = 0; c < kColumns; ++c) xs[v + c] = part.at[c];
      }
      for_entries<Layout>([&](int r, int c) {
        const T difference = xs[r] - own.at[c];
        e_.cost[r][c] += kDifference ? difference * difference : xs[r] * own.at[c];
      });
    }
  }

  // From the sums to costs. `extra`: G and norms of the thread's columns.
  OTLOSS_DEVICE void finish(const T* extra) {
    if constexpr (kDifference) {
      for_entries<Layout>(
          [&](int r, int c) { e_.cost[r][c] = Cost::from_difference(e_.cost[r][c]); });
    } else {
      Vector<T> hy{};
      if constexpr (kNorms) hy = *reinterpret_cast<const Vector<T>*>(extra + kWidth);
      finish_products<Cost>(p_, norms_, hy.at, T(1), e_);
    }
    const Vector<T> G = *reinterpret_cast<const Vector<T>*>(extra);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) e_.G[c] = G.at[c];
  }

  Block& block_;
  const RowTiles<T>& p_;
  T* const stages_;   // (2, kChunk + 2, kWidth) shared
  const int chunks_;  // of coordinates
  const int lane_;
  Entries e_;
  const RowNorms<T, Layout> norms_;
};

}  // namespace otloss::cuda
