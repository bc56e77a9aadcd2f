#include "cpu/parallel.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
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

// Counts threads down when they are done, by an exception too.
struct Leaving {
  std::atomic<int64_t>& busy;
  int64_t threads;
  ~Leaving() { busy -= threads; }
};

// Until all threads are done the one that makes the call, the first, has to ask for signals: their
// problems may take hours when its own have taken none. What it oversleeps is small against what it
// has waited.
void listen_while(const std::atomic<int64_t>& busy) {
  using Clock = std::chrono::steady_clock;
  for (const Clock::time_point start = Clock::now(); busy > 0 && !interrupted();) {
    const Clock::duration waited = Clock::now() - start;
    if (waited < std::chrono::milliseconds(1))
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(waited / 16);
  }
}

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

void parallel_tasks(int64_t count, FunctionRef<void(int64_t i)> function) {
  parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) function(i);
  });
}

void parallel_problems(int64_t count, int64_t entries,
                       FunctionRef<void(int64_t i, bool split)> function) {
  const int64_t threads = std::min(count, thread_count());
  const int64_t sharing = std::min(thread_count(), entries / kSplitGrain);
  if (threads <= 1 || count < sharing) {
    const FlushDenormals flush;
    for (int64_t i = 0; i < count && !interrupted(); ++i) function(i, threads < thread_count());
    return;
  }
  std::atomic<int64_t> next{0}, busy{threads};
  parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    {
      const Leaving leaving{busy, end - begin};
      for (int64_t i = next++; i < count && !interrupted(); i = next++) function(i, false);
    }
    if (begin == 0) listen_while(busy);
  });
}

}  // namespace otloss::cpu
