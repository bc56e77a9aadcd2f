// Scalar math shared by the CPU and CUDA kernels: base-2 exponential and logarithm, online LSE.
//
// The kernels work in base 2: with k = log2(e) / eps, exp((f + g - C) / eps) = exp2(k (f + g - C)).
// On the CPU, exp2 and log2 are short polynomials without branches or library calls, so that the
// compiler vectorises every loop that uses them. On the GPU they are the hardware's instructions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define OTLOSS_HOST_DEVICE __host__ __device__ __forceinline__
#define OTLOSS_HOST_DEVICE_CALL __host__ __device__ __noinline__  // large and rare
#define OTLOSS_COOPERATIVE __device__ __forceinline__             // the work of a thread of several
#else
#define OTLOSS_HOST_DEVICE inline __attribute__((always_inline))
#define OTLOSS_HOST_DEVICE_CALL inline
#define OTLOSS_COOPERATIVE inline
#endif

namespace otloss {

constexpr double kLog2E = 1.4426950408889634074;  // log2(e)
constexpr double kLn2 = 0.6931471805599453094;    // ln(2)

// log2 of a zero weight: finite, so that no inf - inf appears, and exp2 of it is negligible.
constexpr double kLog2Zero = -1e30;

// exp2 clamps its argument to [-kExp2Limit, kExp2Limit]; both ends are normal numbers in float32,
// far outside the range that the kernels trust (kTrusted), so a clamped value is never used. In
// double the lower end is further off: a plan with penalties may hold next to nothing.
constexpr double kExp2Limit = 126.0;
template <typename T>
constexpr T kExp2Least = sizeof(T) == sizeof(double) ? T(-512) : T(-126);

// Row and column sums outside [1/kTrusted, kTrusted] are recomputed with a max-shifted
// log-sum-exp. At the lower end, a million clamped terms still change the sum by less than 1e-12.
constexpr double kTrusted = 1152921504606846976.0;  // 2^60

template <typename To, typename From>
OTLOSS_HOST_DEVICE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs types of one size");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

// 2^z on [-1/2, 1/2] as 1 + z q(z), minimax in relative error: 9.2e-8 (float), 3.4e-18 (double).
OTLOSS_HOST_DEVICE float exp2_polynomial(float z) {
  float q = 0.001326464739477583225f;
  q = q * z + 0.009671517928335132316f;
  q = q * z + 0.05550734008222563574f;
  q = q * z + 0.2402224196999407753f;
  q = q * z + 0.6931469774149405957f;
  return q * z + 1.0f;
}

// 2^z - 1 on [-1/2, 1/2] as z q(z), q to 2.1e-8 (float), 3.4e-18 (double).
OTLOSS_HOST_DEVICE float exp2m1_polynomial(float z) {
  float q = 0.00015403512225020677f;
  q = q * z + 0.0013390735257416964f;
  q = q * z + 0.009618237614631653f;
  q = q * z + 0.05550357326865196f;
  q = q * z + 0.24022649228572845f;
  q = q * z + 0.6931471824645996f;
  return q * z;
}

OTLOSS_HOST_DEVICE double exp2m1_polynomial(double z) {
  double q = 4.434762438682524172e-10;
  q = q * z + 7.073784038835729919e-9;
  q = q * z + 1.017819963671766526e-7;
  q = q * z + 1.321543527718275099e-6;
  q = q * z + 0.00001525273349295222186;
  q = q * z + 0.000154035304571237976;
  q = q * z + 0.001333355814677483178;
  q = q * z + 0.009618129107594109174;
  q = q * z + 0.05550410866482008216;
  q = q * z + 0.2402265069591013129;
  q = q * z + 0.6931471805599453258;
  return q * z;
}

OTLOSS_HOST_DEVICE double exp2_polynomial(double z) { return exp2m1_polynomial(z) + 1.0; }

// t clamped by its bits: two integer operations, where a comparison that is right for NaN takes two
// or three for each end. As signed integers positive floats are ordered and above all negative
// ones; as unsigned integers negative ones are ordered by size and above all positive ones. NaN
// becomes one of the two ends, by its sign.
OTLOSS_HOST_DEVICE float clamp_exponent(float t) {
  constexpr int32_t kUpper = 0x42fc0000;    // 126
  constexpr uint32_t kLower = 0xc2fc0000u;  // -126
  const int32_t below = bit_cast<int32_t>(t) < kUpper ? bit_cast<int32_t>(t) : kUpper;
  const uint32_t bits = static_cast<uint32_t>(below);
  return bit_cast<float>(bits < kLower ? bits : kLower);
}

OTLOSS_HOST_DEVICE double clamp_exponent(double t) {
  constexpr int64_t kUpper = 0x405f800000000000;    // 126
  constexpr uint64_t kLower = 0xc080000000000000u;  // -512
  const int64_t below = bit_cast<int64_t>(t) < kUpper ? bit_cast<int64_t>(t) : kUpper;
  const uint64_t bits = static_cast<uint64_t>(below);
  return bit_cast<double>(bits < kLower ? bits : kLower);
}

// exp2(t) = 2^round(t) exp2_polynomial(t - round(t)). Adding 1.5 * 2^(mantissa bits) rounds t to an
// integer that then stands in the low bits of the sum; shifted, it adds to the exponent field.
OTLOSS_HOST_DEVICE float fast_exp2(float t) {
#if defined(__CUDA_ARCH__)
  // The special function unit, 2 ulp. Past the upper limit it gives inf, which is trusted no more.
  float p;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(fmaxf(t, -static_cast<float>(kExp2Limit))));
  return p;
#else
  constexpr float kRound = 12582912.0f;
  t = clamp_exponent(t);
  const float shifted = t + kRound;
  const float p = exp2_polynomial(t - (shifted - kRound));
  return bit_cast<float>(bit_cast<uint32_t>(p) + (bit_cast<uint32_t>(shifted) << 23));
#endif
}

OTLOSS_HOST_DEVICE double fast_exp2(double t) {
  constexpr double kRound = 6755399441055744.0;
  t = clamp_exponent(t);
  const double shifted = t + kRound;
  const double p = exp2_polynomial(t - (shifted - kRound));
  return bit_cast<double>(bit_cast<uint64_t>(p) + (bit_cast<uint64_t>(shifted) << 52));
}

// For terms of a sum that is checked: below -kExp2Limit it may also give 0, which spares the GPU an
// instruction.
OTLOSS_HOST_DEVICE float fast_exp2_unclamped(float t) {
#if defined(__CUDA_ARCH__)
  float p;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(p) : "f"(t));
  return p;
#else
  return fast_exp2(t);
#endif
}

OTLOSS_HOST_DEVICE double fast_exp2_unclamped(double t) { return fast_exp2(t); }

// 2^t - 1, to the last digits where it is small.
OTLOSS_HOST_DEVICE float fast_exp2m1(float t) {
  constexpr float kRound = 12582912.0f;
  t = clamp_exponent(t);
  const float shifted = t + kRound, whole = shifted - kRound;
  const float power = bit_cast<float>((bit_cast<uint32_t>(shifted) + 127) << 23);
  return (power - 1.0f) + power * exp2m1_polynomial(t - whole);
}

OTLOSS_HOST_DEVICE double fast_exp2m1(double t) {
  constexpr double kRound = 6755399441055744.0;
  t = clamp_exponent(t);
  const double shifted = t + kRound, whole = shifted - kRound;
  const double power = bit_cast<double>((bit_cast<uint64_t>(shifted) + 1023) << 52);
  return (power - 1.0) + power * exp2m1_polynomial(t - whole);
}

// log2(v) for normal v > 0: v = 2^e m with m in [sqrt(1/2), sqrt(2)), log2(m) by the series of
// atanh in t = (m - 1) / (m + 1), |t| <= 0.172. Relative error 3e-9 (float: rounding), 1e-18.
OTLOSS_HOST_DEVICE float fast_log2(float v) {
  constexpr uint32_t kSqrtHalf = 0x3f3504f3u;
  const uint32_t bits = bit_cast<uint32_t>(v);
  const int32_t e = static_cast<int32_t>(bits - kSqrtHalf) >> 23;
  const float m = bit_cast<float>(bits - (static_cast<uint32_t>(e) << 23));
  const float t = (m - 1.0f) / (m + 1.0f);
  const float u = t * t;
  float q = 1.0f / 9.0f;
  q = q * u + 1.0f / 7.0f;
  q = q * u + 1.0f / 5.0f;
  q = q * u + 1.0f / 3.0f;
  q = q * u + 1.0f;
  return static_cast<float>(e) + 2.8853900817779268f * t * q;
}

OTLOSS_HOST_DEVICE double fast_log2(double v) {
  constexpr uint64_t kSqrtHalf = 0x3fe6a09e667f3bcdull;
  const uint64_t bits = bit_cast<uint64_t>(v);
  const int64_t e = static_cast<int64_t>(bits - kSqrtHalf) >> 52;
  const double m = bit_cast<double>(bits - (static_cast<uint64_t>(e) << 52));
  const double t = (m - 1.0) / (m + 1.0);
  const double u = t * t;
  double q = 1.0 / 21.0;
  q = q * u + 1.0 / 19.0;
  q = q * u + 1.0 / 17.0;
  q = q * u + 1.0 / 15.0;
  q = q * u + 1.0 / 13.0;
  q = q * u + 1.0 / 11.0;
  q = q * u + 1.0 / 9.0;
  q = q * u + 1.0 / 7.0;
  q = q * u + 1.0 / 5.0;
  q = q * u + 1.0 / 3.0;
  q = q * u + 1.0;
  return static_cast<double>(e) + 2.8853900817779268 * t * q;
}

template <typename T>
OTLOSS_HOST_DEVICE T log2_weight(T w) {
  return w > T(0) ? fast_log2(w) : static_cast<T>(kLog2Zero);
}

template <typename T>
OTLOSS_HOST_DEVICE bool trusted(T sum) {
  return sum > static_cast<T>(1.0 / kTrusted) && sum < static_cast<T>(kTrusted);
}

struct TwoSums {
  double first, second;
};

// log2(sum_j 2^{t_j}) one term at a time: the running maximum and the sum relative to it.
template <typename T>
struct OnlineLse {
  T max = static_cast<T>(2 * kLog2Zero);
  T sum = T(0);

  OTLOSS_HOST_DEVICE void add(T t) {
    const T larger = t > max ? t : max;
    sum = sum * fast_exp2(max - larger) + fast_exp2(t - larger);
    max = larger;
  }

  OTLOSS_HOST_DEVICE void merge(const OnlineLse& other) {
    const T larger = other.max > max ? other.max : max;
    sum = sum * fast_exp2(max - larger) + other.sum * fast_exp2(other.max - larger);
    max = larger;
  }

  OTLOSS_HOST_DEVICE T value() const { return max + fast_log2(sum); }
};

}  // namespace otloss
