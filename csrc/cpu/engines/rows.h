// The costs of one problem, a block of rows at a time. Rows are stored (a matrix) or made from
// points when asked for and overwritten by the next ones, so that nothing of size n x m exists.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <vector>

#include "cpu/cost/points.h"
#include "cpu/problems.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/gaussian.h"
#include "kernels.h"

namespace otloss::cpu {

// Where to begin better than from 0, g (m,): false where the points are not known, there is no
// formula, or it takes longer than so many sweeps.
template <typename T>
bool propose_start(int64_t n, int64_t m, const PointPair<T>& points, int64_t problem, double sweeps,
                   double eps, const T* a, const T* b, T* g) {
  const int64_t d = points.d;
  if (!points.zx || points.kind != CostKind::kSqEuclidean) return false;
  if (!gaussian_start_within(sweeps, n, m, d)) return false;
  gaussian_start(GaussianStart<T>{n, m, d, points.zx + problem * n * d, points.zy + problem * m * d,
                                  a, b, eps, g});
  return true;
}

// A cost matrix that is kept.
template <typename T>
class StoredRows {
 public:
  StoredRows(int64_t n, int64_t m, const T* C, const PointPair<T>& points, int64_t problem)
      : n_(n), m_(m), C_(C + problem * n * m), points_(points), problem_(problem) {}

  int64_t at_once() const { return n_; }
  int64_t scratch() const { return 0; }

  // Entries that may be read from the start of row `begin` on.
  int64_t available(int64_t begin) const { return (n_ - begin) * m_; }

  // Rows [begin, begin + count), m apart.
  const T* rows(int64_t begin, int64_t /*count*/, T* /*scratch*/) const { return C_ + begin * m_; }

  // Columns [begin, end) of all rows; `stride` is set to the distance of rows.
  const T* columns(int64_t begin, int64_t /*end*/, std::vector<T>& /*scratch*/,
                   int64_t& stride) const {
    stride = m_;
    return C_ + begin;
  }

  double max_cost(const T* a, const T* b) const { return max_abs(MaxAbs<T>{n_, m_, C_, a, b}); }

  bool propose(double sweeps, double eps, const T* a, const T* b, T* g) const {
    return propose_start(n_, m_, points_, problem_, sweeps, eps, a, b, g);
  }

 private:
  int64_t n_, m_;
  const T* C_;  // (n, m)
  const PointPair<T>& points_;
  int64_t problem_;
};

// A cost matrix that is made from prepared points, a few rows at a time.
template <typename T>
class MadeRows {
 public:
  MadeRows(int64_t n, int64_t m, const PointPair<T>& points, int64_t problem, bool symmetric)
      : n_(n),
        points_(points),
        problem_(problem),
        kind_(points.kind),
        symmetric_(symmetric),
        from_(n, points.d, points.zx + problem * n * points.d, points.hx + problem * n),
        to_(m, points.d, points.zy + problem * m * points.d, points.hy + problem * m) {}

  const PackedCloud<T>& to() const { return to_; }
  CostKind kind() const { return kind_; }
  int64_t at_once() const { return rows_at_once(to_.d); }
  int64_t scratch() const { return at_once() * to_.m + padded<T>(1); }
  int64_t available(int64_t /*begin*/) const { return scratch(); }

  const T* rows(int64_t begin, int64_t count, T* scratch) const {
    rows(begin, count, scratch, to_.m);
    return scratch;
  }

  // The same, `stride` apart.
  void rows(int64_t begin, int64_t count, T* C, int64_t stride) const {
    make(begin, count, 0, to_.m, C, stride);
  }

  const T* columns(int64_t begin, int64_t end, std::vector<T>& scratch, int64_t& stride) const {
    stride = end - begin;
    scratch.resize(n_ * stride);
    for (int64_t i = 0; i < n_; i += at_once())
      make(i, std::min(at_once(), n_ - i), begin, end, scratch.data() + i * stride, stride);
    return scratch.data();
  }

  // An upper bound, from the largest norms.
  double max_cost(const T* a, const T* b) const {
    if (kind_ == CostKind::kCosine) return 2 + 0 * (largest(from_, a) + largest(to_, b));
    const double reach = std::sqrt(largest(from_, a)) + std::sqrt(largest(to_, b));
    return kind_ == CostKind::kEuclidean ? reach : reach * reach;
  }

  bool propose(double sweeps, double eps, const T* a, const T* b, T* g) const {
    return propose_start(n_, to_.m, points_, problem_, sweeps, eps, a, b, g);
  }

 private:
  void make(int64_t row, int64_t count, int64_t begin, int64_t end, T* C, int64_t stride) const {
    cost_rows(kind_, CostRows<T>{row, count, begin, end, symmetric_, &from_, &to_, C, stride});
  }

  // The largest norm of points of positive weight, NaN if one is not finite.
  static double largest(const PackedCloud<T>& cloud, const T* weight) {
    double result = 0, nonfinite = 0;
    for (int64_t i = 0; i < cloud.m; ++i) {
      if (!(weight[i] > T(0))) continue;
      result = std::max(result, static_cast<double>(cloud.norm[i]));
      nonfinite += static_cast<double>(cloud.norm[i]) * 0;
    }
    return result + nonfinite;
  }

  int64_t n_;
  const PointPair<T>& points_;
  int64_t problem_;
  CostKind kind_;
  bool symmetric_;
  PackedCloud<T> from_, to_;
};

// Calls function(C, first row, rows) for the rows [begin, end) in blocks; `scratch` holds those
// made.
template <typename T, typename Source, typename Function>
void for_each_block(const Source& source, int64_t begin, int64_t end, T* scratch,
                    Function&& function) {
  const int64_t step = source.at_once();
  for (int64_t i = begin; i < end; i += step) {
    const int64_t count = std::min(step, end - i);
    function(source.rows(i, count, scratch), i, count);
  }
}

// The costs of a problem that is passed over many times, by all threads, wherever they come from.
template <typename T>
class CostBlocks {
 public:
  // `symmetric`: a cloud against itself. C (B, n, m) or null: made from the points.
  CostBlocks(const RowParts& parts, int64_t n, int64_t m, const T* C, const PointPair<T>& points,
             int64_t problem, bool symmetric)
      : parts_(parts), m_(m), C_(C ? C + problem * n * m : nullptr) {
    if (C_) return;
    made_ = std::make_unique<MadeRows<T>>(n, m, points, problem, symmetric);
    scratch_.assign(parts.count(), BlockVector<T>(made_->scratch()));
  }

  // Rows of the largest block.
  int64_t at_once() const { return made_ ? made_->at_once() : kStoredAtOnce; }

  // Calls function(part, C, first row, rows).
  template <typename Function>
  void for_each(Function&& function) {
    parts_.for_each([&](int64_t part, int64_t begin, int64_t end) {
      if (made_) {
        for_each_block(*made_, begin, end, scratch_[part].data(),
                       [&](const T* C, int64_t i, int64_t count) { function(part, C, i, count); });
        return;
      }
      for (int64_t i = begin; i < end; i += kStoredAtOnce)
        function(part, C_ + i * m_, i, std::min(kStoredAtOnce, end - i));
    });
  }

 private:
  static constexpr int64_t kStoredAtOnce = 64;

  const RowParts& parts_;
  int64_t m_;
  const T* C_;  // (n, m) or null
  std::unique_ptr<MadeRows<T>> made_;
  std::vector<BlockVector<T>> scratch_;  // of each part, rows that were made
};

}  // namespace otloss::cpu
