// Sums over the rows of a cost matrix that is made from the points on the way and never stored.
//
// A block has some of the rows and passes over all columns, so that its sums need nobody else, or
// blocks share rows and each passes over a part of the columns. Tiles of costs come from a maker
// (tiles.cuh); per entry there is one exponential, and a few shuffles add up the rows of a tile.
//
// As in the dense pass no maximum is subtracted: the last potential is the guess that keeps the
// exponents near 0. Points whose sums leave the trusted range get their maximum from a second
// sweep and their sum from a third. Sums of a tile are in the working precision, sums over tiles in
// double.
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
template <class F>
OTLOSS_DEVICE void dispatch_tiles(CostKind kind, int64_t d, F&& function) {
  const bool difference = d <= kDirectDims;
  dispatch_cost(kind, [&](auto cost) {
    if constexpr (decltype(cost)::kUnitNorm)
      function(cost, std::false_type{});
    else
      difference ? function(cost, std::true_type{}) : function(cost, std::false_type{});
  });
}

// For tensor cores: function(Cost, std::bool_constant<whether with low halves>).
template <class F>
OTLOSS_DEVICE void dispatch_tensor_tiles(CostKind kind, TileKind made_by, F&& function) {
  const bool low = made_by == TileKind::kTensor;
  dispatch_cost(kind, [&](auto cost) {
    low ? function(cost, std::true_type{}) : function(cost, std::false_type{});
  });
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

// Sums of a block's rows over all tiles of its columns. Not inlined: each is a few hundred
// instructions, called a few times per pass.
template <class Maker, class Terms, class Block>
OTLOSS_NOINLINE void sum_rows(Block block, const typename Terms::Arguments& p) {
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

template <class Maker, typename T, class Block>
OTLOSS_DEVICE void sum_rows_of(Block& block, const RowSums<T>& args) {
  if (args.what == RowSum::kPlan)
    sum_rows<Maker, RowTerms<T, true>>(block, args);
  else
    sum_rows<Maker, RowTerms<T, false>>(block, args);
}

template <bool kTensor, typename T, class Block>
OTLOSS_DEVICE void reduce_rows(Block& block, const RowSums<T>& given) {
  const RowSums<T>& args = share_arguments(block, given, given.sums - kArgumentBytes);
  const RowTiles<T>& tiles = args.tiles;
  if constexpr (kTensor)
    dispatch_tensor_tiles(tiles.kind, tiles.made_by, [&](auto cost, auto low) {
      constexpr bool kLow = decltype(low)::value;
      sum_rows_of<TensorTileMaker<decltype(cost), RowSumShape, kLow, Block>>(block, args);
    });
  else
    dispatch_tiles(tiles.kind, tiles.d, [&](auto cost, auto difference) {
      constexpr bool kDifference = decltype(difference)::value;
      sum_rows_of<TileMaker<decltype(cost), kDifference, T, Block>>(block, args);
    });
}

// ------------------------------------------------------------------------------------- softmin

// The rows of a sweep, shared by the blocks of a group, which have a part of the columns each.
template <typename T>
struct SharedRows {
  const T* weight;   // (rows,)
  T* F;              // (rows,) potentials in base 2; may be written by other blocks
  T* s;              // (rows,)
  int own, own_end;  // rows that this block updates
  T* scratch;        // (kSoftminVectors, parts, length)
  int64_t length;    // of a vector
};

constexpr int kSoftminVectors = 4;

// update(): exact potentials from the guess F, F_i -= log2 sum_j exp2(F_i + G_j - k C_ij), and
// those sums, s, of the block's own rows. Rows of weight 0 get F = 0, s = 1. All blocks of the
// group call it together; they see the same sums, so they agree on what has to be made again.
template <typename T, class Block, bool kTensor>
class Softmin {
 public:
  OTLOSS_DEVICE Softmin(Block& block, Team<Block, kSolveThreads>& group, const RowSums<T>& sweep,
                        const SharedRows<T>& rows)
      : block_(block),
        group_(group),
        sweep_(sweep),
        p_(rows),
        rows_(static_cast<int>(sweep.tiles.last - sweep.tiles.first)),
        guess_(vector(0, group.rank())) {
    sweep_.tiles.F = guess_;
  }

  // (rows,) sums of exp2(t) C over this block's part of the columns.
  OTLOSS_NOINLINE const T* costs() {
    guess();
    sweep_.what = RowSum::kCost, sweep_.out = vector(kSums, group_.rank());
    reduce_rows<kTensor>(block_, sweep_);
    return sweep_.out;
  }

  OTLOSS_NOINLINE void update() {
    guess();
    reduce(RowSum::kPlan, kSums);
    const bool again = any_untrusted();
    if (again) {
      reduce(RowSum::kLargest, kLargest);
      for (int i = block_.thread(); i < rows_; i += kSolveThreads)
        if (untrusted(i)) guess_[i] -= joined(RowSum::kLargest, kLargest, i);
      block_.sync();
      reduce(RowSum::kPlan, kAgain);
    }
    for (int i = p_.own + block_.thread(); i < p_.own_end; i += kSolveThreads) {
      const T before = p_.F[i], sum = joined(RowSum::kPlan, kSums, i);
      p_.s[i] = sum, p_.F[i] = before - fast_log2(sum);
      if (again && untrusted(i)) {
        p_.F[i] = guess_[i] - fast_log2(joined(RowSum::kPlan, kAgain, i));
        const T t = before - p_.F[i], limit = static_cast<T>(kExp2Limit);
        p_.s[i] = fast_exp2(t < limit ? t : limit);
      }
      if (!(p_.weight[i] > T(0))) p_.F[i] = T(0), p_.s[i] = T(1);
    }
    block_.sync();
  }

 private:
  // Vectors of scratch, one of each for every part of the columns.
  enum Stored { kGuess, kSums, kLargest, kAgain };
  static_assert(kAgain + 1 == kSoftminVectors);

  OTLOSS_DEVICE T* vector(int stored, int part) const {
    return p_.scratch + (stored * group_.size() + part) * p_.length;
  }

  // The potentials of all rows, before anybody updates them.
  OTLOSS_DEVICE void guess() {
    for (int i = block_.thread(); i < rows_; i += kSolveThreads) guess_[i] = group_.load(p_.F + i);
    block_.sync();
  }

  // A sweep of all blocks of the group.
  OTLOSS_DEVICE void reduce(RowSum what, Stored stored) {
    sweep_.what = what, sweep_.out = vector(stored, group_.rank());
    reduce_rows<kTensor>(block_, sweep_);
    group_.sync();
  }

  // Row i of the parts' sums; the same in all blocks.
  OTLOSS_DEVICE T joined(RowSum what, Stored stored, int i) const {
    double total = static_cast<double>(group_.load(vector(stored, 0) + i));
    for (int part = 1; part < group_.size(); ++part)
      total = join_sums(what, total, static_cast<double>(group_.load(vector(stored, part) + i)));
    return static_cast<T>(total);
  }

  OTLOSS_DEVICE bool untrusted(int i) const {
    return p_.weight[i] > T(0) && !trusted(joined(RowSum::kPlan, kSums, i));
  }
  OTLOSS_DEVICE bool any_untrusted() {
    int* const flag = reinterpret_cast<int*>(block_.template shared<unsigned char>() + sweep_.sums);
    if (block_.thread() == 0) *flag = 0;
    block_.sync();
    for (int i = block_.thread(); i < rows_; i += kSolveThreads)
      if (untrusted(i)) *flag = 1;
    block_.sync();
    const bool any = *flag != 0;
    block_.sync();
    return any;
  }

  Block& block_;
  Team<Block, kSolveThreads>& group_;
  RowSums<T> sweep_;
  const SharedRows<T> p_;
  const int rows_;
  T* const guess_;  // (rows,)
};

}  // namespace otloss::cuda
