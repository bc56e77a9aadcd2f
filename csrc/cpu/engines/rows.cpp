#include "cpu/engines/rows.h"

#include <algorithm>
#include <utility>

#include "cpu/simd/sweep.h"

namespace otloss::cpu {
namespace {

template <typename T>
CloudRows<T> of_problem(int64_t count, int64_t d, int64_t problem, const T* z, const T* norm) {
  return {count, d, z + problem * count * d, norm + problem * count};
}

// The largest norm of points of positive weight, NaN if one is not finite.
template <typename T>
double largest_norm(const CloudRows<T>& cloud, const T* weight) {
  double result = 0, nonfinite = 0;
  for (int64_t i = 0; i < cloud.m; ++i) {
    if (!(weight[i] > T(0))) continue;
    result = std::max(result, static_cast<double>(cloud.norm[i]));
    nonfinite += static_cast<double>(cloud.norm[i]) * 0;
  }
  return result + nonfinite;
}

}  // namespace

template <typename T>
RowSource<T>::RowSource(int64_t n, int64_t m, const StoredRows<T>& stored, int64_t stride,
                        const PointPair<T>& points, int64_t problem, bool symmetric,
                        int64_t dummies, double eps)
    : n_(n),
      m_(m),
      dummies_(dummies),
      C_(stored.C),
      C_stride_(stored.stride),
      stride_(stored.C && dummies == 0 ? stored.stride : stride),
      forbidden_(static_cast<T>(kForbidden<T> * eps)),
      kind_(points.kind),
      symmetric_(symmetric),
      from_(of_problem(C_ ? 0 : n - dummies, points.d, problem, points.zx, points.hx)),
      to_(of_problem(C_ ? 0 : m - dummies, points.d, problem, points.zy, points.hy)) {
  if (!C_ || dummies == 0) return;
  T least = 0;
  for (int64_t i = 0; i < n - dummies; ++i)
    for (int64_t j = 0; j < m - dummies; ++j) least = std::min(least, C_[i * C_stride_ + j]);
  forbidden_ -= least;
}

template <typename T>
void RowSource<T>::make(int64_t row, int64_t count, int64_t begin, int64_t end, T* C,
                        int64_t stride) const {
  const int64_t rows = std::min(count, n_ - dummies_ - row), last = std::min(end, m_ - dummies_);
  if (rows > 0 && begin < last && !C_)
    cost_rows(kind_, CostRows<T>{row, rows, begin, last, symmetric_, &from_, &to_, C, stride});
  for (int64_t i = 0; C_ && i < rows; ++i) {
    const T* from = C_ + (row + i) * C_stride_;
    std::copy(from + begin, from + std::max(begin, last), C + i * stride);
  }
  if (dummies_ > 0) make_dummies(row, count, begin, end, C, stride);
}

template <typename T>
void RowSource<T>::make_dummies(int64_t row, int64_t count, int64_t begin, int64_t end, T* C,
                                int64_t stride) const {
  for (int64_t i = 0; i < count; ++i) {
    T* entries = C + i * stride;
    const bool dummy = row + i == n_ - 1;
    if (dummy) std::fill(entries, entries + (end - begin), T(0));
    if (end == m_) entries[m_ - 1 - begin] = dummy ? forbidden_ : T(0);
  }
}

template <typename T>
const T* RowSource<T>::columns(int64_t begin, int64_t end, std::vector<T>& scratch,
                               int64_t& stride) const {
  stride = stored() ? stride_ : end - begin;
  if (stored()) return C_ + begin;
  scratch.resize(n_ * stride);
  for (int64_t i = 0; i < n_; i += at_once())
    make(i, std::min(at_once(), n_ - i), begin, end, scratch.data() + i * stride, stride);
  return scratch.data();
}

template <typename T>
CostRange RowSource<T>::cost_range(const T* a, const T* b) const {
  if (C_) return cpu::cost_range(n_ - dummies_, m_ - dummies_, C_, C_stride_, a, b);
  const double bound = cost_bound(kind_, largest_norm(from_, a), largest_norm(to_, b));
  return {0 * bound, bound};
}

template <typename T>
CostBlocks<T>::CostBlocks(const RowParts& parts, int64_t at_once, RowSource<T> source)
    : source_(std::move(source)),
      parts_(parts),
      at_once_(std::min(at_once, source_.at_once())),
      scratch_(parts.count(), BlockVector<T>(source_.scratch())) {}

template <typename T>
void CostBlocks<T>::for_each_block(int64_t part, int64_t begin, int64_t end,
                                   BlockFunction function) {
  for (int64_t i = begin; i < end && !interrupted(); i += at_once_) {
    const int64_t count = std::min(at_once_, end - i);
    function(source_.rows(i, count, scratch_[part].data()), i, count);
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

template class RowSource<float>;
template class RowSource<double>;
template class CostBlocks<float>;
template class CostBlocks<double>;

}  // namespace otloss::cpu
