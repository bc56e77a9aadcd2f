// Sums over the rows of a cost matrix, stored or made from the points on the way.
//
// A block has some of the rows and passes over all columns, or over a part of them. Tiles of costs
// come from a maker (tiles.cuh), and there is one exponential per entry. A thread sums up its own
// entries of each row, and all threads that have a row join their sums after the last tile.
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
template <class CostOf, bool kLow>
struct TensorTiles {
  using Cost = CostOf;
  template <typename T, class Block>
  using Maker = TensorTileMaker<Cost, kLow, Block>;
};

struct StoredTiles {  // a maker for each side
  using Cost = void;
};

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
  kCost,     // exp2(t_ij) C_ij
  kJoin      // nothing: entries join components, see join_entries
};

// S: the type of sums and factors.
template <typename T, typename S = T>
struct RowSums {
  RowTiles<T> tiles;
  RowSum what;
  const S* x;  // (columns,) factors, or null: 1
  S* out;      // (rows,)
};

OTLOSS_DEVICE double join_sums(RowSum what, double x, double y) {
  return what == RowSum::kLargest ? Max::join(x, y) : Sum::join(x, y);
}

// A sum over many tiles; in single precision with the rounding errors made up for.
template <typename S>
struct Total {
  S sum = S(0), lost = S(0);

  OTLOSS_DEVICE void add(S x) {
    if constexpr (sizeof(S) == sizeof(double)) {
      sum += x;
    } else {
      const S rest = x - lost, more = sum + rest;
      lost = (more - sum) - rest;
      sum = more;
    }
  }
};

// What is added up of a tile's entries, in loops of their own: what a pass of the solver wants;
// sums over a plan times the factors x of its columns; or these and the largest exponents.
//
// Of products F_i + G_j is added first and costs do not depend on which side is first, so that both
// sides get the same P_ij, bit for bit, as if it was kept: the linear system of the implicit
// gradient stays symmetric. Tensor cores would not do that, nor are they used for it.
enum class Terms { kPass, kProducts, kAny };

template <Terms kTerms, typename T, typename S, class Layout>
class RowTerms {
 public:
  OTLOSS_DEVICE explicit RowTerms(const RowSums<T, S>& p)
      : p_(p), what_(kTerms == Terms::kPass ? RowSum::kPlan : p.what) {
    if (what_ != RowSum::kLargest) return;
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) totals_[r].sum = std::numeric_limits<S>::lowest();
  }

  OTLOSS_DEVICE void add(const TileEntries<T, Layout>& e) {
    if constexpr (kTerms == Terms::kPass)
      return add_terms([&](int r, int c) {
        return fast_exp2_unclamped(e.F[r] + (e.G[c] - e.k * e.cost[r][c]));
      });
    const auto exponent = [&](int r, int c) { return (e.F[r] + e.G[c]) - e.k * e.cost[r][c]; };
    if (kTerms == Terms::kAny && what_ == RowSum::kLargest)
      return for_entries<Layout>([&](int r, int c) {
        totals_[r].sum = Max::join(totals_[r].sum, static_cast<S>(exponent(r, c)));
      });
    S x[Layout::kColumns];
#pragma unroll
    for (int c = 0; c < Layout::kColumns; ++c) {
      const int64_t j = e.column + Layout::column(c);
      x[c] = j < p_.tiles.end ? p_.x != nullptr ? p_.x[j] : S(1) : S(0);
    }
    add_terms([&](int r, int c) {
      // A clamped exponential stands for 0, so that padding gets exactly 0.
      const T t = exponent(r, c), p = t > kExp2Least<T> ? fast_exp2(t) : T(0);
      return static_cast<S>(what_ == RowSum::kCost && p != T(0) ? p * e.cost[r][c] : p) * x[c];
    });
  }

  OTLOSS_DEVICE S join(S x, S y) const {
    return what_ == RowSum::kLargest ? Max::join(x, y) : Sum::join(x, y);
  }
  // Lane l of those that have the same rows gets row l / (kLanes / kRows).
  template <class Block>
  OTLOSS_DEVICE S joined(Block& block) const {
    S sums[Layout::kRows];
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) sums[r] = totals_[r].sum;
    return what_ == RowSum::kLargest ? scatter_reduce<Max, Layout::kLanes>(block, sums)
                                     : scatter_reduce<Sum, Layout::kLanes>(block, sums);
  }

 private:
  template <typename F>
  OTLOSS_DEVICE void add_terms(F&& term) {
#pragma unroll
    for (int r = 0; r < Layout::kRows; ++r) {
      S sum = S(0);
#pragma unroll
      for (int c = 0; c < Layout::kColumns; ++c) sum += term(r, c);
      totals_[r].add(sum);
    }
  }

  const RowSums<T, S>& p_;
  const RowSum what_;
  Total<S> totals_[Layout::kRows];
};

// Sums of a block's rows over all tiles of its columns.
template <class Maker, Terms kTerms, typename T, typename S, class Block>
OTLOSS_DEVICE void add_rows(Block& block, const RowSums<T, S>& p) {
  using Layout = typename Maker::Layout;
  constexpr int kLanes = Layout::kLanes / Layout::kRows;  // of a row, once they are joined
  Maker maker(block, p.tiles);
  RowTerms<kTerms, T, S, Layout> terms(p);
  maker.run([&](const typename Maker::Entries& e) { terms.add(e); });
  const S joined = terms.joined(block);
  const int lane = block.thread() % Layout::kLanes;
  const int64_t row = maker.row() + Layout::row(lane / kLanes);
  const bool writes = lane % kLanes == 0 && row < p.tiles.last;
  if constexpr (Maker::kSharing == 1) {
    if (writes) p.out[row] = joined;
  } else {  // warps that have the same rows
    static_assert(Maker::kRows == kWarp && sizeof(double) * kSolveThreads <= kStoredRoom);
    S* const all = reinterpret_cast<S*>(block.template shared<unsigned char>() + kArgumentBytes);
    all[block.thread()] = joined;
    block.sync();
    if (block.thread() >= kWarp || !writes) return;
    S total = joined;
    for (int t = block.thread() + kWarp; t < kSolveThreads; t += kWarp)
      total = terms.join(total, all[t]);
    p.out[row] = total;
  }
}

}  // namespace otloss::cuda
