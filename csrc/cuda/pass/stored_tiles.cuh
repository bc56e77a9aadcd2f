// Tiles of costs that stand in global memory. A warp has a tile; neighbouring lanes read
// neighbouring costs, whether the rows of the tiles are the matrix's rows or its columns, and all
// loads of a tile are on their way at once.
#pragma once

#include <limits>

#include "cuda/pass/tiles.cuh"

namespace otloss::cuda {

// Tiles of 8 rows and 128 columns of the matrix.
struct StoredRows {
  static constexpr int kRows = kTileRows, kColumns = 4, kLanes = kWarp;
  static constexpr int kWarpRows = kRows, kWarpColumns = kColumns * kWarp;
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
  static constexpr int kWarps = kSolveThreads / kWarp;
  static_assert(kStreamedRows % Layout::kWarpRows == 0, "whole tiles");

  OTLOSS_DEVICE StoredTileMaker(Block& block, const RowTiles<T>& tiles)
      : block_(block), p_(tiles), warp_(block.thread() / kWarp), lane_(block.thread() % kWarp) {}

  // As of the other makers.
  OTLOSS_DEVICE int most_rows() const { return kStreamedRows; }
  OTLOSS_DEVICE int warps() const { return kWarps; }
  OTLOSS_DEVICE int warp_of_group() const { return warp_; }

  template <class Use>
  OTLOSS_DEVICE void run(int64_t first, int rows, Use&& use) const {
    block_.sync();  // what is used has been set, and is read afterwards
    for (int64_t j = p_.begin + warp_ * Layout::kWarpColumns; j < p_.end;
         j += kWarps * Layout::kWarpColumns)
      for (int row = 0; row < rows; row += Layout::kWarpRows) {
        Entries e;
        load(first, row, j, e);
        use(e);
      }
    block_.sync();
  }

  // The tile of a warp at row `row` of those from `first` on. Entries past the end repeat the last
  // ones. Of points that count all costs are finite.
  OTLOSS_DEVICE void load(int64_t first, int row, int64_t j, Entries& e) const {
    constexpr bool kOwnRows = Layout::kLanes == 1;
    e.place(p_, first, row + (kOwnRows ? lane_ : 0), j + (kOwnRows ? 0 : lane_));
    const auto inside = [](int64_t at, int64_t end) { return at < end ? at : end - 1; };
    for_entries<Layout>([&](int r, int c) {
      e.cost[r][c] = p_.C[Layout::at(inside(e.row + Layout::row(r), p_.last),
                                     inside(e.column + Layout::column(c), p_.end), p_.width)];
    });
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) {
      const int64_t j = e.column + Layout::column(c);
      e.G[c] = j < p_.end ? p_.G[j] : static_cast<T>(kLog2Zero);
    }
    for_entries<Layout>([&](int r, int c) {
      T& cost = e.cost[r][c];
      cost = fabs(cost) <= std::numeric_limits<T>::max() ? cost : T(0);
    });
  }

 private:
  Block& block_;
  const RowTiles<T>& p_;
  const int warp_, lane_;
};

}  // namespace otloss::cuda
