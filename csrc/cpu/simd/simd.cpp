#include "cpu/simd/simd.h"

#include <algorithm>
#include <cstdlib>
#include <string_view>

namespace otloss::cpu {
namespace {

SimdLevel of_machine() {
#if defined(OTLOSS_LEVELS)
  if (__builtin_cpu_supports("x86-64-v4")) return SimdLevel::kAvx512;
  if (__builtin_cpu_supports("x86-64-v3")) return SimdLevel::kAvx2;
#endif
  return SimdLevel::kBaseline;
}

SimdLevel of_environment() {
  const char* set = std::getenv("OTLOSS_SIMD");
  const std::string_view word = set ? set : "";
  if (word == "baseline") return SimdLevel::kBaseline;
  return word == "avx2" ? SimdLevel::kAvx2 : SimdLevel::kAvx512;
}

}  // namespace

SimdLevel simd_level() {
  static const SimdLevel level = std::min(of_machine(), of_environment());
  return level;
}

}  // namespace otloss::cpu
