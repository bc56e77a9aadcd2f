// Sizes that host and device code of csrc/cuda share; no CUDA header needed.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/math.h"

namespace otloss::cuda {

constexpr int kWarp = 32;

// What the cost model needs to know about a device.
struct Limits {
  int multiprocessors;
  int compute_capability;   // 90 for 9.0
  size_t shared_per_block;  // bytes of dynamic shared memory a block may ask for
};

OTLOSS_HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace otloss::cuda
