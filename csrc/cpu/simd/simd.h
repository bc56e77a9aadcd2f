// One build runs on every x86-64 and uses the widest vectors the machine has: the compiler makes a
// copy of a function per instruction-set level and the loader picks one. Only loops that take time
// are worth three copies. Elsewhere there is one, for the machine that the compiler is told: on
// other processors and systems, with a C library whose loader cannot pick (musl), by other
// compilers, and under ThreadSanitizer, which is not ready yet when the loader picks.
#pragma once

#if defined(__x86_64__) && defined(__gnu_linux__) && defined(__GNUC__) && !defined(__clang__) && \
    !defined(__SANITIZE_THREAD__)
#define OTLOSS_LEVELS  // functions may have a version for each level
#define OTLOSS_SIMD __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define OTLOSS_SIMD
#endif

// The body of such a function must be inlined into each copy.
#define OTLOSS_INLINE inline __attribute__((always_inline))
// For lambdas.
#define OTLOSS_ALWAYS_INLINE __attribute__((always_inline))
