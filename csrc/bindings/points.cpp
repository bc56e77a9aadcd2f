#include "bindings/points.h"

#include <algorithm>
#include <array>
#include <utility>

#include <torch/csrc/stable/ops.h>

namespace otloss {

// ------------------------------------------------------------------------------------ products

#if defined(OTLOSS_WITH_CUDA)
namespace {

// (B, rows, columns) from entry `first` of a tensor's memory on, for a product: a matrix if B is 1.
struct Factor {
  const Tensor& memory;
  int64_t first, B, rows, columns;
  bool transposed = false;

  Tensor tensor() const {
    Ints sizes{rows, columns}, strides{columns, 1};
    if (transposed) std::swap(sizes[0], sizes[1]), std::swap(strides[0], strides[1]);
    if (B == 1) return view(memory, sizes, strides, first);
    return view(memory, {B, sizes[0], sizes[1]}, {rows * columns, strides[0], strides[1]}, first);
  }
};

template <typename T>
Factor factor(const Prepared<T>& clouds, int64_t c, bool transposed) {
  const CloudGroup<T>& cloud = clouds.clouds[c];
  return {clouds.memory, cloud.z - data<T>(clouds.memory), cloud.batch, cloud.n, cloud.d,
          transposed};
}

// out = left right, batched. The out= form, because autocast leaves it in the inputs' precision.
void torch_product(const Factor& left, const Factor& right, const Factor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(left.tensor()),
                                    torch::stable::detail::from(right.tensor()),
                                    torch::stable::detail::from(out.tensor())};
  const char* name = out.B == 1 ? "aten::mm" : "aten::bmm";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes ownership of the returned reference
}

// V 1, or V^T 1.
Tensor sum_over(const Tensor& V, int64_t dim) { return torch::stable::sum(V, Ints{dim}); }

}  // namespace
#endif

// --------------------------------------------------------------------------------------- costs

template <typename T>
Prepared<T> as_given(const Clouds& given) {
  Prepared<T> prepared{given.kind, given.single, {}, {}};
  for (size_t c = 0; c < given.points.size(); ++c) {
    const auto [B, n, d] = given.shape(c);
    T* const x = data<T>(given.points[c]);
    prepared.clouds.push_back({B, n, d, x, nullptr, x, nullptr});
  }
  return prepared;
}

template <typename T>
Prepared<T> prepare(const Device& device, const Clouds& given, const std::optional<Tensor>& before,
                    int64_t entries) {
  Prepared<T> prepared = as_given<T>(given);
  if (prepared.clouds.empty()) return prepared;
  int64_t points = 0;
  for (const CloudGroup<T>& cloud : prepared.clouds) points += cloud.batch * cloud.n;
  const int64_t d = prepared.clouds[0].d, count = points * (d + 1);
  if (entries == 0) entries = count;
  STD_TORCH_CHECK(entries >= count, "otloss: prepared must hold all clouds");
  if (before) check(*before, {entries}, dtype_of<T>(), "prepared");
  prepared.memory = before ? *before : empty(given.points[0], {entries});
  T *z = data<T>(prepared.memory), *norm = z + points * d;
  Tensors weights;  // without dummies
  for (size_t c = 0; c < prepared.clouds.size(); ++c) {
    CloudGroup<T>& cloud = prepared.clouds[c];
    cloud.z = z, z += cloud.batch * cloud.n * d;
    cloud.norm = norm, norm += cloud.batch * cloud.n;
    if (before || given.weights.empty()) continue;
    weights.push_back(first_entries(given.weights[c], cloud.n));
    cloud.weight = data<T>(weights.back());
  }
  if (!before) OTLOSS_LAUNCH(device, prepare_clouds, prepared.clouds, given.kind);
  return prepared;
}

template <typename T>
Tensors cost_matrices(const Device& device, const Prepared<T>& clouds, const Ints& pairs,
                      Tensor empty(const Tensor&, int64_t, int64_t, int64_t)) {
  Tensors costs;
  std::vector<CostGroup<T>> groups;
  for (size_t p = 0; p < pairs.size(); p += 2) {
    const int64_t i = pairs[p], j = pairs[p + 1];
    const CloudGroup<T>&x = clouds.clouds[i], &y = clouds.clouds[j];
    costs.push_back(empty(clouds.memory, x.batch, x.n, y.n));
#if defined(OTLOSS_WITH_CUDA)
    if (device.is_cuda() && x.d > kDirectDims)
      torch_product(factor(clouds, i, false), factor(clouds, j, true),
                    {costs.back(), 0, x.batch, x.n, y.n});
#endif
    groups.push_back({x.batch, x.n, y.n, x.d, i == j, x.z, y.z, x.norm, y.norm,
                      data<T>(costs.back()), row_stride(costs.back())});
  }
  if (!groups.empty()) OTLOSS_LAUNCH(device, cost_matrices, groups, clouds.kind);
  return costs;
}

template <typename T>
PackedCosts<T>::PackedCosts(const Clouds& clouds, const Ints& pairs) : end_(0) {
  constexpr int64_t kLine = 64 / sizeof(T);
  const auto whole = [](int64_t count) { return (count + kLine - 1) / kLine * kLine; };
  for (size_t c = 0; c < clouds.points.size(); ++c) {
    const auto [B, n, d] = clouds.shape(c);
    end_ += B * n * (d + 1);
  }
  end_ = whole(end_);
  for (size_t p = 0; p < pairs.size(); p += 2) {
    const int64_t B = clouds.shape(0)[0], n = clouds.shape(pairs[p])[1];
    const int64_t m = clouds.shape(pairs[p + 1])[1], stride = whole(m);
    matrices_.push_back({B, n, m, nullptr, stride});
    first_.push_back(end_);
    end_ += B * n * stride;
  }
}

template <typename T>
Matrix<T> PackedCosts<T>::matrix(const Tensor& memory, int64_t p) const {
  Matrix<T> C = matrices_[p];
  if (first_[p] + C.B * C.n * C.stride <= memory.numel()) C.entries = data<T>(memory) + first_[p];
  return C;
}

template <typename T>
void PackedCosts<T>::make(const Device& device, const Prepared<T>& clouds,
                          const Ints& pairs) const {
  std::vector<CostGroup<T>> groups;
  // Nothing is left as it was found: before the first matrix, and behind each.
  const CloudGroup<T>& last = clouds.clouds.back();
  T* const begin = data<T>(clouds.memory);
  std::fill(last.norm + last.batch * last.n, begin + (first_.empty() ? end_ : first_[0]), T(0));
  for (size_t p = 0; p < pairs.size(); p += 2) {
    const int64_t i = pairs[p], j = pairs[p + 1];
    const CloudGroup<T>&x = clouds.clouds[i], &y = clouds.clouds[j];
    const Matrix<T> C = matrix(clouds.memory, p / 2);
    for (T* end = C.entries + C.n * C.stride; end <= C.entries + C.B * C.n * C.stride;
         end += C.n * C.stride)
      std::fill(end - C.stride + C.m, end, T(0));
    groups.push_back({C.B, C.n, C.m, x.d, i == j, x.z, y.z, x.norm, y.norm, C.entries, C.stride});
  }
  if (!groups.empty()) OTLOSS_LAUNCH(device, cost_matrices, groups, clouds.kind);
}

// ----------------------------------------------------------------------------------- gradients

template <typename T>
PointGradients<T>::PointGradients(const Device& device, const Prepared<T>& clouds,
                                  const Ints& wanted)
    : device_(device),
      clouds_(clouds),
      wanted_(wanted),
      grads_(clouds.clouds.size()),
      terms_(clouds.clouds.size()) {}

template <typename T>
bool PointGradients<T>::wants(int64_t c) const {
  return std::find(wanted_.begin(), wanted_.end(), c) != wanted_.end();
}

template <typename T>
void PointGradients<T>::add_side(int64_t c, const T* sum, const T* product, SolvedSide<T> side) {
  const auto& [B, n, d, x, weight, z, norm] = clouds_.clouds[c];
  if (!grads_[c].defined()) grads_[c] = zeroed(clouds_.empty_points(c));
  OTLOSS_LAUNCH(device_, cost_gradient,
                CostGradientGroup<T>{B, n, d, z, norm, sum, product, data<T>(grads_[c]), side},
                clouds_.kind);
}

template <typename T>
void PointGradients<T>::add_product(int64_t c, int64_t other, const Tensor& V, bool transposed,
                                    const T* sum, SolvedSide<T> side) {
  if (!wants(c)) return;
  const CloudGroup<T>& far = clouds_.clouds[other];
#if defined(OTLOSS_WITH_CUDA)
  if (device_.is_cuda()) {
    const int64_t B = far.batch, n = clouds_.clouds[c].n, m = far.n, d = far.d;
    const Tensor product = empty(V, {B, n, d});
    torch_product({V, 0, B, transposed ? m : n, transposed ? n : m, transposed},
                  factor(clouds_, other, false), {product, 0, B, n, d});
    add_side(c, sum, data<T>(product), side);
    return;
  }
#endif
  terms_[c].push_back({far.n, transposed, data<T>(V), far.z, far.norm, sum, side});
  kept_.push_back(V);
}

template <typename T>
void PointGradients<T>::add_pair(int64_t i, int64_t j, const Matrix<T>& C, PlanWeightGroup<T> group,
                                 [[maybe_unused]] const Eps& eps) {
  if (!wants(i) && !wants(j)) return;
  STD_TORCH_CHECK(C.entries != nullptr, "otloss: there must be a cost for every gradient");
  const auto [B, n, m, entries, stride] = C;
  group.batch = B, group.n = n, group.m = m;
  group.C = entries;
  group.C_stride = stride;
#if defined(OTLOSS_WITH_CUDA)
  if (device_.is_cuda()) {
    const Tensor V = empty(clouds_.memory, {B, n, m});
    group.V = data<T>(V);
    cuda::cost_weights<T>(device_.context(), group, clouds_.kind);
    add_product(i, j, V, false, data<T>(sum_over(V, 2)), {});
    add_product(j, i, V, true, data<T>(sum_over(V, 1)), {});
    return;
  }
#endif
  const Tensor V = empty(clouds_.memory, {B * (n * m + n + m)});  // with its sums behind
  group.symmetrise = i == j;
  group.V = data<T>(V);
  group.row_sum = group.V + B * n * m;
  group.col_sum = group.row_sum + B * n;
  if (group.W != nullptr)
    OTLOSS_LAUNCH_ON_CPU(cost_weights, static_cast<const CostWeightGroup<T>&>(group), clouds_.kind);
  else
    OTLOSS_LAUNCH_ON_CPU(plan_weights, group, clouds_.kind, eps);
  add_product(i, j, V, false, group.row_sum, {group.a, group.f});
  if (i != j) add_product(j, i, V, true, group.col_sum, {group.b, group.g});
}

template <typename T>
Tensors PointGradients<T>::result() {
  std::vector<CloudGradientGroup<T>> products;
  for (size_t c = 0; c < grads_.size(); ++c) {
    if (terms_[c].empty()) continue;
    const auto& [B, n, d, x, weight, z, norm] = clouds_.clouds[c];
    grads_[c] = clouds_.empty_points(c);
    products.push_back({B, n, d, z, norm, data<T>(grads_[c]), std::move(terms_[c])});
  }
  if (!device_.is_cuda() && !products.empty()) cpu::cloud_gradients(products, clouds_.kind);
  Tensors all;
  for (const int64_t c : wanted_)
    all.push_back(grads_[c].defined() ? grads_[c] : zeroed(clouds_.empty_points(c)));
  return all;
}

#define OTLOSS_INSTANTIATE(T)                                                                 \
  template Prepared<T> as_given<T>(const Clouds&);                                            \
  template Prepared<T> prepare<T>(const Device&, const Clouds&, const std::optional<Tensor>&, \
                                  int64_t);                                                   \
  template class PackedCosts<T>;                                                              \
  template Tensors cost_matrices<T>(const Device&, const Prepared<T>&, const Ints&,           \
                                    Tensor (*)(const Tensor&, int64_t, int64_t, int64_t));    \
  template class PointGradients<T>;
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss
