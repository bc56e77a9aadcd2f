#include "bindings/host.h"

#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/ops.h>
#if defined(OTLOSS_WITH_CUDA) && !defined(OTLOSS_EMULATED)
#include <torch/csrc/stable/accelerator.h>
#endif

#include <chrono>
#include <exception>
#include <mutex>
#include <utility>

#include "cpu/parallel.h"

namespace otloss {

// ------------------------------------------------------------------------ threads, interruption

namespace {

constexpr int64_t kCheckIntervalNs = 50'000'000;
thread_local Call* current_call = nullptr;
unsigned long main_thread = 0;              // of Python
std::atomic<PyObject*> progress = nullptr;  // what it points to is guarded by Python's lock

int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

class WorkingFor {
 public:
  explicit WorkingFor(Call* call) : outer_(std::exchange(current_call, call)) {}
  ~WorkingFor() { current_call = outer_; }
  WorkingFor(const WorkingFor&) = delete;
  WorkingFor& operator=(const WorkingFor&) = delete;

 private:
  Call* const outer_;
};

}  // namespace

// torch's Python layer is made by pybind11, which lets an exception of this base say itself what is
// raised in Python. Everywhere else it is a runtime error.
class Call::Raised : public pybind11::builtin_exception {
 public:
  explicit Raised(const pybind11::error_already_set& error)
      : builtin_exception("otloss: a signal handler ended the operation"), error_(error) {}
  void set_error() const override { pybind11::error_already_set(error_).restore(); }

 private:
  pybind11::error_already_set error_;
};

Call::Call() : outer_(current_call), next_check_(now_ns() + kCheckIntervalNs) {
  current_call = this;
}

Call::~Call() {
  current_call = outer_;
  if (!shown_) return;
  sweeps_ = 0, error_ = 0;
  const PyGILState_STATE state = PyGILState_Ensure();
  try {
    show_progress();
  } catch (pybind11::error_already_set& error) {
    error.discard_as_unraisable("otloss.progress");
  }
  PyGILState_Release(state);
}

Call* Call::current() { return current_call; }

void note_main_thread() {
  const auto thread = pybind11::module_::import("threading").attr("main_thread")();
  main_thread = thread.attr("ident").cast<unsigned long>();
}

// Only the main thread is asked for signals: in another one Python has nothing to say, and may have
// ended, which would end the thread in the middle of the operation.
bool Call::interrupted() {
  if (stopped_.load(std::memory_order_relaxed)) return true;
  if (std::this_thread::get_id() != thread_ || now_ns() < next_check_) return false;
  if (!progress && PyThread_get_thread_ident() != main_thread) return false;
  const PyGILState_STATE state = PyGILState_Ensure();
  try {
    if (PyErr_CheckSignals() != 0) throw pybind11::error_already_set();
    if (sweeps_ > 0) show_progress();
  } catch (const pybind11::error_already_set& error) {
    raised_ = std::make_unique<Raised>(error);
    stopped_ = true;
  }
  PyGILState_Release(state);
  next_check_ = now_ns() + kCheckIntervalNs;
  return stopped_;
}

void Call::report(int64_t sweeps, double error) {
  sweeps_ = sweeps;
  error_ = error;
}

void Call::show_progress() {
  const pybind11::handle callback = progress.load();
  if (!callback) return;
  callback(sweeps_.load(), error_.load());
  shown_ = true;
}

void Call::raise_interruption() const {
  if (raised_) throw Raised(*raised_);
}

void set_progress(const pybind11::object& callback) {
  PyObject* const before = progress;
  progress = callback.is_none() ? nullptr : callback.inc_ref().ptr();
  Py_XDECREF(before);
}

namespace cpu {

// Each thread works for the call of the thread that shares its work out, and the first exception
// of any, which torch would replace by one of its own, leaves here.
void run_parallel(int64_t begin, int64_t end, int64_t grain, RangeFunction function,
                  void* context) {
  if (end - begin <= grain) return function(begin, end, context);
  struct Work {
    RangeFunction function;
    void* context;
    Call* call;
    std::once_flag failed{};
    std::exception_ptr error{};
  } work{function, context, current_call};
  const auto run = [](int64_t first, int64_t last, void* data) {
    Work& shared = *static_cast<Work*>(data);
    const WorkingFor scope(shared.call);
    try {
      shared.function(first, last, shared.context);
    } catch (...) {
      std::call_once(shared.failed, [&] { shared.error = std::current_exception(); });
    }
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, run, &work));
  if (work.error) std::rethrow_exception(work.error);
}

int64_t thread_count() { return torch::stable::get_num_threads(); }

bool interrupted() { return current_call && current_call->interrupted(); }

void report(int64_t sweeps, double error) {
  if (current_call) current_call->report(sweeps, error);
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
