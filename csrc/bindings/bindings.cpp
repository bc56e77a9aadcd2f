// The bridge between torch and the kernels: checks layout, allocates outputs, fills the argument
// structs of kernels.h, calls a launcher. Schemas and gradients belong to Python (otloss/ops.py).
//
// Only LibTorch's stable ABI is used, so one build serves every later torch.
#include <Python.h>
#include <dlfcn.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/shim_utils.h>

#include <array>
#include <atomic>
#include <chrono>
#include <cmath>
#include <csignal>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "cpu/pages.h"
#include "cpu/parallel.h"
#include "kernels.h"

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;

namespace otloss {

// ------------------------------------------------------------------------ threads, interruption

namespace {
std::thread::id main_thread;
std::atomic<bool> stop_requested{false};
std::atomic<int64_t> next_check_ns{0};

int64_t now_ns() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

// Called where an operation starts.
void clear_interruption() {
  constexpr int64_t kQuietNs = 50'000'000;
  stop_requested = false;
  next_check_ns = now_ns() + kQuietNs;
}
}  // namespace

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
  constexpr int64_t kIntervalNs = 50'000'000;
  if (stop_requested.load(std::memory_order_relaxed)) return true;
  const int64_t now = now_ns();
  if (now < next_check_ns.load(std::memory_order_relaxed)) return false;
  if (std::this_thread::get_id() != main_thread) return false;
  next_check_ns = now + kIntervalNs;
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

// ------------------------------------------------------------------------------------ tensors

namespace {

std::string describe(const Tensor& t) {
  std::string text = "(";
  for (int64_t k = 0; k < t.dim(); ++k) text += (k ? ", " : "") + std::to_string(t.size(k));
  return text + ")";
}

void check(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype,
           const char* name) {
  bool good = t.dim() == static_cast<int64_t>(shape.size()) && t.is_contiguous() &&
              t.scalar_type() == dtype;
  int64_t k = 0;
  for (const int64_t size : shape) good = good && t.size(k++) == size;
  if (good) return;
  std::string expected;
  for (const int64_t size : shape)
    expected += (expected.empty() ? "" : ", ") + std::to_string(size);
  STD_TORCH_CHECK(false, "otloss: ", name, " must be contiguous, of shape (", expected,
                  ") and of one dtype with the other tensors, but is ", describe(t));
}

// Contiguous and uninitialised, on the device of `like` and of its dtype unless another is named.
// Without the dispatcher, whose share would be most of a small call.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, int32_t dtype = -1) {
  std::array<int64_t, 3> strides{};
  int64_t stride = 1;
  for (size_t k = shape.size(); k-- > 0;) {
    strides.at(k) = stride;
    stride *= shape.begin()[k];
  }
  int32_t device_type = 0, device_index = 0;
  if (dtype < 0) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.begin(),
                                                  strides.data(), dtype, device_type, device_index,
                                                  &handle));
  Tensor t(handle);
#if defined(OTLOSS_EMULATED)  // NaN: what is read before it is written shows
  std::memset(t.mutable_data_ptr(), 0xff, t.numel() * t.element_size());
#else
  if (t.is_cpu()) cpu::prefer_large_pages(t.data_ptr(), stride * t.element_size());
#endif
  return t;
}

Tensor zeros(const Tensor& like, std::initializer_list<int64_t> shape) {
  Tensor t = empty(like, shape);
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get()));
  return t;
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

#if defined(OTLOSS_WITH_CUDA) && !defined(OTLOSS_EMULATED)
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
#endif

// Where an operation runs: the device of its tensors, which it makes the current one, and on a GPU
// the current stream and the memory that kernels asked for.
class Device {
 public:
  explicit Device(std::initializer_list<Tensors> inputs) {
    const Tensor& first = inputs.begin()->at(0);
    for (const Tensors& tensors : inputs)
      for (const Tensor& t : tensors)
        STD_TORCH_CHECK(
            t.is_cuda() == first.is_cuda() && t.get_device_index() == first.get_device_index(),
            "otloss: all tensors must be on one device");
#if defined(OTLOSS_WITH_CUDA)
#if !defined(OTLOSS_EMULATED)
    if (!first.is_cuda()) return;
    is_cuda_ = true;
    context_.device = first.get_device_index();
    guard_ = std::make_unique<torch::stable::accelerator::DeviceGuard>(context_.device);
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
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

#if defined(OTLOSS_EMULATED)
  static constexpr bool is_cuda() { return true; }  // the CPU's launchers are not linked
#elif defined(OTLOSS_WITH_CUDA)
  bool is_cuda() const { return is_cuda_; }
#endif
#if defined(OTLOSS_WITH_CUDA)
  const cuda::Context& context() const { return context_; }

 private:
  bool is_cuda_ = false;
  cuda::Context context_{};
  Tensor like_;
  Tensors scratch_;
  std::unique_ptr<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// Calls the launcher of that name for the device: the one place where CPU and GPU part.
#if defined(OTLOSS_WITH_CUDA)
#define OTLOSS_LAUNCH(device, name, ...) \
  ((device).is_cuda() ? cuda::name((device).context(), __VA_ARGS__) : cpu::name(__VA_ARGS__))
#else
#define OTLOSS_LAUNCH(device, name, ...) (static_cast<void>(device), cpu::name(__VA_ARGS__))
#endif

// Calls function(T{}) for the tensors' dtype.
template <typename F>
auto dispatch_dtype(const Tensor& t, F&& function) {
  if (t.scalar_type() == ScalarType::Float) return function(float{});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double,
                  "otloss: kernels take float32 and float64 tensors");
  return function(double{});
}

// ------------------------------------------------------------------------- cost, cost_backward

// Products on a GPU are torch's own; on the CPU they are part of the kernels.
#if defined(OTLOSS_WITH_CUDA)
// A strided view of a (B, rows, columns) tensor: a matrix if B is 1, transposed if asked.
Tensor view(const Tensor& t, bool transpose) {
  const int64_t rows = t.size(1), columns = t.size(2), skip = t.size(0) == 1 ? 1 : 0;
  const std::array<int64_t, 3> sizes{t.size(0), transpose ? columns : rows,
                                     transpose ? rows : columns};
  const std::array<int64_t, 3> strides{rows * columns, transpose ? 1 : columns,
                                       transpose ? columns : 1};
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(t.get(), 3 - skip, sizes.data() + skip,
                                                        strides.data() + skip, 0, &handle));
  return Tensor(handle);
}

// out = left right, batched, either transposed if asked. The out= form, because autocast leaves it
// in the inputs' precision.
void torch_product(const Tensor& left, bool transpose_left, const Tensor& right,
                   bool transpose_right, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(view(left, transpose_left)),
                                    torch::stable::detail::from(view(right, transpose_right)),
                                    torch::stable::detail::from(view(out, false))};
  const char* name = out.size(0) == 1 ? "aten::mm" : "aten::bmm";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes ownership of the returned reference
}
#endif

// out = V z, or V^T z.
template <typename T>
void multiply([[maybe_unused]] const Device& device, const Tensor& V, bool transposed,
              const Tensor& z, const Tensor& out) {
#if defined(OTLOSS_WITH_CUDA)
  if (device.is_cuda()) return torch_product(V, transposed, z, false, out);
#endif
  cpu::multiply(ProductGroup<T>{out.size(0), out.size(1), z.size(1), z.size(2), transposed,
                                data<T>(V), data<T>(z), data<T>(out)});
}

// The clouds made ready for products: z (B, n, d) and norms (B, n).
struct Prepared {
  Tensors z, norm;
};

template <typename T>
Prepared prepare(const Device& device, const Tensors& points, const Tensors& weights,
                 CostKind kind) {
  Prepared prepared;
  std::vector<CloudGroup<T>> clouds;
  for (size_t c = 0; c < points.size(); ++c) {
    const Tensor& x = points[c];
    const int64_t B = points[0].size(0), n = x.size(1), d = points[0].size(2);
    check(x, {B, n, d}, points[0].scalar_type(), "points");
    if (!weights.empty()) check(weights.at(c), {B, n}, points[0].scalar_type(), "weights");
    prepared.z.push_back(empty(x, {B, n, d}));
    prepared.norm.push_back(empty(x, {B, n}));
    clouds.push_back({B, n, d, data<T>(x), weights.empty() ? nullptr : data<T>(weights[c]),
                      data<T>(prepared.z.back()), data<T>(prepared.norm.back())});
  }
  OTLOSS_LAUNCH(device, prepare_clouds, clouds, kind);
  return prepared;
}

// C (B, n, m) of each pair.
template <typename T>
Tensors costs_between(const Device& device, const Prepared& clouds, const Ints& pairs,
                      CostKind kind) {
  const int64_t B = clouds.z[0].size(0), d = clouds.z[0].size(2);
  Tensors costs;
  for (size_t p = 0; p + 1 < pairs.size(); p += 2) {
    const size_t i = pairs[p], j = pairs[p + 1];
    const Tensor &zx = clouds.z.at(i), &zy = clouds.z.at(j);
    const int64_t n = zx.size(1), m = zy.size(1);
    Tensor C = empty(zx, {B, n, m});
#if defined(OTLOSS_WITH_CUDA)
    if (device.is_cuda() && d > kDirectDims) torch_product(zx, false, zy, true, C);
#endif
    OTLOSS_LAUNCH(device, cost_matrices,
                  CostGroup<T>{B, n, m, d, i == j, data<T>(zx), data<T>(zy),
                               data<T>(clouds.norm[i]), data<T>(clouds.norm[j]), data<T>(C)},
                  kind);
    costs.push_back(C);
  }
  return costs;
}

Tensors cost(Tensors points, Tensors weights, Ints pairs, int64_t kind_index) {
  const Device device{points, weights};
  const CostKind kind = static_cast<CostKind>(kind_index);
  return dispatch_dtype(points.at(0), [&](auto zero) {
    using T = decltype(zero);
    return costs_between<T>(device, prepare<T>(device, points, weights, kind), pairs, kind);
  });
}

// Gradients of the clouds of `points`: those listed in `wanted` add up, the others are left out.
template <typename T>
class PointGradients {
 public:
  PointGradients(const Device& device, const Prepared& clouds, CostKind kind, const Ints& wanted)
      : device_(device), clouds_(clouds), kind_(kind), wanted_(wanted), grads_(clouds.z.size()) {
    for (const int64_t c : wanted)
      grads_.at(c) = zeros(clouds.z.at(c), {size(c, 0), size(c, 1), size(c, 2)});
  }

  bool wants(int64_t c) const { return grads_.at(c).defined(); }

  // From the sums and the product of one side of a pair, see CostGradientGroup.
  void add(int64_t c, const T* sum, const T* Vy) const {
    OTLOSS_LAUNCH(device_, cost_gradient,
                  CostGradientGroup<T>{size(c, 0), size(c, 1), size(c, 2), data<T>(clouds_.z[c]),
                                       data<T>(clouds_.norm[c]), sum, Vy, data<T>(grads_[c])},
                  kind_);
  }

  // From the cost matrix of the pair (i, j); `weigh(group)` fills V and its sums.
  template <typename Weigh>
  void add_pair(int64_t i, int64_t j, const Tensor& C, Weigh&& weigh) const {
    if (!wants(i) && !wants(j)) return;
    const int64_t B = size(i, 0), n = size(i, 1), m = size(j, 1), d = size(i, 2);
    check(C, {B, n, m}, clouds_.z[0].scalar_type(), "costs");
    const Tensor V = empty(C, {B, n, m});
    const Tensor row_sum = empty(C, {B, n}), col_sum = empty(C, {B, m});
    weigh(CostWeightGroup<T>{B, n, m, i == j, nullptr, data<T>(C), data<T>(V), data<T>(row_sum),
                             data<T>(col_sum)});
    if (wants(i)) {
      const Tensor Vy = empty(C, {B, n, d});
      multiply<T>(device_, V, false, clouds_.z[j], Vy);
      add(i, data<T>(row_sum), data<T>(Vy));
    }
    if (i != j && wants(j)) {
      const Tensor Vx = empty(C, {B, m, d});
      multiply<T>(device_, V, true, clouds_.z[i], Vx);
      add(j, data<T>(col_sum), data<T>(Vx));
    }
  }

  // In the order of `wanted`.
  Tensors result() const {
    Tensors all;
    for (const int64_t c : wanted_) all.push_back(grads_[c]);
    return all;
  }

 private:
  int64_t size(int64_t c, int64_t k) const { return clouds_.z.at(c).size(k); }

  const Device& device_;
  const Prepared& clouds_;
  CostKind kind_;
  const Ints& wanted_;
  Tensors grads_;
};

Tensors cost_backward(Tensors grad_costs, Tensors costs, Tensors points, Tensors weights,
                      Ints pairs, int64_t kind_index, Ints wanted) {
  const Device device{points, weights, costs, grad_costs};
  const CostKind kind = static_cast<CostKind>(kind_index);
  return dispatch_dtype(points.at(0), [&](auto zero) {
    using T = decltype(zero);
    const Prepared clouds = prepare<T>(device, points, weights, kind);
    const PointGradients<T> grads(device, clouds, kind, wanted);
    for (size_t p = 0; p < costs.size(); ++p)
      grads.add_pair(pairs.at(2 * p), pairs.at(2 * p + 1), costs[p], [&](CostWeightGroup<T> group) {
        check(grad_costs.at(p), {group.batch, group.n, group.m}, points[0].scalar_type(),
              "grad_costs");
        group.W = data<T>(grad_costs[p]);
        OTLOSS_LAUNCH(device, cost_weights, group, kind);
      });
    return grads.result();
  });
}

// ----------------------------------------------------------------------- solve, solve_backward

// How strongly plans are held to the weights: cloud 0 by x, every other by y, by themselves too.
struct Strengths {
  double x, y;

  bool balanced() const { return std::isinf(x) && std::isinf(y); }
  Strength of_pair(int64_t i, int64_t j) const {
    return {i == 0 ? x : y, j == 0 ? x : y, balanced()};
  }
};

using SolveResult = std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors>;

// What both forms of solve share. `place(group, p, i, j)` says where the costs of pair p come from;
// init: f and g of each pair in turn, or nothing.
template <typename T, typename Place>
SolveResult solve_groups(const Device& device, const Tensors& weights, const Ints& pairs,
                         const Doubles& coefficients, const Tensors& init, const Strengths& rho,
                         const SolveOptions& options, bool trace, Place&& place) {
  constexpr ScalarType dtype = sizeof(T) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
  const int64_t P = coefficients.size(), B = weights.at(0).size(0);
  const Tensor values = empty(weights[0], {P, B});
  const Tensor status = empty(weights[0], {P, B, kStatusFields}, aoti_torch_dtype_float64());
  Tensors all_f, all_g, traces;
  std::vector<SolveGroup<T>> groups;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t i = pairs.at(2 * p), j = pairs.at(2 * p + 1);
    const Tensor &a = weights.at(i), &b = weights.at(j);
    const int64_t n = a.size(1), m = b.size(1);
    check(a, {B, n}, dtype, "weights");
    check(b, {B, m}, dtype, "weights");
    all_f.push_back(init.empty() ? empty(a, {B, n}) : torch::stable::clone(init.at(2 * p)));
    all_g.push_back(init.empty() ? empty(b, {B, m}) : torch::stable::clone(init.at(2 * p + 1)));
    check(all_f.back(), {B, n}, dtype, "init");
    check(all_g.back(), {B, m}, dtype, "init");
    if (trace) traces.push_back(empty(a, {B, options.n_iters, n + m}));
    SolveGroup<T> group{B,
                        n,
                        m,
                        i == j,
                        nullptr,
                        {},
                        data<T>(a),
                        data<T>(b),
                        data<T>(all_f.back()),
                        data<T>(all_g.back()),
                        trace ? data<T>(traces.back()) : nullptr,
                        data<T>(values) + p * B,
                        data<double>(status) + p * B * kStatusFields,
                        rho.of_pair(i, j)};
    place(group, p, i, j);
    groups.push_back(group);
  }
  clear_interruption();
  OTLOSS_LAUNCH(device, solve, groups, options);
  const Tensor loss = empty(values, {B});
#if defined(OTLOSS_WITH_CUDA)
  if (device.is_cuda()) {
    cuda::combine_values(device.context(), coefficients, data<T>(values), B, data<T>(loss));
    return SolveResult{loss, status, all_f, all_g, traces};
  }
#endif
  for (int64_t k = 0; k < B; ++k) {
    T sum = 0;
    for (int64_t p = 0; p < P; ++p)
      sum += static_cast<T>(coefficients[p]) * data<T>(values)[p * B + k];
    data<T>(loss)[k] = sum;
  }
  return SolveResult{loss, status, all_f, all_g, traces};
}

SolveOptions solve_options(double eps, double tol, int64_t max_iters, int64_t n_iters,
                           int64_t objective, bool warm_start) {
  SolveOptions options;
  options.eps = eps;
  options.tol = tol;
  options.max_iters = max_iters;
  options.n_iters = n_iters;
  options.objective = static_cast<Objective>(objective);
  options.warm_start = warm_start;
  return options;
}

SolveResult solve(Tensors costs, Tensors weights, Ints pairs, Doubles coefficients, Tensors init,
                  double eps, double rho_x, double rho_y, double tol, int64_t max_iters,
                  int64_t n_iters, int64_t objective, bool trace) {
  const Device device{costs, weights, init};
  const Strengths rho{rho_x, rho_y};
  const SolveOptions options =
      solve_options(eps, tol, max_iters, n_iters, objective, !init.empty());
  return dispatch_dtype(costs.at(0), [&](auto zero) {
    using T = decltype(zero);
    return solve_groups<T>(device, weights, pairs, coefficients, init, rho, options, trace,
                           [&](SolveGroup<T>& group, int64_t p, int64_t, int64_t) {
                             check(costs.at(p), {group.batch, group.n, group.m},
                                   costs[0].scalar_type(), "costs");
                             group.C = data<T>(costs[p]);
                           });
  });
}

template <typename T>
PointPair<T> point_pair(const Prepared& clouds, CostKind kind, int64_t i, int64_t j,
                        bool tf32 = false) {
  return {kind,
          clouds.z.at(i).size(2),
          data<T>(clouds.z[i]),
          data<T>(clouds.z.at(j)),
          data<T>(clouds.norm[i]),
          data<T>(clouds.norm[j]),
          tf32};
}

// The same from points: returns the cost matrices too if they are to be stored (`dense`).
std::tuple<Tensor, Tensor, Tensors, Tensors, Tensors, Tensors> solve_points(
    Tensors points, Tensors weights, Ints pairs, Doubles coefficients, Tensors init,
    int64_t kind_index, bool dense, double eps, double rho_x, double rho_y, double tol,
    int64_t max_iters, int64_t n_iters, int64_t objective, bool trace, bool tf32) {
  const Device device{points, weights, init};
  const CostKind kind = static_cast<CostKind>(kind_index);
  const Strengths rho{rho_x, rho_y};
  const SolveOptions options =
      solve_options(eps, tol, max_iters, n_iters, objective, !init.empty());
  return dispatch_dtype(points.at(0), [&](auto zero) {
    using T = decltype(zero);
    const Prepared clouds = prepare<T>(device, points, weights, kind);
    const Tensors costs = dense ? costs_between<T>(device, clouds, pairs, kind) : Tensors();
    return std::tuple_cat(
        solve_groups<T>(device, weights, pairs, coefficients, init, rho, options, trace,
                        [&](SolveGroup<T>& group, int64_t p, int64_t i, int64_t j) {
                          if (dense) group.C = data<T>(costs[p]);
                          group.points = point_pair<T>(clouds, kind, i, j, tf32);
                        }),
        std::make_tuple(costs));
  });
}

// Per pair: the gradients of C, a and b, empty where not wanted; a matrix whose gradient is not
// wanted may be left out of envelope_backward.
struct Gradients {
  Tensors C, a, b;
};

// What every gradient of a solve takes. `costs` and `want_cost` are empty where costs are made from
// points.
struct GradientArguments {
  const Tensor& grad_loss;
  const Tensors& costs;
  const Tensors& weights;
  const Ints& pairs;
  const Doubles& coefficients;
  const Ints& want_cost;
  bool want_weights;
  Strengths rho;
};

// Checks and allocates for pair p and describes it to the kernels, but for f and g.
template <typename T>
EnvelopeGroup<T> gradient_group(const GradientArguments& given, int64_t p, bool reads_cost,
                                Gradients& out) {
  const ScalarType dtype = given.grad_loss.scalar_type();
  const Tensor& a = given.weights.at(given.pairs.at(2 * p));
  const Tensor& b = given.weights.at(given.pairs.at(2 * p + 1));
  const int64_t B = given.grad_loss.size(0), n = a.size(1), m = b.size(1);
  check(given.grad_loss, {B}, dtype, "grad_loss");
  check(a, {B, n}, dtype, "weights");
  check(b, {B, m}, dtype, "weights");
  const bool with_cost = !given.costs.empty() && given.want_cost.at(p) != 0;
  const bool with_weights = given.want_weights;
  const T* C = given.costs.empty() ? nullptr : data<T>(given.costs.at(p));
  if (C && (reads_cost || with_cost)) check(given.costs[p], {B, n, m}, dtype, "costs");
  out.C.push_back(with_cost ? empty(a, {B, n, m}) : empty(a, {0}));
  out.a.push_back(with_weights ? empty(a, {B, n}) : empty(a, {0}));
  out.b.push_back(with_weights ? empty(a, {B, m}) : empty(a, {0}));
  return {B,
          n,
          m,
          C,
          data<T>(a),
          data<T>(b),
          nullptr,
          nullptr,
          data<T>(given.grad_loss),
          static_cast<T>(given.coefficients.at(p)),
          with_cost ? data<T>(out.C.back()) : nullptr,
          with_weights ? data<T>(out.a.back()) : nullptr,
          with_weights ? data<T>(out.b.back()) : nullptr,
          given.rho.of_pair(given.pairs[2 * p], given.pairs[2 * p + 1])};
}

// The p-th of a list of (B, size) tensors, null if the list is empty.
template <typename T>
const T* optional_data(const Tensors& list, int64_t p, int64_t B, int64_t size, ScalarType dtype,
                       const char* name) {
  if (list.empty()) return nullptr;
  check(list.at(p), {B, size}, dtype, name);
  return data<T>(list[p]);
}

std::tuple<Tensors, Tensors, Tensors> envelope_backward(Tensor grad_loss, Tensors costs,
                                                        Tensors weights, Ints pairs,
                                                        Doubles coefficients, Tensors f, Tensors g,
                                                        double eps, double rho_x, double rho_y,
                                                        int64_t objective, Ints want_cost,
                                                        bool want_weights) {
  const Device device{{grad_loss}, costs, weights, f, g};
  return dispatch_dtype(grad_loss, [&](auto zero) {
    using T = decltype(zero);
    const ScalarType dtype = grad_loss.scalar_type();
    const GradientArguments given{grad_loss,    costs,     weights,      pairs,
                                  coefficients, want_cost, want_weights, {rho_x, rho_y}};
    Gradients grads;
    std::vector<EnvelopeGroup<T>> groups;
    for (size_t p = 0; p < costs.size(); ++p) {
      EnvelopeGroup<T> group = gradient_group<T>(given, p, false, grads);
      check(f.at(p), {group.batch, group.n}, dtype, "f");
      check(g.at(p), {group.batch, group.m}, dtype, "g");
      group.f = data<T>(f[p]), group.g = data<T>(g[p]);
      groups.push_back(group);
    }
    OTLOSS_LAUNCH(device, envelope_backward, groups, eps, static_cast<Objective>(objective));
    return std::make_tuple(grads.C, grads.a, grads.b);
  });
}

// The groups of unrolled_backward; `place(group, p)` says where the costs of pair p are. grad_f,
// grad_g: one per pair, or nothing; init likewise, f and g of each pair in turn.
template <typename T, typename Place>
std::vector<UnrolledGroup<T>> unrolled_groups(const GradientArguments& given, const Tensors& grad_f,
                                              const Tensors& grad_g, const Tensors& init,
                                              const Tensors& traces, Gradients& grads,
                                              Place&& place) {
  const ScalarType dtype = given.grad_loss.scalar_type();
  std::vector<UnrolledGroup<T>> groups;
  for (size_t p = 0; p < given.coefficients.size(); ++p) {
    const EnvelopeGroup<T> group = gradient_group<T>(given, p, true, grads);
    const int64_t B = group.batch, n = group.n, m = group.m, L = traces.at(p).size(1);
    check(traces[p], {B, L, n + m}, dtype, "traces");
    const T* start = nullptr;
    if (!init.empty()) {
      check(init.at(2 * p + 1), {B, m}, dtype, "init");
      start = data<T>(init[2 * p + 1]);
    }
    groups.push_back({group, optional_data<T>(grad_f, p, B, n, dtype, "grad_f"),
                      optional_data<T>(grad_g, p, B, m, dtype, "grad_g"), L, data<T>(traces[p]),
                      start});
    place(groups.back(), p);
  }
  return groups;
}

std::tuple<Tensors, Tensors, Tensors> unrolled_backward(
    Tensor grad_loss, Tensors grad_f, Tensors grad_g, Tensors costs, Tensors weights, Ints pairs,
    Doubles coefficients, Tensors init, Tensors traces, double eps, double rho_x, double rho_y,
    int64_t objective, Ints want_cost, bool want_weights) {
  const Device device{{grad_loss}, grad_f, grad_g, costs, weights, init, traces};
  clear_interruption();
  return dispatch_dtype(grad_loss, [&](auto zero) {
    using T = decltype(zero);
    const GradientArguments given{grad_loss,    costs,     weights,      pairs,
                                  coefficients, want_cost, want_weights, {rho_x, rho_y}};
    Gradients grads;
    const auto groups = unrolled_groups<T>(given, grad_f, grad_g, init, traces, grads,
                                           [](UnrolledGroup<T>&, int64_t) {});
    OTLOSS_LAUNCH(device, unrolled_backward, groups, eps, static_cast<Objective>(objective));
    return std::make_tuple(grads.C, grads.a, grads.b);
  });
}

// The groups of implicit_backward. `status` (P, B, fields) is allocated; `place(group, p)` says
// where the costs of pair p and its plan are.
template <typename T, typename Place>
std::vector<ImplicitGroup<T>> implicit_groups(const GradientArguments& given, const Tensors& grad_f,
                                              const Tensors& grad_g, const Tensors& f,
                                              const Tensors& g, Tensor& status, Gradients& grads,
                                              Place&& place) {
  const ScalarType dtype = given.grad_loss.scalar_type();
  const int64_t P = given.coefficients.size(), B = given.grad_loss.size(0);
  status = empty(given.grad_loss, {P, B, kImplicitStatusFields}, aoti_torch_dtype_float64());
  std::vector<ImplicitGroup<T>> groups;
  for (int64_t p = 0; p < P; ++p) {
    EnvelopeGroup<T> group = gradient_group<T>(given, p, true, grads);
    const int64_t n = group.n, m = group.m;
    check(f.at(p), {B, n}, dtype, "f");
    check(g.at(p), {B, m}, dtype, "g");
    group.f = data<T>(f[p]), group.g = data<T>(g[p]);
    groups.push_back({group, optional_data<T>(grad_f, p, B, n, dtype, "grad_f"),
                      optional_data<T>(grad_g, p, B, m, dtype, "grad_g"),
                      given.pairs[2 * p] == given.pairs[2 * p + 1], nullptr,
                      data<double>(status) + p * B * kImplicitStatusFields});
    place(groups.back(), p);
  }
  return groups;
}

std::tuple<Tensors, Tensors, Tensors, Tensor> implicit_backward(
    Tensor grad_loss, Tensors grad_f, Tensors grad_g, Tensors costs, Tensors weights, Ints pairs,
    Doubles coefficients, Tensors f, Tensors g, double eps, double rho_x, double rho_y,
    int64_t objective, Ints want_cost, bool want_weights) {
  const Device device{{grad_loss}, grad_f, grad_g, costs, weights, f, g};
  clear_interruption();
  return dispatch_dtype(grad_loss, [&](auto zero) {
    using T = decltype(zero);
    const GradientArguments given{grad_loss,    costs,     weights,      pairs,
                                  coefficients, want_cost, want_weights, {rho_x, rho_y}};
    Tensor status;
    Gradients grads;
    Tensors scratch;  // plans of pairs whose cost gradient, which could hold them, is not wanted
    const auto groups = implicit_groups<T>(
        given, grad_f, grad_g, f, g, status, grads, [&](ImplicitGroup<T>& group, int64_t) {
          if (!group.grad_C) scratch.push_back(empty(grad_loss, {group.batch, group.n, group.m}));
          group.P = group.grad_C ? group.grad_C : data<T>(scratch.back());
        });
    OTLOSS_LAUNCH(device, implicit_backward, groups, eps, static_cast<Objective>(objective));
    return std::make_tuple(grads.C, grads.a, grads.b, status);
  });
}

// Where costs are made from points on the way: what pairs need, and the points' gradients from it.
template <typename T>
class MadeCosts {
 public:
  MadeCosts(const Device& device, const Tensors& points, const Tensors& weights, const Ints& pairs,
            CostKind kind, const Ints& wanted)
      : clouds_(prepare<T>(device, points, weights, kind)),
        pairs_(pairs),
        kind_(kind),
        grads_(device, clouds_, kind, wanted) {}

  MadeCost<T> pair(int64_t p) {
    const int64_t i = pairs_.at(2 * p), j = pairs_.at(2 * p + 1);
    return {point_pair<T>(clouds_, kind_, i, j), i == j, side(i),
            i == j ? PointSums<T>{} : side(j)};
  }

  // Of the wanted clouds, in their order.
  Tensors gradients() const {
    for (const Side& side : sides_)
      grads_.add(side.cloud, data<T>(side.sum), data<T>(side.product));
    return grads_.result();
  }

 private:
  struct Side {
    int64_t cloud;
    Tensor sum, product;
  };

  PointSums<T> side(int64_t c) {
    if (!grads_.wants(c)) return {};
    const Tensor& z = clouds_.z[c];
    const int64_t B = z.size(0), n = z.size(1), d = z.size(2);
    sides_.push_back({c, empty(z, {B, n}), empty(z, {B, n, d})});
    return {data<T>(sides_.back().sum), data<T>(sides_.back().product)};
  }

  Prepared clouds_;
  const Ints& pairs_;
  CostKind kind_;
  PointGradients<T> grads_;
  std::vector<Side> sides_;
};

// Gradients of the clouds listed in `wanted`, in that order, and of the weights of each pair.
std::tuple<Tensors, Tensors, Tensors, Tensor> implicit_backward_points(
    Tensor grad_loss, Tensors grad_f, Tensors grad_g, Tensors points, Tensors weights, Ints pairs,
    Doubles coefficients, Tensors f, Tensors g, int64_t kind, double eps, double rho_x,
    double rho_y, int64_t objective, Ints wanted, bool want_weights) {
  const Device device{{grad_loss}, grad_f, grad_g, points, weights, f, g};
  clear_interruption();
  return dispatch_dtype(grad_loss, [&](auto zero) {
    using T = decltype(zero);
    const GradientArguments given{grad_loss,    {}, weights,      pairs,
                                  coefficients, {}, want_weights, {rho_x, rho_y}};
    MadeCosts<T> made(device, points, weights, pairs, static_cast<CostKind>(kind), wanted);
    Tensor status;
    Gradients grads;
    const auto groups =
        implicit_groups<T>(given, grad_f, grad_g, f, g, status, grads,
                           [&](ImplicitGroup<T>& group, int64_t p) { group.made = made.pair(p); });
    OTLOSS_LAUNCH(device, implicit_backward, groups, eps, static_cast<Objective>(objective));
    return std::make_tuple(made.gradients(), grads.a, grads.b, status);
  });
}

std::tuple<Tensors, Tensors, Tensors> unrolled_backward_points(
    Tensor grad_loss, Tensors grad_f, Tensors grad_g, Tensors points, Tensors weights, Ints pairs,
    Doubles coefficients, Tensors init, Tensors traces, int64_t kind, double eps, double rho_x,
    double rho_y, int64_t objective, Ints wanted, bool want_weights) {
  const Device device{{grad_loss}, grad_f, grad_g, points, weights, init, traces};
  clear_interruption();
  return dispatch_dtype(grad_loss, [&](auto zero) {
    using T = decltype(zero);
    const GradientArguments given{grad_loss,    {}, weights,      pairs,
                                  coefficients, {}, want_weights, {rho_x, rho_y}};
    MadeCosts<T> made(device, points, weights, pairs, static_cast<CostKind>(kind), wanted);
    Gradients grads;
    const auto groups =
        unrolled_groups<T>(given, grad_f, grad_g, init, traces, grads,
                           [&](UnrolledGroup<T>& group, int64_t p) { group.made = made.pair(p); });
    OTLOSS_LAUNCH(device, unrolled_backward, groups, eps, static_cast<Objective>(objective));
    return std::make_tuple(made.gradients(), grads.a, grads.b);
  });
}

// What the gradient of a solution takes, checked where a pair is looked at.
struct Solution {
  const Tensor& grad_loss;
  const Tensors &weights, &f, &g;
  const Ints& pairs;
  const Doubles& coefficients;
  double eps;

  void check_pair(int64_t p) const {
    const ScalarType dtype = grad_loss.scalar_type();
    const Tensor &a = weights.at(pairs.at(2 * p)), &b = weights.at(pairs.at(2 * p + 1));
    const int64_t B = grad_loss.size(0);
    check(grad_loss, {B}, dtype, "grad_loss");
    check(a, {B, a.size(1)}, dtype, "weights");
    check(b, {B, b.size(1)}, dtype, "weights");
    check(f.at(p), {B, a.size(1)}, dtype, "f");
    check(g.at(p), {B, b.size(1)}, dtype, "g");
  }
};

// By the stored cost matrices.
template <typename T>
void add_dense(const Device& device, const Solution& s, const Tensors& costs, CostKind kind,
               const PointGradients<T>& grads) {
  for (size_t p = 0; p < costs.size(); ++p) {
    const int64_t i = s.pairs.at(2 * p), j = s.pairs.at(2 * p + 1);
    s.check_pair(p);
    grads.add_pair(i, j, costs[p], [&](const CostWeightGroup<T>& group) {
      OTLOSS_LAUNCH(device, plan_weights,
                    PlanWeightGroup<T>{group, data<T>(s.weights[i]), data<T>(s.weights[j]),
                                       data<T>(s.f[p]), data<T>(s.g[p]), data<T>(s.grad_loss),
                                       static_cast<T>(s.coefficients[p])},
                    kind, s.eps);
    });
  }
}

// Without cost matrices: both sides of each pair apart, as rows.
template <typename T>
void add_streamed(const Device& device, const Solution& s, const Prepared& clouds, CostKind kind,
                  bool tf32, const PointGradients<T>& grads) {
  const int64_t P = s.coefficients.size(), B = s.grad_loss.size(0), d = clouds.z.at(0).size(2);
  Tensors kept;
  std::vector<PointGradientGroup<T>> groups;
  Ints receiver;
  const auto side = [&](int64_t p, int64_t i, int64_t j, const Tensor& fi, const Tensor& gj) {
    if (!grads.wants(i)) return;
    const Tensor &a = s.weights.at(i), &b = s.weights.at(j);
    const int64_t n = a.size(1), m = b.size(1);
    kept.push_back(empty(a, {B, n}));
    kept.push_back(empty(a, {B, n, d}));
    groups.push_back({B, n, m, i == j, point_pair<T>(clouds, kind, i, j, tf32), data<T>(a),
                      data<T>(b), data<T>(fi), data<T>(gj), data<T>(s.grad_loss),
                      static_cast<T>(s.coefficients[p]), data<T>(kept[kept.size() - 2]),
                      data<T>(kept.back())});
    receiver.push_back(i);
  };
  for (int64_t p = 0; p < P; ++p) {
    s.check_pair(p);
    const int64_t i = s.pairs[2 * p], j = s.pairs[2 * p + 1];
    side(p, i, j, s.f[p], s.g[p]);
    side(p, j, i, s.g[p], s.f[p]);
  }
  OTLOSS_LAUNCH(device, point_gradient_sums, groups, s.eps);
  for (size_t k = 0; k < groups.size(); ++k)
    grads.add(receiver[k], groups[k].sum, groups[k].product);
}

// Gradients of the clouds listed in `wanted`, in that order; `costs` empty: they are not stored.
Tensors envelope_backward_points(Tensor grad_loss, Tensors costs, Tensors points, Tensors weights,
                                 Ints pairs, Doubles coefficients, Tensors f, Tensors g,
                                 int64_t kind_index, double eps, Ints wanted, bool tf32) {
  const Device device{{grad_loss}, costs, points, weights, f, g};
  const CostKind kind = static_cast<CostKind>(kind_index);
  return dispatch_dtype(grad_loss, [&](auto zero) {
    using T = decltype(zero);
    const Prepared clouds = prepare<T>(device, points, weights, kind);
    const PointGradients<T> grads(device, clouds, kind, wanted);
    const Solution solution{grad_loss, weights, f, g, pairs, coefficients, eps};
    if (costs.empty())
      add_streamed<T>(device, solution, clouds, kind, tf32, grads);
    else
      add_dense<T>(device, solution, costs, kind, grads);
    return grads.result();
  });
}

}  // namespace
}  // namespace otloss

namespace {
void register_operations(torch::stable::detail::StableLibrary& library) {
  library.impl("cost", TORCH_BOX(&otloss::cost));
  library.impl("cost_backward", TORCH_BOX(&otloss::cost_backward));
  library.impl("solve", TORCH_BOX(&otloss::solve));
  library.impl("solve_points", TORCH_BOX(&otloss::solve_points));
  library.impl("envelope_backward", TORCH_BOX(&otloss::envelope_backward));
  library.impl("unrolled_backward", TORCH_BOX(&otloss::unrolled_backward));
  library.impl("implicit_backward", TORCH_BOX(&otloss::implicit_backward));
  library.impl("envelope_backward_points", TORCH_BOX(&otloss::envelope_backward_points));
  library.impl("unrolled_backward_points", TORCH_BOX(&otloss::unrolled_backward_points));
  library.impl("implicit_backward_points", TORCH_BOX(&otloss::implicit_backward_points));
}
}  // namespace

#if !defined(OTLOSS_EMULATED)
STABLE_TORCH_LIBRARY_IMPL(otloss, CPU, library) { register_operations(library); }
#if defined(OTLOSS_WITH_CUDA)
STABLE_TORCH_LIBRARY_IMPL(otloss, CUDA, library) { register_operations(library); }
#endif

// ------------------------------------------------------------------------------- introspection

namespace {

std::string simd_level() {
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw"))
    return "x86-64-v4";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "x86-64-v3";
  return "x86-64";
#else
  return "baseline of the build";
#endif
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  otloss::main_thread = std::this_thread::get_id();
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
#endif  // OTLOSS_EMULATED
