// Threads and interruption, provided by the host program (bindings/host.cpp uses torch's thread pool).
#pragma once

#include <atomic>
#include <cstdint>
#include <type_traits>
#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace otloss::cpu {

// Calls function(begin, end, context) on disjoint parts of [begin, end), each at least `grain`
// long.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

int64_t thread_count();

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

// True once the user has asked to stop (Ctrl-C). Cheap enough to ask before every pass.
bool interrupted();

template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t grain, F&& function) {
  using Callable = std::remove_reference_t<F>;
  run_parallel(
      begin, end, grain,
      [](int64_t b, int64_t e, void* context) {
        const FlushDenormals flush;
        (*static_cast<Callable*>(context))(b, e);
      },
      const_cast<std::remove_const_t<Callable>*>(&function));
}

// Calls function(i) for each i in [0, count), each thread taking the next one when it is free:
// for few items of unequal cost.
template <typename F>
void parallel_tasks(int64_t count, F&& function) {
  if (count == 1) return function(int64_t{0});
  std::atomic<int64_t> next{0};
  const int64_t workers = count < thread_count() ? count : thread_count();
  parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = next++; i < count; i = next++) function(i);
  });
}

}  // namespace otloss::cpu

// One build runs on every x86-64 and uses the widest vectors the machine has: the compiler makes a
// copy of the function per instruction-set level and the loader picks one.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define OTLOSS_LEVELS  // functions may have a version for each level
#define OTLOSS_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define OTLOSS_SIMD
#endif

// The body of such a function must be inlined into each copy.
#define OTLOSS_INLINE inline __attribute__((always_inline))
// The same for lambdas.
#define OTLOSS_ALWAYS_INLINE __attribute__((always_inline))
