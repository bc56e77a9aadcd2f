// V 1 and V y by tensor cores for the gradients of points, see point_sums_launch.cuh.
//
// A warp has 16 rows and all columns of a tile, so that its entries of V are, as they stand in
// registers, what the product with y takes from the left: the fragments of costs (16 x 8 each) and
// of the left side (16 x 16) give a lane the same rows and columns. The points of the columns are
// still in shared memory, or come a second time; ldmatrix transposes them on the way.
//
// V is split into halves like the points, with a power of two for each row of a tile, and three
// products give V y. Up to kKept coordinates their sums over all tiles stay in registers; beyond,
// those over a tile are added to global memory, where each entry belongs to one lane. V 1 comes
// from the entries before they are split.
#pragma once

#include "cuda/pass/tensor_tiles.cuh"

namespace otloss::cuda {

template <class Cost, bool kLow, class Weights, class Block>
class TensorSideSums {
 public:
  using Shape = SideSumShape;
  using Maker = TensorTileMaker<Cost, Shape, kLow, Block>;
  using Entries = typename Maker::Entries;

  OTLOSS_DEVICE TensorSideSums(Block& block, const RowTiles<float>& tiles, const Weights& weights,
                               int64_t batch, float* out)
      : block_(block),
        p_(tiles),
        weights_(weights),
        batch_(batch),
        out_(out),
        lane_(block.thread() % kWarp),
        row_(block.thread() / kWarp * Shape::kWarpRows + lane_ / 4),
        rows_(static_cast<int>(tiles.last - tiles.first)) {}

  // Rows [first, last) of the tiles, at most Shape::kRows; out (rows, d + 1): V y and V 1.
  OTLOSS_DEVICE void run() {
    Maker maker(block_, p_);
    kept_all_ = split_depth(p_.d) <= kKept;
    maker.run(
        p_.first, rows_, [&](const Entries& e) { weigh(e); },
        [&](const TensorColumns& columns) { add_products(columns); });
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const float sum = joined(sum_[r]);
      if (lane_ % kLanes == 0 && row_ + 8 * r < rows_)
        out_[(row_ + 8 * r) * (p_.d + 1) + p_.d] = sum;
    }
    if (kept_all_)
#pragma unroll
      for (int s = 0; s < kSteps; ++s) add(kept_[s], 2 * s * kPiece, true);
  }

 private:
  static constexpr int kRows = Entries::kRows, kColumns = Entries::kColumns;
  static constexpr int kLanes = Entries::Layout::kLanes;
  static constexpr int kDepths = Shape::kWarpColumns / static_cast<int>(kMmaDepth);
  static constexpr int kPlanes = kLow ? 2 : 1, kPiece = 8;
  static constexpr int kKept = 64, kSteps = kKept / (2 * kPiece);  // coordinates, products
  static_assert(Shape::kColumnWarps == 1 && Shape::kM == 1, "see the header comment");

  // Over the lanes that have the same rows.
  template <typename F>
  OTLOSS_DEVICE float join(float value, F&& function) const {
    for (int mask = kLanes / 2; mask > 0; mask /= 2)
      value = function(value, block_.shuffle_xor(value, mask));
    return value;
  }
  OTLOSS_DEVICE float joined(float value) const {
    return join(value, [](float x, float y) { return x + y; });
  }

  // V of a tile, in halves.
  OTLOSS_DEVICE void weigh(const Entries& e) {
    typename Entries::Values V;
    weights_(e, batch_, V);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float largest = 0, sum = 0;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const float v = Cost::gradient_weight(V[r][c], e.cost[r][c]);
        V[r][c] = v;
        sum += v;
        largest = Max::join(largest, v < 0 ? -v : v);
      }
      sum_[r] += sum;
      largest = join(largest, [](float x, float y) { return Max::join(x, y); });
      const float scale = row_scale(largest);
      unscale_[r] = 1 / scale * (1 / p_.columns.split.scale);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) V[r][c] *= scale;
    }
#pragma unroll
    for (int k = 0; k < kDepths; ++k)
#pragma unroll
      for (int matrix = 0; matrix < 4; ++matrix)
        split(&V[matrix % 2][4 * k + 2 * (matrix / 2)], &high_[k][matrix], &low_[k][matrix]);
  }

  // Two neighbouring entries.
  OTLOSS_DEVICE static void split(const float* V, uint32_t* high, uint32_t* low) {
    const uint16_t first = to_half(V[0]), second = to_half(V[1]);
    *high = words(first, second);
    if (kLow) *low = words(to_half(V[0] - from_half(first)), to_half(V[1] - from_half(second)));
  }

  // A power of two that brings the largest entry to almost 2^15, and 1 / it is a normal number.
  OTLOSS_DEVICE static float row_scale(float largest) {
    constexpr int kReach = 14, kMost = 60;
    const int exponent = static_cast<int>(bit_cast<uint32_t>(largest) >> 23) - 127;
    const int power = kReach - exponent;
    const int kept = power < -kMost ? -kMost : power > kMost ? kMost : power;
    return bit_cast<float>(static_cast<uint32_t>(kept + 127) << 23);
  }

  OTLOSS_DEVICE static uint32_t words(uint16_t first, uint16_t second) {
    return static_cast<uint32_t>(first) | static_cast<uint32_t>(second) << 16;
  }

  // V y for some coordinates, 16 at a time.
  OTLOSS_DEVICE void add_products(const TensorColumns& columns) {
    constexpr int kPlane = Shape::kColumns * kPiece;  // halves
    // Matrices of a load: points 0 to 7 and 8 to 15 of 8 coordinates, then of the next 8.
    const int matrix = lane_ / 8;
    const uint16_t* y =
        columns.z + matrix / 2 * kPlanes * kPlane + (matrix % 2 * 8 + lane_ % 8) * kPiece;
    const auto product = [&](const uint16_t* from, float (&sum)[2][4]) {
#pragma unroll
      for (int k = 0; k < kDepths; ++k) {
        const uint16_t* points = from + k * static_cast<int>(kMmaDepth) * kPiece;
        uint32_t high[4], low[4];
        block_.template load_matrices<true>(points, high);
        multiply_add(high_[k], high, sum);
        if constexpr (kLow) {
          multiply_add(low_[k], high, sum);
          block_.template load_matrices<true>(points + kPlane, low);
          multiply_add(high_[k], low, sum);
        }
      }
#pragma unroll
      for (int part = 0; part < 2; ++part)
#pragma unroll
        for (int q = 0; q < 4; ++q) sum[part][q] *= unscale_[q / 2];
    };
    if (kept_all_) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        if (2 * s * kPiece >= columns.depth) continue;
        float sum[2][4] = {};
        product(y + 2 * s * kPlanes * kPlane, sum);
#pragma unroll
        for (int part = 0; part < 2; ++part)
#pragma unroll
          for (int q = 0; q < 4; ++q) kept_[s][part][q] += sum[part][q];
      }
      return;
    }
#pragma unroll 1
    for (int k0 = 0; k0 < columns.depth; k0 += 2 * kPiece, y += 2 * kPlanes * kPlane) {
      float sum[2][4] = {};
      product(y, sum);
      add(sum, columns.begin + k0, columns.first);
    }
  }

  OTLOSS_DEVICE void multiply_add(const uint32_t (&V)[4], const uint32_t (&y)[4],
                                  float (&sum)[2][4]) const {
    block_.multiply_add(sum[0], V, y[0], y[1]);
    block_.multiply_add(sum[1], V, y[2], y[3]);
  }

  OTLOSS_DEVICE void add(const float (&sum)[2][4], int begin, bool first) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (row_ + 8 * r >= rows_) continue;
      float* const out = out_ + (row_ + 8 * r) * (p_.d + 1);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const int k = begin + c / 2 * 8 + 2 * (lane_ % 4) + c % 2;
        if (k >= p_.d) continue;
        const float part = sum[c / 2][2 * r + c % 2];
        out[k] = first ? part : out[k] + part;
      }
    }
  }

  Block& block_;
  const RowTiles<float>& p_;
  const Weights& weights_;
  const int64_t batch_;
  float* const out_;
  const int lane_, row_, rows_;  // row_: of this lane, the first
  bool kept_all_ = false;        // whether kept_ has all coordinates
  float sum_[kRows] = {};        // V 1, of this lane's columns
  float kept_[kSteps][2][4] = {};
  float unscale_[kRows];
  uint32_t high_[kDepths][4], low_[kDepths][4];
};

}  // namespace otloss::cuda
