// Sums over the rows of a cost matrix, stored or made from the points on the way.
//
// A block has some of the rows and passes over all columns, or over a part of them. Tiles of costs
// come from a maker (tiles.cuh); per entry there is one exponential, and a few shuffles add up the
// rows of a tile. Sums of a tile are in the working precision, sums over tiles in double.
#pragma once

#include <limits>
#include <type_traits>

#include "core/costs.h"
#include "core/math.h"
#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"
#include "cuda/pass/fma_tiles.cuh"
#include "cuda/pass/stored_tiles.cuh"
#include "cuda/pass/tensor_tiles.cuh"
#include "cuda/solve/plan.h"

namespace otloss::cuda {

// Who makes costs, for kernels of their own each.
template <class CostOf, bool kDifference>
struct FmaTiles {
  using Cost = CostOf;
  template <typename T, class Block>
  using Maker = TileMaker<Cost, kDifference, T, Block>;
};
template <class CostOf, bool kLowHalves>
struct TensorTiles {
  using Cost = CostOf;
  static constexpr bool kLow = kLowHalves;
  template <typename T, class Block>
  using Maker = TensorTileMaker<Cost, RowSumShape, kLow, Block>;
};

struct StoredTiles {};  // a maker for each side

// Calls function(FmaTiles) for costs of d coordinates.
template <class F>
void dispatch_tiles(CostKind kind, int64_t d, F&& function) {
  dispatch_cost(kind, [&](auto cost) {
    using Cost = decltype(cost);
    if constexpr (Cost::kUnitNorm)
      function(FmaTiles<Cost, false>{});
    else
      d <= kDirectDims ? function(FmaTiles<Cost, true>{}) : function(FmaTiles<Cost, false>{});
  });
}

// Calls function(TensorTiles).
template <class F>
void dispatch_tensor_tiles(CostKind kind, TileKind made_by, F&& function) {
  dispatch_cost(kind, [&](auto cost) {
    using Cost = decltype(cost);
    made_by == TileKind::kTensor ? function(TensorTiles<Cost, true>{})
                                 : function(TensorTiles<Cost, false>{});
  });
}

// ------------------------------------------------------------------------------------ row sums

// What is added up over the columns j of row i, with t_ij = F_i + G_j - k C_ij.
enum class RowSum {
  kNone,     // nothing
  kPlan,     // exp2(t_ij)
  kLargest,  // the largest t_ij
  kCost      // exp2(t_ij) C_ij
};

// S: the type of sums and factors.
template <typename T, typename S = T>
struct RowSums {
  RowTiles<T> tiles;
  RowSum what;
  int side;      // 0: the rows are the problem's, 1: its columns
  const S* x;    // (columns,) factors (ProductTerms), or null: 1
  S* out;        // (last - first,)
  int64_t sums;  // bytes of shared memory before the streamed_sums doubles; the arguments' precede
};

OTLOSS_DEVICE double join_sums(RowSum what, double x, double y) {
  return what == RowSum::kLargest ? Max::join(x, y) : Sum::join(x, y);
}

// Joined over the lanes that have the same rows: lane l of them gets row l / (kLanes / kRows).
template <RowSum kWhat, typename T, class Layout, class Block>
OTLOSS_DEVICE T tile_sum(Block& block, const TileEntries<T, Layout>& e) {
  using Join = std::conditional_t<kWhat == RowSum::kLargest, Max, Sum>;
  T sums[Layout::kRows];
#pragma unroll
  for (int r = 0; r < Layout::kRows; ++r) {
    const T F = e.potential(r);
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) {
      const T t = e.exponent(F, r, c);
      T term = t;
      if constexpr (kWhat == RowSum::kPlan) term = fast_exp2_unclamped(t);
      if constexpr (kWhat == RowSum::kCost)  // a clamped exponential stands for 0
        term = t > static_cast<T>(-kExp2Limit) ? fast_exp2(t) * e.cost[r][c] : T(0);
      sums[r] = c == 0 ? term : Join::join(sums[r], term);
    }
  }
  return scatter_reduce<Join, Layout::kLanes>(block, sums);
}

// What add_rows adds up. kPlan has one of its own, whose registers need not do for the others.
template <typename T, bool kPlan>
class RowTerms {
 public:
  using Arguments = RowSums<T>;
  using Value = T;

  OTLOSS_DEVICE explicit RowTerms(const Arguments& p) : what_(kPlan ? RowSum::kPlan : p.what) {}

  OTLOSS_DEVICE T start() const {
    return what_ == RowSum::kLargest ? std::numeric_limits<T>::lowest() : T(0);
  }
  OTLOSS_DEVICE double join(double x, double y) const { return join_sums(what_, x, y); }

  template <class Block, class Entries>
  OTLOSS_DEVICE T of_tile(Block& block, const Entries& e) const {
    return kPlan                    ? tile_sum<RowSum::kPlan>(block, e)
           : what_ == RowSum::kCost ? tile_sum<RowSum::kCost>(block, e)
                                    : tile_sum<RowSum::kLargest>(block, e);
  }

 private:
  const RowSum what_;
};

// The sums over a plan times the factors x of its columns, for gradients.
//
// F_i + G_j is added first and costs do not depend on which side is first, so that both sides get
// the same P_ij, bit for bit, as if it was kept: the linear system of the implicit gradient stays
// symmetric. Tensor cores would not do that, nor are they used.
template <typename T, typename S, class Layout>
class ProductTerms {
 public:
  using Arguments = RowSums<T, S>;
  using Value = S;

  OTLOSS_DEVICE explicit ProductTerms(const Arguments& p) : p_(p) {}

  OTLOSS_DEVICE S start() const { return S(0); }
  OTLOSS_DEVICE double join(double x, double y) const { return x + y; }

  // Joined over the warp as in tile_sum.
  template <class Block>
  OTLOSS_DEVICE S of_tile(Block& block, const TileEntries<T, Layout>& e) {
    load(e.column);
    S sums[Layout::kRows];
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
      const T F = e.potential(r);
      sums[r] = S(0);
#pragma unroll
      for (int c = 0; c < Layout::kColumns; ++c) {
        const T t = (F + e.G[c]) - e.k * e.cost[r][c];
        // A clamped exponential stands for 0, so that padding gets exactly 0.
        T p = t > static_cast<T>(-kExp2Limit) ? fast_exp2(t) : T(0);
        if (p_.what == RowSum::kCost) p = p != T(0) ? p * e.cost[r][c] : T(0);
        sums[r] += static_cast<S>(p) * x_[c];
      }
    }
    return scatter_reduce<Sum, Layout::kLanes>(block, sums);
  }

 private:
  // x of the thread's columns, which stay while its tile does.
  OTLOSS_DEVICE void load(int64_t first) {
    if (first == column_) return;
    column_ = first;
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) {
      const int64_t j = first + Layout::column(c);
      x_[c] = j < p_.tiles.end ? p_.x != nullptr ? p_.x[j] : S(1) : S(0);
    }
  }

  const Arguments& p_;
  int64_t column_ = -1;
  S x_[Layout::kColumns];
};

// Sums of a block's rows over all tiles of its columns.
template <class Maker, class Terms, class Block>
OTLOSS_DEVICE void add_rows(Block& block, const typename Terms::Arguments& p) {
  using Layout = typename Maker::Layout;
  constexpr int kLanes = Layout::kLanes / Layout::kRows;  // of a row, after the reduction
  const auto& tiles = p.tiles;
  double* const sums = reinterpret_cast<double*>(block.template shared<unsigned char>() + p.sums);
  Maker maker(block, tiles);
  const int lane = block.thread() % Layout::kLanes, most = maker.most_rows();
  for (int64_t first = tiles.first; first < tiles.last; first += most) {
    const int rows = static_cast<int>(tiles.last - first < most ? tiles.last - first : most);
    Terms terms(p);
    for (int s = block.thread(); s < maker.warps() * most; s += kSolveThreads)
      sums[s] = static_cast<double>(terms.start());
    maker.run(first, rows, [&](const typename Maker::Entries& e) {
      const typename Terms::Value joined = terms.of_tile(block, e);
      if (lane % kLanes != 0) return;
      const int row = e.local + Layout::row(lane / kLanes);
      double& total = sums[maker.warp_of_group() * most + row];
      total = terms.join(total, static_cast<double>(joined));
    });
    for (int row = block.thread(); row < rows; row += kSolveThreads) {
      double total = sums[row];
      for (int w = 1; w < maker.warps(); ++w) total = terms.join(total, sums[w * most + row]);
      p.out[first - tiles.first + row] = static_cast<typename Terms::Value>(total);
    }
    block.sync();
  }
}

}  // namespace otloss::cuda
