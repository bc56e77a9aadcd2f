#pragma once

#include <string>

#include "kernels.h"

namespace otloss::cuda {

// How this number of solves would be laid out, in words; d: coordinates of the points that costs
// are made from, or 0: costs are stored.
template <typename T>
std::string describe_plan(const Context& context, int64_t problems, int64_t n, int64_t m,
                          int64_t d);

}  // namespace otloss::cuda
