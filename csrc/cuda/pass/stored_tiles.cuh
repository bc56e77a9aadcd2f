// Tiles of costs that stand in global memory. A warp has a tile; neighbouring lanes read
// neighbouring costs, whether the rows of the tiles are the matrix's rows or its columns, and all
// loads of a tile are on their way at once.
#pragma once

#include <limits>

#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {

// Tiles of 8 rows and 128 columns of the matrix, 64 in double.
template <typename T>
struct StoredRows {
  static constexpr int kRows = kTileRows, kColumns = kVector<T>, kLanes = kWarp;
  static constexpr int kWarpRows = kRows, kWarpColumns = kColumns * kWarp, kSharing = 1;
  static OTLOSS_HOST_DEVICE constexpr int row(int r) { return r; }
  static OTLOSS_HOST_DEVICE constexpr int column(int c) { return c * kWarp; }
  static OTLOSS_HOST_DEVICE constexpr int64_t at(int64_t i, int64_t j, int64_t width) {
    return i * width + j;
  }
};

// Rows of the tiles are columns of the matrix, one for each lane.
struct StoredColumns {
  static constexpr int kRows = 1, kColumns = 16, kLanes = 1;
  static constexpr int kWarpRows = kWarp, kWarpColumns = kColumns;
  static constexpr int kSharing = kSolveThreads / kWarp;
  static OTLOSS_HOST_DEVICE constexpr int row(int r) { return r; }
  static OTLOSS_HOST_DEVICE constexpr int column(int c) { return c; }
  static OTLOSS_HOST_DEVICE constexpr int64_t at(int64_t i, int64_t j, int64_t width) {
    return j * width + i;
  }
};

template <class StoredLayout, typename T, class Block>
class StoredTileMaker {
 public:
  using Layout = StoredLayout;
  using Entries = TileEntries<T, Layout>;
  static constexpr int kSharing = Layout::kSharing;  // warps that have the same rows
  static constexpr int kRows = kSolveThreads / kWarp / kSharing * Layout::kWarpRows;
  static_assert(kPackedAlign % (kSharing * Layout::kWarpColumns) == 0, "their G are there");

  OTLOSS_DEVICE StoredTileMaker(Block& block, const RowTiles<T>& tiles)
      : p_(tiles), warp_(block.thread() / kWarp), lane_(block.thread() % kWarp) {
    first_ = p_.first + warp_ / kSharing * Layout::kWarpRows;
    e_.set_rows(p_, kOwnRows ? first_ + lane_ : first_);
  }

  OTLOSS_DEVICE int64_t row() const { return e_.row; }

  template <class Use>
  OTLOSS_DEVICE void run(Use&& use) {
    if (first_ >= p_.last) return;
    for (int64_t j = p_.begin + warp_ % kSharing * Layout::kWarpColumns; j < p_.end;
         j += kSharing * Layout::kWarpColumns) {
      load(j);
      use(e_);
    }
  }

 private:
  static constexpr bool kOwnRows = Layout::kLanes == 1;

  // Entries past the end repeat the last ones. Of points that count all costs are finite.
  OTLOSS_DEVICE void load(int64_t j) {
    e_.column = kOwnRows ? j : j + lane_;
    const auto inside = [](int64_t at, int64_t end) { return at < end ? at : end - 1; };
    for_entries<Layout>([&](int r, int c) {
      e_.cost[r][c] = p_.C[Layout::at(inside(e_.row + Layout::row(r), p_.last),
                                      inside(e_.column + Layout::column(c), p_.end), p_.width)];
    });
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) e_.G[c] = p_.G[e_.column + Layout::column(c)];
    for_entries<Layout>([&](int r, int c) {
      T& cost = e_.cost[r][c];
      cost = fabs(cost) <= std::numeric_limits<T>::max() ? cost : T(0);
    });
  }

  const RowTiles<T>& p_;
  const int warp_, lane_;
  int64_t first_;  // row of the warp
  Entries e_;
};

}  // namespace otloss::cuda
