// Large pages for large matrices. A fresh matrix costs a page fault for every page that is written
// to; with pages of 4 KiB these take longer than several sweeps over it. Allocators give memory of
// this size back to the system, so that every call pays again.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace otloss::cpu {

constexpr int64_t kLargePage = int64_t{1} << 21;

// Asks for large pages where `bytes` at `memory` span whole ones, before anything is written there.
// Only a wish: a system that does not grant it loses nothing.
inline void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kLargePage) return;
  const auto mask = static_cast<uintptr_t>(kLargePage - 1);
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + mask) & ~mask;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~mask;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace otloss::cpu
