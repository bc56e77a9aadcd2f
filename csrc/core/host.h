// What the kernels ask of the program around them, which provides it (the bindings do, by torch's
// thread pool and Python's signals).
#pragma once

#include <cstdint>

namespace otloss::cpu {

// Calls function(begin, end, context) on disjoint parts of [begin, end), each at least `grain`
// long.
using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

int64_t thread_count();

// True once the user has asked to stop (Ctrl-C). Cheap enough to ask before every pass.
bool interrupted();

}  // namespace otloss::cpu
