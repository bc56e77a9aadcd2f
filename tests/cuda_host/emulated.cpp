// The operations of otloss by the CUDA kernels on the host: a Python module of the bindings, linked
// with csrc/cuda, all compiled under emulation.h. See tests/backends.py.
#include <pybind11/pybind11.h>

#include <memory>

#include "bindings/host.h"
#include "bindings/operations.h"
#include "cuda/device/block.cuh"
#include "kernels.h"

using torch::stable::detail::StableLibrary;

PYBIND11_MODULE(OTLOSS_MODULE, module) {
  using otloss::cuda::Emulation;
  static std::unique_ptr<StableLibrary> library;
  // While it lives, this library serves the operations on CPU tensors; the kernels registered
  // before return when it goes.
  module.def("enable", [] {
    library = std::make_unique<StableLibrary>(StableLibrary::Kind::IMPL, "otloss", "CPU", __FILE__,
                                              __LINE__);
    otloss::register_operations(*library);
  });
  module.def("disable", [] { library.reset(); });
  module.def(
      "configure",
      [](int multiprocessors, int capability, size_t shared, int order) {
        Emulation::get().limits = {multiprocessors, capability, shared};
        Emulation::get().order = static_cast<otloss::cuda::Order>(order);
      },
      pybind11::arg("multiprocessors") = 8, pybind11::arg("capability") = 90,
      pybind11::arg("shared") = 227 * 1024, pybind11::arg("order") = 0);
  module.def("launches", [] { return Emulation::get().launches; });
  module.def("describe_plan",
             [](bool is_double, int64_t problems, int64_t n, int64_t m, int64_t d) {
               const otloss::cuda::Context context{};
               return is_double ? otloss::cuda::describe_plan<double>(context, problems, n, m, d)
                                : otloss::cuda::describe_plan<float>(context, problems, n, m, d);
             });
}
