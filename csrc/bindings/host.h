// Where an operation runs: its device and, on a GPU, the stream and the memory of its kernels.
#pragma once

#include <memory>

#include "bindings/tensors.h"
#include "kernels.h"

namespace otloss {

// Python runs signal handlers on its main thread: the one that imports the module.
void set_main_thread();

// To be called where an operation starts that Ctrl-C may end.
void clear_interruption();

// The device of an operation's tensors, made the current one while this lives.
class Device {
 public:
  // Raises unless all tensors are on the device of the first.
  Device(const Tensor& first, std::initializer_list<const Tensors*> lists);
  ~Device();
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

#if defined(OTLOSS_EMULATED)
  static constexpr bool is_cuda() { return true; }  // the CPU's launchers are not linked
#elif defined(OTLOSS_WITH_CUDA)
  bool is_cuda() const { return guard_ != nullptr; }
#else
  static constexpr bool is_cuda() { return false; }
#endif
#if defined(OTLOSS_WITH_CUDA)
  const cuda::Context& context() const { return context_; }

 private:
  class Guard;

  cuda::Context context_{};
  Tensor like_;
  Tensors scratch_;
  std::unique_ptr<Guard> guard_;
#endif
};

// Calls the launcher of that name for the device: the one place where CPU and GPU part.
#if defined(OTLOSS_WITH_CUDA)
#define OTLOSS_LAUNCH(device, name, ...) \
  ((device).is_cuda() ? cuda::name((device).context(), __VA_ARGS__) : cpu::name(__VA_ARGS__))
#else
#define OTLOSS_LAUNCH(device, name, ...) (static_cast<void>(device), cpu::name(__VA_ARGS__))
#endif

}  // namespace otloss
