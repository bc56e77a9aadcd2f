// Sums over the rows of a cost matrix that is made from the points on the way and never stored.
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
#include "cuda/pass/tensor_tiles.cuh"
#include "cuda/solve/plan.h"

namespace otloss::cuda {

// Calls function(Cost, std::bool_constant<whether from differences>).
#if defined(__CUDACC__)
#pragma nv_exec_check_disable  // the function may be for the host alone, or for the device
#endif
template <class F>
OTLOSS_HOST_DEVICE void dispatch_tiles(CostKind kind, int64_t d, F&& function) {
  const bool difference = d <= kDirectDims;
  dispatch_cost(kind, [&](auto cost) {
    if constexpr (decltype(cost)::kUnitNorm)
      function(cost, std::false_type{});
    else
      difference ? function(cost, std::true_type{}) : function(cost, std::false_type{});
  });
}

// For tensor cores: function(Cost, std::bool_constant<whether with low halves>).
#if defined(__CUDACC__)
#pragma nv_exec_check_disable
#endif
template <class F>
OTLOSS_HOST_DEVICE void dispatch_tensor_tiles(CostKind kind, TileKind made_by, F&& function) {
  const bool low = made_by == TileKind::kTensor;
  dispatch_cost(kind, [&](auto cost) {
    low ? function(cost, std::true_type{}) : function(cost, std::false_type{});
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

template <typename T>
struct RowSums {
  RowTiles<T> tiles;
  RowSum what;
  int side;      // 0: the rows are the problem's, 1: its columns
  T* out;        // (last - first,)
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

// What sum_rows adds up. kPlan has one of its own, whose registers need not do for the others.
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

// Not inlined: each is a few hundred instructions, called a few times per pass.
template <class Maker, class Terms, class Block>
OTLOSS_NOINLINE void sum_rows(Block block, const typename Terms::Arguments& p) {
  add_rows<Maker, Terms>(block, p);
}

}  // namespace otloss::cuda
