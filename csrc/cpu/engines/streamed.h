// A cost matrix that is made from prepared points, a few rows at a time, each block overwritten by
// the next, so that nothing of size n x m exists.
#pragma once

#include "cpu/cost/points.h"
#include "cpu/engines/rows.h"

namespace otloss::cpu {

template <typename T>
class StreamedRows final : public RowSource<T> {
 public:
  StreamedRows(int64_t n, int64_t m, const PointPair<T>& points, int64_t problem, bool symmetric);

  const PackedCloud<T>& to() const { return to_; }
  CostKind kind() const { return kind_; }
  int64_t at_once() const override { return rows_at_once(to_.d); }
  int64_t scratch() const override { return at_once() * to_.m + padded<T>(1); }
  int64_t available(int64_t /*begin*/) const override { return scratch(); }
  const T* rows(int64_t begin, int64_t count, T* scratch) const override {
    rows(begin, count, scratch, to_.m);
    return scratch;
  }
  // Rows `stride` apart.
  void rows(int64_t begin, int64_t count, T* C, int64_t stride) const {
    make(begin, count, 0, to_.m, C, stride);
  }
  const T* columns(int64_t begin, int64_t end, std::vector<T>& scratch,
                   int64_t& stride) const override;
  // A bound, from the largest norms.
  double max_cost(const T* a, const T* b) const override;

 private:
  void make(int64_t row, int64_t count, int64_t begin, int64_t end, T* C, int64_t stride) const {
    cost_rows(kind_, CostRows<T>{row, count, begin, end, symmetric_, &from_, &to_, C, stride});
  }

  int64_t n_;
  CostKind kind_;
  bool symmetric_;
  PackedCloud<T> from_, to_;
};

}  // namespace otloss::cpu
