// The costs of one problem, a block of rows at a time: what an engine or a gradient passes over.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/problems.h"
#include "cpu/simd/blocks.h"
#include "kernels.h"

namespace otloss::cpu {

// Rows that are stored, or made from points when asked for (streamed.h).
template <typename T>
class RowSource {
 public:
  virtual ~RowSource() = default;

  virtual int64_t at_once() const = 0;  // rows of a block, at most
  virtual int64_t scratch() const = 0;  // entries that a block may take; 0: rows are stored
  // Entries that may be read from the start of row `begin` on.
  virtual int64_t available(int64_t begin) const = 0;
  // Rows [begin, begin + count), m apart.
  virtual const T* rows(int64_t begin, int64_t count, T* scratch) const = 0;
  // Columns [begin, end) of all rows; `stride` is set to the distance of rows.
  virtual const T* columns(int64_t begin, int64_t end, std::vector<T>& scratch,
                           int64_t& stride) const = 0;
  // max |C_ij| over points of positive weight, or a bound of it; NaN if one is not finite.
  virtual double max_cost(const T* a, const T* b) const = 0;
};

// Rows of a block that several loops read in turn, while it is in the cache.
constexpr int64_t kBlockRows = 64;

// The rows of a problem, by all threads, over and over.
template <typename T>
class CostBlocks {
 public:
  using BlockFunction = FunctionRef<void(const T* C, int64_t first, int64_t rows)>;

  // Of problem `problem`: stored where there is a C (B, n, m), else made from the points.
  // symmetric: a cloud against itself.
  CostBlocks(const RowParts& parts, int64_t at_once, int64_t n, int64_t m, const T* C,
             const PointPair<T>& points, int64_t problem, bool symmetric);
  ~CostBlocks() { delete source_; }
  CostBlocks(const CostBlocks&) = delete;
  CostBlocks& operator=(const CostBlocks&) = delete;

  const RowSource<T>& source() const { return *source_; }
  const RowParts& parts() const { return parts_; }
  // Rows of the largest block.
  int64_t at_once() const { return at_once_; }

  // One row, valid until costs are asked for again.
  const T* row(int64_t i) { return source_->rows(i, 1, scratch_[0].data()); }

  // Calls function(C, first row, rows) for the rows [begin, end), those of a part.
  void for_each_block(int64_t part, int64_t begin, int64_t end, BlockFunction function);

  // Calls function(part, C, first row, rows) for all rows.
  void for_each(FunctionRef<void(int64_t part, const T* C, int64_t first, int64_t rows)> function);

 private:
  const RowSource<T>* const source_;  // owned
  const RowParts parts_;
  const int64_t at_once_;
  std::vector<BlockVector<T>> scratch_;  // of each part, rows that were made
};

}  // namespace otloss::cpu
