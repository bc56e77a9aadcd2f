#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <thread>
#include <utility>
#include <vector>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace otloss::cpu {
namespace {

// While it lives, this thread's results below the least normal number become 0. Most entries of a
// plan at small eps are next to nothing, and times a weight they would be denormal, which costs
// many clocks each.
class FlushDenormals {
 public:
#if defined(__SSE2__)
  FlushDenormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | kFlushToZero); }
  ~FlushDenormals() { _mm_setcsr(saved_); }

 private:
  static constexpr unsigned kFlushToZero = 0x8000;
  unsigned saved_;
#else
  FlushDenormals() {}
#endif

 public:
  FlushDenormals(const FlushDenormals&) = delete;
  FlushDenormals& operator=(const FlushDenormals&) = delete;
};

using Clock = std::chrono::steady_clock;

// Waits a little, each time longer: what is overslept is small against what was waited.
class Wait {
 public:
  void operator()() {
    constexpr int kPauses = 10'000;  // some 0.2 ms: more than the solver needs between two loops
    if (count_ < kPauses) return pause();
    if (count_ == kPauses) start_ = Clock::now(), ++count_;
    const Clock::duration waited = Clock::now() - start_;
    if (waited < std::chrono::milliseconds(1))
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(waited / 16);
  }

 private:
  void pause() {
    ++count_;
#if defined(__SSE2__)
    _mm_pause();
#else
    std::this_thread::yield();
#endif
  }

  int count_ = 0;
  Clock::time_point start_;
};

class SharedLoop;
thread_local SharedLoop* own_loop = nullptr;  // of a problem that others may help with

class Owning {
 public:
  explicit Owning(SharedLoop* loop) : before_(std::exchange(own_loop, loop)) {}
  ~Owning() { own_loop = before_; }
  Owning(const Owning&) = delete;
  Owning& operator=(const Owning&) = delete;

 private:
  SharedLoop* const before_;
};

// A loop within a problem, laid out for threads that have none: a bit is set for each part that
// nobody has taken. Who solves the problem takes parts as well and waits only for those that
// others have begun, so it never waits for a thread that does not run.
class SharedLoop {
 public:
  void run(int64_t count, FunctionRef<void(int64_t part)> function) {
    if (alone_) {
      const Owning none(nullptr);
      for (int64_t part = 0; part < count; ++part) function(part);
      return;
    }
    function_ = &function;
    left_.store(count, std::memory_order_relaxed);
    const uint64_t loops = (open_.load(std::memory_order_relaxed) >> kMostParts) + 1;
    open_.store(loops << kMostParts | ((uint64_t{1} << count) - 1), std::memory_order_release);
    const Clock::time_point start = Clock::now();
    while (help(0)) {
    }
    const Clock::time_point done = Clock::now();
    for (Wait wait; left_.load(std::memory_order_acquire) > 0;) wait();
    alone_ = Clock::now() - done > 4 * (done - start) + std::chrono::microseconds(200);
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

  // Does one part, `first` if it can be had: a thread takes the same rows every time. False if
  // there is none.
  bool help(int64_t first);

 private:
  std::atomic<uint64_t> open_{0};  // the parts; above them the number of loops so far
  std::atomic<int64_t> left_{0};   // parts that are not done
  const FunctionRef<void(int64_t part)>* function_ = nullptr;
  std::atomic_flag failed_ = ATOMIC_FLAG_INIT;
  std::exception_ptr error_;
  bool alone_ = false;  // since somebody was waited for longer than a part takes: it may not run
};

bool SharedLoop::help(int64_t first) {
  uint64_t open = open_.load(std::memory_order_acquire);
  int64_t part = 0;
  do {
    const auto parts = static_cast<uint32_t>(open);
    if (parts == 0) return false;
    part = (parts >> first & 1) != 0 ? first : __builtin_ctz(parts);
  } while (!open_.compare_exchange_weak(open, open & ~(uint64_t{1} << part),
                                        std::memory_order_acq_rel, std::memory_order_acquire));
  try {
    const Owning none(nullptr);  // a part has no parts
    (*function_)(part);
  } catch (...) {
    if (!failed_.test_and_set()) error_ = std::current_exception();
  }
  left_.fetch_sub(1, std::memory_order_release);
  return true;
}

// The threads of some problems, by the range that each was given.
class Team {
 public:
  // shares: whether a problem may have parts.
  Team(int64_t threads, bool shares) : shares_(shares), busy_(threads), loops_(threads) {}

  // Calls solve(), then helps others until all are done. The first thread, which makes the call,
  // has to ask for signals all the time: problems of others may take hours when its own take none.
  void work(int64_t begin, int64_t end, FunctionRef<void()> solve) {
    {
      const Leaving leaving{busy_, end - begin};
      const Owning own(&loops_[begin]);
      solve();
    }
    if (begin > 0 && !shares_) return;
    for (Wait wait; busy_ > 0 && !interrupted();) {
      bool helped = false;
      for (SharedLoop& loop : loops_) helped |= loop.help(begin % kMostParts);
      if (helped)
        wait = Wait();
      else
        wait();
    }
  }

 private:
  // Counts threads down when they are done, by an exception too.
  struct Leaving {
    std::atomic<int64_t>& busy;
    int64_t threads;
    ~Leaving() { busy -= threads; }
  };
  struct alignas(64) Line : SharedLoop {};

  const bool shares_;
  std::atomic<int64_t> busy_;
  std::vector<Line> loops_;
};

}  // namespace

void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  FunctionRef<void(int64_t begin, int64_t end)> function) {
  run_parallel(
      begin, end, grain,
      [](int64_t first, int64_t last, void* context) {
        const FlushDenormals flush;
        (*static_cast<decltype(function)*>(context))(first, last);
      },
      &function);
}

bool may_be_helped() { return own_loop != nullptr; }

void parallel_tasks(int64_t count, FunctionRef<void(int64_t i)> function) {
  if (own_loop && count > 1 && count <= kMostParts) return own_loop->run(count, function);
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

void parallel_problems(int64_t count, int64_t entries,
                       FunctionRef<void(int64_t i, bool split)> function) {
  if (count == 0) return;
  const int64_t most = thread_count(), sharing = std::min(most, entries / kSplitGrain);
  // Helpers alone are worth a parallel region from four parts on.
  const int64_t parts = entries < 4 * kHelpGrain ? 1 : entries / kHelpGrain;
  const int64_t threads = std::min(most, std::max(count, parts));
  if (threads <= 1 || count < sharing) {
    const FlushDenormals flush;
    for (int64_t i = 0; i < count && !interrupted(); ++i) function(i, most > 1);
    return;
  }
  Team team(threads, entries >= 2 * kHelpGrain);
  std::atomic<int64_t> next{0};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    team.work(begin, end, [&] {
      for (int64_t i = next++; i < count && !interrupted(); i = next++) function(i, count == 1);
    });
  });
}

}  // namespace otloss::cpu
