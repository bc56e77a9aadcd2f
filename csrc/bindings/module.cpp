// The Python module: registers the operations where it is imported, and says what was built.
#include <pybind11/pybind11.h>

#include "bindings/host.h"
#include "bindings/operations.h"
#include "bindings/points.h"
#include "cpu/simd/simd.h"
#include "kernels.h"
#if defined(OTLOSS_WITH_CUDA)
#include <torch/csrc/stable/accelerator.h>
#endif

STABLE_TORCH_LIBRARY_IMPL(otloss, CPU, library) {
  otloss::register_operations(library);
#if !defined(OTLOSS_EMULATED)
  otloss::register_cpu_operations(library);
#endif
}
#if defined(OTLOSS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(otloss, CUDA, library) { otloss::register_operations(library); }
#endif

#include <string>

namespace {

std::string simd_level() {
#if defined(OTLOSS_LEVELS)
  switch (otloss::cpu::simd_level()) {
    case otloss::cpu::SimdLevel::kAvx512: return "x86-64-v4";
    case otloss::cpu::SimdLevel::kAvx2: return "x86-64-v3";
    case otloss::cpu::SimdLevel::kBaseline: return "x86-64";
  }
#endif
  return "baseline of the build";
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  otloss::note_main_thread();
  pybind11::module_::import("os").attr("register_at_fork")(
      pybind11::arg("after_in_child") = pybind11::cpp_function(otloss::note_main_thread));
#if defined(OTLOSS_WITH_CUDA)
  // How a solve on a device would be laid out; d: 0 where costs are stored.
  module.def("describe_plan",
             [](int device, bool is_double, int64_t problems, int64_t n, int64_t m, int64_t d) {
               const torch::stable::accelerator::DeviceGuard guard(device);
               const otloss::cuda::Context context{device, nullptr, nullptr, nullptr};
               return is_double ? otloss::cuda::describe_plan<double>(context, problems, n, m, d)
                                : otloss::cuda::describe_plan<float>(context, problems, n, m, d);
             });
#endif
  module.def("set_progress", &otloss::set_progress);
  module.attr("most_kept") = otloss::kMostKept;
  module.attr("most_packed") = otloss::kMostPacked;
  module.def("build_info", [] {
    pybind11::dict info;
    info["compiler"] = std::string("C++ ") + __VERSION__;
    info["simd"] = simd_level();
#if defined(OTLOSS_WITH_CUDA)
    info["cuda_architectures"] = OTLOSS_CUDA_ARCH;
#else
    info["cuda_architectures"] = "";
#endif
    return info;
  });
}
