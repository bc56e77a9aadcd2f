#include "cpu/parallel.h"

#include <atomic>
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
  if (count == 1) return function(0);
  std::atomic<int64_t> next{0};
  const int64_t workers = count < thread_count() ? count : thread_count();
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = next++; i < count; i = next++) function(i);
  });
}

void parallel_problems(int64_t count, FunctionRef<void(int64_t i, bool split)> function) {
  if (count >= thread_count()) return parallel_tasks(count, [&](int64_t i) { function(i, false); });
  const FlushDenormals flush;
  for (int64_t i = 0; i < count; ++i) function(i, true);
}

}  // namespace otloss::cpu
