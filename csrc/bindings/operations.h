// The operations, in the form that the dispatcher calls: arguments on a stack, results in their
// place. Schemas and gradients belong to Python (otloss/ops.py). Each checks layout, allocates
// outputs, fills the argument structs of kernels.h and calls a launcher.
#pragma once

#include <torch/csrc/stable/library.h>

#include "bindings/host.h"

namespace otloss {

using Operation = void(StableIValue* stack, uint64_t arguments, uint64_t results);

Operation cost, cost_backward, solve, envelope_backward, unrolled_backward, implicit_backward,
    plan_product, plan_gap, extend, grid_means, grid_solve;

// Bytes of prepared clouds that a solve on a CPU gives back, for its gradient.
constexpr int64_t kMostKept = 16 << 20;

template <Operation* operation>
void call(StableIValue* stack, uint64_t arguments, uint64_t results) {
  const Call scope;
  operation(stack, arguments, results);
}

// One set of functions serves every device.
inline void register_operations(torch::stable::detail::StableLibrary& library) {
  library.impl("cost", call<cost>);
  library.impl("cost_backward", call<cost_backward>);
  library.impl("solve", call<solve>);
  library.impl("envelope_backward", call<envelope_backward>);
  library.impl("unrolled_backward", call<unrolled_backward>);
  library.impl("implicit_backward", call<implicit_backward>);
  library.impl("plan_product", call<plan_product>);
  library.impl("plan_gap", call<plan_gap>);
  library.impl("extend", call<extend>);
  library.impl("grid_means", call<grid_means>);
}

// Those of a CPU alone.
inline void register_cpu_operations(torch::stable::detail::StableLibrary& library) {
  library.impl("grid_solve", call<grid_solve>);
}

}  // namespace otloss
