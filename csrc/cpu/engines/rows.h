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

// Rows that are stored, or streamed: made from prepared points when asked for, each block
// overwritten by the next, so that nothing of size n x m exists.
template <typename T>
class RowSource {
 public:
  // Of problem `problem`: its C (n, m) where that is stored, else made from the points; rows are
  // `stride` apart. symmetric: a cloud against itself.
  RowSource(int64_t n, int64_t m, const T* C, int64_t stride, const PointPair<T>& points,
            int64_t problem, bool symmetric);

  bool stored() const { return C_ != nullptr; }
  // Rows of a block, at most.
  int64_t at_once() const { return C_ ? n_ : rows_at_once(to_.d); }
  // Entries that a block may take.
  int64_t scratch() const { return C_ ? 0 : at_once() * stride_ + padded<T>(1); }
  // Entries that may be read from the start of row `begin` on.
  int64_t available(int64_t begin) const {
    return C_ ? (n_ - begin - 1) * stride_ + m_ : scratch();
  }
  int64_t stride() const { return stride_; }
  // Rows [begin, begin + count), stride() apart.
  const T* rows(int64_t begin, int64_t count, T* scratch) const {
    if (C_) return C_ + begin * stride_;
    make(begin, count, 0, m_, scratch, stride_);
    return scratch;
  }
  // Columns [begin, end) of all rows; `stride` is set to the distance of rows.
  const T* columns(int64_t begin, int64_t end, std::vector<T>& scratch, int64_t& stride) const;
  // Of points of positive weight; from points with a bound of the costs.
  CostRange cost_range(const T* a, const T* b) const;

  // Of streamed rows: the points of the columns, and costs whose rows are `stride` apart.
  const PackedCloud<T>& to() const { return to_; }
  CostKind kind() const { return kind_; }
  void make(int64_t row, int64_t count, int64_t begin, int64_t end, T* C, int64_t stride) const {
    cost_rows(kind_, CostRows<T>{row, count, begin, end, symmetric_, &from_, &to_, C, stride});
  }

 private:
  int64_t n_, m_, stride_;
  const T* C_;  // (n, m) or null
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
