// The costs of one problem, a block of rows at a time: what an engine or a gradient passes over.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/cost/points.h"
#include "cpu/parallel.h"
#include "cpu/simd/blocks.h"
#include "cpu/simd/sweep.h"
#include "kernels.h"

namespace otloss::cpu {

// Stored costs of a problem, or none: they are made from its points.
template <typename T>
struct StoredRows {
  const T* C;      // (n, m) without dummies, or null
  int64_t stride;  // distance of rows
};

// Dummy points, the last row and the last column, are at cost 0 from all others: they take what
// partial transport leaves where it is. Their pair is forbidden: its cost is this number of eps
// above the least of the others or 0. At the solution the potentials of the dummies add up to no
// more than minus that least cost and the logarithms of shares, so that exp((f + g - C) / eps) is 0
// there.
template <typename T>
constexpr double kForbidden = sizeof(T) == 4 ? 208 : 1492;

// Rows that are stored, or streamed: made from prepared points when asked for, each block
// overwritten by the next, so that nothing of size n x m exists. Stored rows of a problem with
// dummies are streamed, too: copied, with the dummies' entries behind them.
template <typename T>
class RowSource {
 public:
  // Of problem `problem`, with n rows and m columns, dummies included; rows that are made are
  // `stride` apart. symmetric: a cloud against itself. eps: read where there are dummies.
  RowSource(int64_t n, int64_t m, const StoredRows<T>& stored, int64_t stride,
            const PointPair<T>& points, int64_t problem, bool symmetric, int64_t dummies = 0,
            double eps = 0);

  // Whether rows are read where they are.
  bool stored() const { return C_ && dummies_ == 0; }
  // Rows of a block, at most.
  int64_t at_once() const { return stored() ? n_ : rows_at_once(to_.d); }
  // Entries that a block may take.
  int64_t scratch() const { return stored() ? 0 : at_once() * stride_ + padded<T>(1); }
  // Entries that may be read from the start of row `begin` on.
  int64_t available(int64_t begin) const {
    return stored() ? (n_ - begin - 1) * stride_ + m_ : scratch();
  }
  int64_t stride() const { return stride_; }
  // Rows [begin, begin + count), stride() apart.
  const T* rows(int64_t begin, int64_t count, T* scratch) const {
    if (stored()) return C_ + begin * stride_;
    make(begin, count, 0, m_, scratch, stride_);
    return scratch;
  }
  // Columns [begin, end) of all rows; `stride` is set to the distance of rows.
  const T* columns(int64_t begin, int64_t end, std::vector<T>& scratch, int64_t& stride) const;
  // Of points of positive weight, without dummies; from points with a bound of the costs.
  CostRange cost_range(const T* a, const T* b) const;

  // Of streamed rows: the points of the columns, and costs whose rows are `stride` apart.
  const PackedCloud<T>& to() const { return to_; }
  CostKind kind() const { return kind_; }
  void make(int64_t row, int64_t count, int64_t begin, int64_t end, T* C, int64_t stride) const;

 private:
  // What the dummies add to the rows and columns of `make`.
  void make_dummies(int64_t row, int64_t count, int64_t begin, int64_t end, T* C,
                    int64_t stride) const;

  int64_t n_, m_, dummies_;
  const T* C_;  // (n, m) without dummies, or null
  int64_t C_stride_, stride_;
  T forbidden_;  // the cost between the dummies
  CostKind kind_;
  bool symmetric_;
  CloudRows<T> from_;
  PackedCloud<T> to_;  // empty where rows are stored
};

// Rows of a block that several loops read in turn, while it is in the cache.
constexpr int64_t kBlockRows = 64;

// The rows of a problem, by all threads, over and over.
template <typename T>
class CostBlocks {
 public:
  using BlockFunction = FunctionRef<void(const T* C, int64_t first, int64_t rows)>;

  CostBlocks(const RowParts& parts, int64_t at_once, RowSource<T> source);

  const RowSource<T>& source() const { return source_; }
  const RowParts& parts() const { return parts_; }
  // Rows of the largest block.
  int64_t at_once() const { return at_once_; }

  // One row, valid until costs are asked for again.
  const T* row(int64_t i) { return source_.rows(i, 1, scratch_[0].data()); }

  // Calls function(C, first row, rows) for the rows [begin, end), those of a part.
  void for_each_block(int64_t part, int64_t begin, int64_t end, BlockFunction function);

  // Calls function(part, C, first row, rows) for all rows.
  void for_each(FunctionRef<void(int64_t part, const T* C, int64_t first, int64_t rows)> function);

 private:
  const RowSource<T> source_;
  const RowParts parts_;
  const int64_t at_once_;
  std::vector<BlockVector<T>> scratch_;  // of each part, rows that were made
};

}  // namespace otloss::cpu
