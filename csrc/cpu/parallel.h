// Loops over threads, and how a set of problems is spread over them: problems first, threads that
// have none left help with the rows of others, and where more threads can share the rows of one
// than there are problems, the rows of each.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

#include "cpu/simd/blocks.h"

namespace otloss::cpu {

// What the kernels ask of the program around them (the bindings provide it by torch's thread pool
// and Python's signals).

// Calls function(begin, end, context) on disjoint parts of [begin, end), each at least `grain`
// long.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

int64_t thread_count();

// True once the call that this thread works for is to end without a result, since a signal handler
// raised something. Cheap enough to ask for every block of rows. Only the thread that makes the
// call learns of signals.
bool interrupted();

// Tells how far a solve is, to whoever wants to see it: sweeps so far and the last marginal error.
void report(int64_t sweeps, double error);

// A reference to anything that can be called. Functions that take one are compiled once.
template <typename Signature>
class FunctionRef;

template <typename Result, typename... Arguments>
class FunctionRef<Result(Arguments...)> {
 public:
  template <typename F, typename = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(F&& function)  // NOLINT: converts, as std::function does
      : context_(const_cast<void*>(static_cast<const void*>(&function))),
        call_([](void* context, Arguments... arguments) -> Result {
          return (*static_cast<std::remove_reference_t<F>*>(context))(
              std::forward<Arguments>(arguments)...);
        }) {}

  Result operator()(Arguments... arguments) const {
    return call_(context_, std::forward<Arguments>(arguments)...);
  }

 private:
  void* context_;
  Result (*call_)(void*, Arguments...);
};

// Calls function(begin, end) on disjoint parts of [begin, end), each at least `grain` long.
void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  FunctionRef<void(int64_t begin, int64_t end)> function);

// Calls function(i) for each i in [0, count), on a thread each as far as there are threads. Within
// a problem that others may help with, these take some of up to kMostParts.
void parallel_tasks(int64_t count, FunctionRef<void(int64_t i)> function);

// Rows given to one thread of a split problem hold at least this number of entries: 50 us of work,
// some ten times what starting a parallel region costs.
constexpr int64_t kSplitGrain = 1 << 18;
// The same of a problem that others help with: some ten times what it takes until they do.
constexpr int64_t kHelpGrain = 1 << 14;
constexpr int64_t kMostParts = 32;
// Whether this thread's problem is one.
bool may_be_helped();
// Entries of a problem that is worth all threads.
constexpr int64_t kEndless = std::numeric_limits<int64_t>::max();

// Calls function(i, split) for each of some problems of up to `entries` entries, until interrupted:
// in parallel, one thread each from start to end, each thread taking the next one when it is free
// and helping with others when there is none; when they are fewer than the threads that can share
// one of them, one after the other, each to be split.
void parallel_problems(int64_t count, int64_t entries,
                       FunctionRef<void(int64_t i, bool split)> function);

// Calls function(group, problem, split) for all problems of all groups.
template <typename Group, typename F>
void for_each_problem(const std::vector<Group>& groups, int64_t entries, F&& function) {
  int64_t count = 0;
  for (const Group& group : groups) count += group.batch;
  parallel_problems(count, entries, [&](int64_t problem, bool split) {
    const Group* group = groups.data();
    while (problem >= group->batch) problem -= (group++)->batch;
    function(*group, problem, split);
  });
}
template <typename Group, typename F>
void for_each_problem(const std::vector<Group>& groups, F&& function) {
  int64_t entries = 0;
  for (const Group& group : groups) entries = std::max(entries, group.n * group.m);
  for_each_problem(groups, entries, std::forward<F>(function));
}

// The rows of one problem in parts, one thread each.
class RowParts {
 public:
  RowParts(int64_t n, int64_t m, bool split) : rows_(n), count_(1) {
    const bool helped = may_be_helped();
    const int64_t most = helped ? std::min(kMostParts, thread_count()) : thread_count();
    if (helped || split)
      count_ =
          std::clamp<int64_t>(n * m / (helped ? kHelpGrain : kSplitGrain), 1, std::min(most, n));
  }

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
