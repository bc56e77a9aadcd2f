// How a set of problems is spread over threads: problems first, and where they are fewer than
// threads the rows of each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd/blocks.h"

namespace otloss::cpu {

// Calls function(group, problem, split) for all problems of all groups.
template <typename Group, typename F>
void for_each_problem(const std::vector<Group>& groups, F&& function) {
  int64_t count = 0;
  for (const Group& group : groups) count += group.batch;
  parallel_problems(count, [&](int64_t problem, bool split) {
    const Group* group = groups.data();
    while (problem >= group->batch) problem -= (group++)->batch;
    function(*group, problem, split);
  });
}

// Rows given to one thread of a split problem hold at least this number of entries: 50 us of work,
// some ten times what starting a parallel region costs.
constexpr int64_t kSplitGrain = 1 << 18;

// The rows of one problem in parts, one thread each.
class RowParts {
 public:
  RowParts(int64_t n, int64_t m, bool split)
      : rows_(n),
        count_(split ? std::clamp<int64_t>(n * m / kSplitGrain, 1, std::min(thread_count(), n))
                     : 1) {}

  int64_t count() const { return count_; }

  void for_each(FunctionRef<void(int64_t part, int64_t begin, int64_t end)> function) const {
    if (count_ == 1) return function(0, 0, rows_);
    const int64_t rows = (rows_ + count_ - 1) / count_;
    parallel_tasks(count_, [&](int64_t part) {
      const int64_t begin = std::min(rows_, part * rows);
      function(part, begin, std::min(rows_, begin + rows));
    });
  }

 private:
  int64_t rows_;
  int64_t count_;
};

// Column sums kept by each part for itself and added up at the end, always in the same order.
template <typename T>
class PartSums {
 public:
  PartSums(const RowParts& parts, int64_t m)
      : m_(m), stride_(padded<T>(m)), parts_(parts.count()), sums_(parts_ * stride_) {}

  void clear() { std::fill(sums_.begin(), sums_.end(), T(0)); }
  T* part(int64_t index) { return sums_.data() + index * stride_; }

  // (m,) the sums over all parts.
  const T* total() {
    for (int64_t p = 1; p < parts_; ++p)
      for (int64_t j = 0; j < m_; ++j) sums_[j] += sums_[p * stride_ + j];
    return sums_.data();
  }

 private:
  int64_t m_, stride_, parts_;
  std::vector<T> sums_;
};

}  // namespace otloss::cpu
