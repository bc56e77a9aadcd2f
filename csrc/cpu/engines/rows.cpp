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
RowSource<T>::RowSource(int64_t n, int64_t m, const T* C, int64_t stride,
                        const PointPair<T>& points, int64_t problem, bool symmetric)
    : n_(n),
      m_(m),
      stride_(stride),
      C_(C),
      kind_(points.kind),
      symmetric_(symmetric),
      from_(of_problem(C ? 0 : n, points.d, problem, points.zx, points.hx)),
      to_(of_problem(C ? 0 : m, points.d, problem, points.zy, points.hy)) {}

template <typename T>
const T* RowSource<T>::columns(int64_t begin, int64_t end, std::vector<T>& scratch,
                               int64_t& stride) const {
  stride = C_ ? stride_ : end - begin;
  if (C_) return C_ + begin;
  scratch.resize(n_ * stride);
  for (int64_t i = 0; i < n_; i += at_once())
    make(i, std::min(at_once(), n_ - i), begin, end, scratch.data() + i * stride, stride);
  return scratch.data();
}

template <typename T>
CostRange RowSource<T>::cost_range(const T* a, const T* b) const {
  if (C_) return cpu::cost_range(n_, m_, C_, stride_, a, b);
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
