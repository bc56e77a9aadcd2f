// Where an operation runs: its device and, on a GPU, the stream and the memory of its kernels. And
// what may end it before its time, a signal, and what sees how far it is.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>

#include "bindings/tensors.h"
#include "kernels.h"

namespace pybind11 {
class object;
}

namespace otloss {

// What is called with (sweeps, error) as long solves go on, with (0, 0.0) when an operation that
// has called it ends; None: nothing.
void set_progress(const pybind11::object& callback);

// One call of an operation. Python runs signal handlers between bytecodes of its main thread only,
// so a long operation has to ask for them. An exception that a handler raises is kept, tells the
// kernels of this call to stop, and leaves the operation in place of its results. What a handler
// raises in one thread is no business of the calls of other threads.
class Call {
 public:
  Call();
  ~Call();
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  // The one that this thread works for, null outside of operations.
  static Call* current();
  // Cheap enough to be called for every block of rows, by every thread that works for the call.
  bool interrupted();
  // How far a solve is, from any thread that works for the call.
  void report(int64_t sweeps, double error);
  // Throws what a handler raised.
  void raise_interruption() const;

 private:
  class Raised;

  void show_progress();

  Call* const outer_;  // of a handler's own operations, the one that it interrupts
  const std::thread::id thread_ = std::this_thread::get_id();
  int64_t next_check_;
  std::atomic<bool> stopped_{false};
  std::atomic<int64_t> sweeps_{0};
  std::atomic<double> error_{0};
  bool shown_ = false;
  std::unique_ptr<Raised> raised_;
};

// Called once, and in every child process, whose main thread may be another.
void note_main_thread();

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
// What there is on a CPU only.
#if defined(OTLOSS_EMULATED)
#define OTLOSS_LAUNCH_ON_CPU(name, ...) static_cast<void>(0)
#else
#define OTLOSS_LAUNCH_ON_CPU(name, ...) cpu::name(__VA_ARGS__)
#endif

}  // namespace otloss
