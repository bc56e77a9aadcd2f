// Loops over threads.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "core/host.h"

namespace otloss::cpu {

// A reference to anything that can be called. Functions that take one are compiled once.
template <typename Signature>
class FunctionRef;

template <typename Result, typename... Arguments>
class FunctionRef<Result(Arguments...)> {
 public:
  template <typename F, typename = std::enable_if_t<!std::is_same_v<std::decay_t<F>, FunctionRef>>>
  FunctionRef(F&& function)  // NOLINT: converts, as std::function does
      : context_(const_cast<void*>(static_cast<const void*>(&function))),
        call_([](void* context, Arguments... arguments) -> Result {
          return (*static_cast<std::remove_reference_t<F>*>(context))(
              std::forward<Arguments>(arguments)...);
        }) {}

  Result operator()(Arguments... arguments) const {
    return call_(context_, std::forward<Arguments>(arguments)...);
  }

 private:
  void* context_;
  Result (*call_)(void*, Arguments...);
};

// Calls function(begin, end) on disjoint parts of [begin, end), each at least `grain` long.
void parallel_for(int64_t begin, int64_t end, int64_t grain,
                  FunctionRef<void(int64_t begin, int64_t end)> function);

// Calls function(i) for each i in [0, count), each thread taking the next one when it is free:
// for few items of unequal cost.
void parallel_tasks(int64_t count, FunctionRef<void(int64_t i)> function);

// Calls function(i, split) for each of some problems: in parallel, one thread each from start to
// end; when there are fewer than threads one after the other, each to be split over threads.
void parallel_problems(int64_t count, FunctionRef<void(int64_t i, bool split)> function);

}  // namespace otloss::cpu
