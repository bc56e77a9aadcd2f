// One build runs on every x86-64 and uses the widest vectors the machine has: a loop that takes
// time is compiled for each instruction-set level, and one version is picked, by the loader
// (OTLOSS_SIMD) or, where a test may want a lower level than the machine's, at each call
// (run_at_level). Elsewhere there is one, for the machine that the compiler is told: on other
// processors and systems, with a C library whose loader cannot pick (musl), by other compilers, and
// under ThreadSanitizer, which is not ready yet when the loader picks.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define OTLOSS_LEVELS  // functions may have a version for each level
#define OTLOSS_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#define OTLOSS_AVX512 __attribute__((target("arch=x86-64-v4")))
#define OTLOSS_AVX2 __attribute__((target("arch=x86-64-v3")))
#else
#define OTLOSS_SIMD
#define OTLOSS_AVX512
#define OTLOSS_AVX2
#endif

// The body of such a function must be inlined into each copy.
#define OTLOSS_INLINE inline __attribute__((always_inline))
// For lambdas.
#define OTLOSS_ALWAYS_INLINE __attribute__((always_inline))

namespace otloss::cpu {

enum class SimdLevel { kBaseline, kAvx2, kAvx512 };

// What the machine has, or less where the environment variable OTLOSS_SIMD (baseline, avx2, avx512)
// says so.
SimdLevel simd_level();

// Body::run<kBytes>(arguments) compiled for each level, with the length of its vectors, and called
// at the one that is in use.
template <typename Body, typename... Arguments>
OTLOSS_AVX512 void run_avx512(const Arguments&... arguments) {
  Body::template run<64>(arguments...);
}
template <typename Body, typename... Arguments>
OTLOSS_AVX2 void run_avx2(const Arguments&... arguments) {
  Body::template run<32>(arguments...);
}
template <typename Body, typename... Arguments>
void run_at_level(const Arguments&... arguments) {
#if defined(OTLOSS_LEVELS)
  switch (simd_level()) {
    case SimdLevel::kAvx512: return run_avx512<Body>(arguments...);
    case SimdLevel::kAvx2: return run_avx2<Body>(arguments...);
    case SimdLevel::kBaseline: break;
  }
#endif
  Body::template run<16>(arguments...);
}

}  // namespace otloss::cpu
