// Vectors of single precision of each instruction-set level, and calls by dimension.
#pragma once

#include <cstdint>

#include "core/math.h"
#include "cpu/simd/simd.h"
#include "kernels.h"

// Functions of vectors are all inlined: it does not matter how these would be passed.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace otloss::cpu::multiscale {

// (Not from the number itself, of which g++ 12 makes types that it cannot convert.)
template <int kBytes>
struct LaneTypes;
#define OTLOSS_LANES(kBytes)                                    \
  template <>                                                   \
  struct LaneTypes<kBytes> {                                    \
    typedef float Float __attribute__((vector_size(kBytes)));   \
    typedef int32_t Int __attribute__((vector_size(kBytes)));   \
    typedef uint32_t Bits __attribute__((vector_size(kBytes))); \
  };
OTLOSS_LANES(16)
OTLOSS_LANES(32)
OTLOSS_LANES(64)
#undef OTLOSS_LANES

template <int kBytes>
struct Lanes {
  using Float = typename LaneTypes<kBytes>::Float;
  using Int = typename LaneTypes<kBytes>::Int;
  using Bits = typename LaneTypes<kBytes>::Bits;
  static constexpr int64_t kCount = kBytes / 4;
  struct __attribute__((packed, may_alias)) Memory {
    Float vector;
  };

  static OTLOSS_INLINE Float load(const float* p) {
    return reinterpret_cast<const Memory*>(p)->vector;
  }
  static OTLOSS_INLINE void store(float* p, const Float& value) {
    reinterpret_cast<Memory*>(p)->vector = value;
  }
  static OTLOSS_INLINE float sum(const Float& value) {
    return reduce(value, [](const auto& s, const auto& t) OTLOSS_ALWAYS_INLINE { return s + t; });
  }
  static OTLOSS_INLINE float max(const Float& value) {
    return reduce(value,
                  [](const auto& s, const auto& t) OTLOSS_ALWAYS_INLINE { return s > t ? s : t; });
  }
  // By halves.
  template <typename F>
  static OTLOSS_INLINE float reduce(const Float& value, F&& both) {
    float lane[kCount];
    store(lane, value);
    if constexpr (kBytes == 16) {
      return both(both(lane[0], lane[1]), both(lane[2], lane[3]));
    } else {
      using Half = Lanes<kBytes / 2>;
      return Half::reduce(both(Half::load(lane), Half::load(lane + kCount / 2)), both);
    }
  }
  // As fast_exp2.
  static OTLOSS_INLINE Float exp2(const Float& from) {
    const Int upper = Int{} + 0x42fc0000, whole = (Int)from;
    const Int below = whole < upper ? whole : upper;
    const Bits lower = Bits{} + 0xc2fc0000u, bits = (Bits)below;
    const Bits clamped = bits < lower ? bits : lower;
    const Float t = (Float)clamped;
    const Float shifted = t + 12582912.0f, z = t - (shifted - 12582912.0f);
    Float q = 0.001326464739477583225f * z + 0.009671517928135332316f;
    q = q * z + 0.05550734008222563574f;
    q = q * z + 0.2402224196999407753f;
    q = q * z + 0.6931469774149405957f;
    q = q * z + 1.0f;
    return (Float)((Int)q + ((Int)shifted << 23));
  }
};

// Body<d>::run<kBytes>(arguments) at the level in use, for 1 <= d <= kMost.
template <template <int> class Body, int kMost = kMultiscaleDims, typename... Arguments>
void run_in_dimension(int64_t d, const Arguments&... arguments) {
  if (d == kMost)
    run_at_level<Body<kMost>>(arguments...);
  else if constexpr (kMost > 1)
    run_in_dimension<Body, kMost - 1>(d, arguments...);
}

}  // namespace otloss::cpu::multiscale
