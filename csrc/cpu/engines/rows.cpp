#include "cpu/engines/rows.h"

#include <algorithm>

#include "cpu/engines/streamed.h"
#include "cpu/simd/sweep.h"

namespace otloss::cpu {

// A cost matrix that is kept.
template <typename T>
class DenseRows final : public RowSource<T> {
 public:
  DenseRows(int64_t n, int64_t m, const T* C) : n_(n), m_(m), C_(C) {}

  int64_t at_once() const override { return n_; }
  int64_t scratch() const override { return 0; }
  int64_t available(int64_t begin) const override { return (n_ - begin) * m_; }
  const T* rows(int64_t begin, int64_t /*count*/, T* /*scratch*/) const override {
    return C_ + begin * m_;
  }
  const T* columns(int64_t begin, int64_t /*end*/, std::vector<T>& /*scratch*/,
                   int64_t& stride) const override {
    stride = m_;
    return C_ + begin;
  }
  double max_cost(const T* a, const T* b) const override {
    return max_abs(MaxAbs<T>{n_, m_, C_, a, b});
  }

 private:
  int64_t n_, m_;
  const T* C_;  // (n, m)
};

// -------------------------------------------------------------------------------------- streamed

template <typename T>
StreamedRows<T>::StreamedRows(int64_t n, int64_t m, const PointPair<T>& points, int64_t problem,
                              bool symmetric)
    : n_(n),
      kind_(points.kind),
      symmetric_(symmetric),
      from_(n, points.d, points.zx + problem * n * points.d, points.hx + problem * n),
      to_(m, points.d, points.zy + problem * m * points.d, points.hy + problem * m) {}

template <typename T>
const T* StreamedRows<T>::columns(int64_t begin, int64_t end, std::vector<T>& scratch,
                                  int64_t& stride) const {
  stride = end - begin;
  scratch.resize(n_ * stride);
  for (int64_t i = 0; i < n_; i += at_once())
    make(i, std::min(at_once(), n_ - i), begin, end, scratch.data() + i * stride, stride);
  return scratch.data();
}

// The largest norm of points of positive weight, NaN if one is not finite.
template <typename T>
double largest_norm(const PackedCloud<T>& cloud, const T* weight) {
  double result = 0, nonfinite = 0;
  for (int64_t i = 0; i < cloud.m; ++i) {
    if (!(weight[i] > T(0))) continue;
    result = std::max(result, static_cast<double>(cloud.norm[i]));
    nonfinite += static_cast<double>(cloud.norm[i]) * 0;
  }
  return result + nonfinite;
}

template <typename T>
double StreamedRows<T>::max_cost(const T* a, const T* b) const {
  return cost_bound(kind_, largest_norm(from_, a), largest_norm(to_, b));
}

// ----------------------------------------------------------------------------------------- blocks

template <typename T>
const RowSource<T>* new_source(int64_t n, int64_t m, const T* C, const PointPair<T>& points,
                               int64_t problem, bool symmetric) {
  if (C) return new DenseRows<T>(n, m, C + problem * n * m);
  return new StreamedRows<T>(n, m, points, problem, symmetric);
}

template <typename T>
CostBlocks<T>::CostBlocks(const RowParts& parts, int64_t at_once, int64_t n, int64_t m, const T* C,
                          const PointPair<T>& points, int64_t problem, bool symmetric)
    : source_(new_source(n, m, C, points, problem, symmetric)),
      parts_(parts),
      at_once_(std::min(at_once, source_->at_once())),
      scratch_(parts.count(), BlockVector<T>(source_->scratch())) {}

template <typename T>
void CostBlocks<T>::for_each_block(int64_t part, int64_t begin, int64_t end,
                                   BlockFunction function) {
  for (int64_t i = begin; i < end; i += at_once_) {
    const int64_t count = std::min(at_once_, end - i);
    function(source_->rows(i, count, scratch_[part].data()), i, count);
  }
}

template <typename T>
void CostBlocks<T>::for_each(
    FunctionRef<void(int64_t part, const T* C, int64_t first, int64_t rows)> function) {
  parts_.for_each([&](int64_t part, int64_t begin, int64_t end) {
    for_each_block(part, begin, end,
                   [&](const T* C, int64_t i, int64_t count) { function(part, C, i, count); });
  });
}

template class StreamedRows<float>;
template class StreamedRows<double>;
template class CostBlocks<float>;
template class CostBlocks<double>;

}  // namespace otloss::cpu
