#include "bindings/host.h"

#include <Python.h>
#include <dlfcn.h>
#include <torch/csrc/stable/ops.h>
#if defined(OTLOSS_WITH_CUDA) && !defined(OTLOSS_EMULATED)
#include <torch/csrc/stable/accelerator.h>
#endif

#include <atomic>
#include <chrono>
#include <csignal>
#include <thread>

#include "cpu/parallel.h"

namespace otloss {

// ------------------------------------------------------------------------ threads, interruption

namespace {
std::thread::id main_thread;
std::atomic<bool> stop_requested{false};
std::atomic<int64_t> next_check_ns{0};
constexpr int64_t kCheckIntervalNs = 50'000'000;

int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }
}  // namespace

void set_main_thread() { main_thread = std::this_thread::get_id(); }

void clear_interruption() {
  stop_requested = false;
  next_check_ns = now_ns() + kCheckIntervalNs;
}

namespace cpu {

void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                  void* context) {
  if (end - begin <= grain) return function(begin, end, context);
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, function, context));
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

// Python runs signal handlers on its main thread only, between bytecodes: a long operation has to
// ask. The handler's exception is dropped and the signal raised again, so that it reaches Python's
// own loop as soon as the operation has returned.
bool interrupted() {
  if (stop_requested.load(std::memory_order_relaxed)) return true;
  const int64_t now = now_ns();
  if (now < next_check_ns.load(std::memory_order_relaxed)) return false;
  if (std::this_thread::get_id() != main_thread) return false;
  next_check_ns = now + kCheckIntervalNs;
  const PyGILState_STATE state = PyGILState_Ensure();
  if (PyErr_CheckSignals() != 0) {
    PyErr_Clear();
    PyErr_SetInterruptEx(SIGINT);
    stop_requested = true;
  }
  PyGILState_Release(state);
  return stop_requested;
}

}  // namespace cpu

// ------------------------------------------------------------------------------------- devices

#if defined(OTLOSS_WITH_CUDA)
#if defined(OTLOSS_EMULATED)
class Device::Guard {};
#else
class Device::Guard : public torch::stable::accelerator::DeviceGuard {
  using torch::stable::accelerator::DeviceGuard::DeviceGuard;
};

namespace {
// The one function that only a torch with CUDA has. It is asked for by name in the library that
// torch has loaded: linked to, this module would not load without CUDA, and a weak symbol stays
// unresolved, since linkers drop libtorch.so, of which nothing is used, and libtorch_cuda.so is
// reached through it alone.
AOTITorchError get_current_cuda_stream(int32_t device, void** stream) {
  using Function = AOTITorchError (*)(int32_t, void**);
  static const Function function = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(torch_cuda != nullptr,
                    "otloss: the tensors are on a CUDA device, but torch was built without CUDA");
    return reinterpret_cast<Function>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  return function(device, stream);
}
}  // namespace
#endif
#endif

Device::Device(const Tensor& first, std::initializer_list<const Tensors*> lists) {
  for (const Tensors* tensors : lists)
    for (const Tensor& t : *tensors)
      STD_TORCH_CHECK(
          t.is_cuda() == first.is_cuda() && t.get_device_index() == first.get_device_index(),
          "otloss: all tensors must be on one device");
#if defined(OTLOSS_WITH_CUDA)
#if !defined(OTLOSS_EMULATED)
  if (!first.is_cuda()) return;
  context_.device = first.get_device_index();
  guard_ = std::make_unique<Guard>(context_.device);
  TORCH_ERROR_CODE_CHECK(get_current_cuda_stream(context_.device, &context_.stream));
#endif
  like_ = first;
  context_.owner = this;
  context_.allocate = [](int64_t bytes, void* owner) {
    Device* device = static_cast<Device*>(owner);
    device->scratch_.push_back(empty(device->like_, {bytes}, aoti_torch_dtype_uint8()));
    return device->scratch_.back().mutable_data_ptr();
  };
#endif
}

Device::~Device() = default;

}  // namespace otloss
