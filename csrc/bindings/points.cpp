#include "bindings/points.h"

#include <algorithm>
#include <array>
#include <utility>

namespace otloss {

// ------------------------------------------------------------------------------------ products

#if defined(OTLOSS_WITH_CUDA)
namespace {

// A (B, rows, columns) tensor for a product: a matrix if B is 1, transposed if asked.
Tensor factor(const Tensor& t, bool transpose) {
  const int64_t rows = t.size(1), columns = t.size(2);
  Ints sizes{rows, columns}, strides{columns, 1};
  if (transpose) std::swap(sizes[0], sizes[1]), std::swap(strides[0], strides[1]);
  if (t.size(0) == 1) return view(t, sizes, strides);
  return view(t, {t.size(0), sizes[0], sizes[1]}, {rows * columns, strides[0], strides[1]});
}

// out = left right, batched, either transposed if asked. The out= form, because autocast leaves it
// in the inputs' precision.
void torch_product(const Tensor& left, bool transpose_left, const Tensor& right,
                   bool transpose_right, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(factor(left, transpose_left)),
                                    torch::stable::detail::from(factor(right, transpose_right)),
                                    torch::stable::detail::from(factor(out, false))};
  const char* name = out.size(0) == 1 ? "aten::mm" : "aten::bmm";
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "out", stack.data(), TORCH_ABI_VERSION));
  torch::stable::detail::to<Tensor>(stack[0]);  // takes ownership of the returned reference
}

}  // namespace
#endif

// --------------------------------------------------------------------------------------- costs

template <typename T>
Prepared prepare(const Device& device, const Clouds& given) {
  Prepared prepared{given.kind, {}, {}};
  Tensors weights;  // without dummies
  std::vector<CloudGroup<T>> clouds;
  for (size_t c = 0; c < given.points.size(); ++c) {
    const Tensor& x = given.points[c];
    const int64_t B = x.size(0), n = x.size(1), d = x.size(2);
    prepared.z.push_back(empty(x, {B, n, d}));
    prepared.norm.push_back(empty(x, {B, n}));
    if (!given.weights.empty()) weights.push_back(first_entries(given.weights[c], n));
    clouds.push_back({B, n, d, data<T>(x), weights.empty() ? nullptr : data<T>(weights.back()),
                      data<T>(prepared.z.back()), data<T>(prepared.norm.back())});
  }
  OTLOSS_LAUNCH(device, prepare_clouds, clouds, given.kind);
  return prepared;
}

template <typename T>
Tensors cost_matrices(const Device& device, const Prepared& clouds, const Ints& pairs,
                      Tensor empty(const Tensor&, int64_t, int64_t, int64_t)) {
  Tensors costs;
  std::vector<CostGroup<T>> groups;
  for (size_t p = 0; p < pairs.size(); p += 2) {
    const int64_t i = pairs[p], j = pairs[p + 1];
    const Tensor &zx = clouds.z[i], &zy = clouds.z[j];
    const int64_t B = zx.size(0), n = zx.size(1), m = zy.size(1), d = zx.size(2);
    costs.push_back(empty(zx, B, n, m));
#if defined(OTLOSS_WITH_CUDA)
    if (device.is_cuda() && d > kDirectDims) torch_product(zx, false, zy, true, costs.back());
#endif
    groups.push_back({B, n, m, d, i == j, data<T>(zx), data<T>(zy), data<T>(clouds.norm[i]),
                      data<T>(clouds.norm[j]), data<T>(costs.back()), row_stride(costs.back())});
  }
  if (!groups.empty()) OTLOSS_LAUNCH(device, cost_matrices, groups, clouds.kind);
  return costs;
}

// ----------------------------------------------------------------------------------- gradients

template <typename T>
PointGradients<T>::PointGradients(const Device& device, const Prepared& clouds, const Ints& wanted)
    : device_(device),
      clouds_(clouds),
      wanted_(wanted),
      grads_(clouds.z.size()),
      terms_(clouds.z.size()) {}

template <typename T>
bool PointGradients<T>::wants(int64_t c) const {
  return std::find(wanted_.begin(), wanted_.end(), c) != wanted_.end();
}

template <typename T>
void PointGradients<T>::add_side(int64_t c, const T* sum, const T* product, SolvedSide<T> side) {
  const Tensor& z = clouds_.z[c];
  const int64_t B = z.size(0), n = z.size(1), d = z.size(2);
  if (!grads_[c].defined()) grads_[c] = zeros(z, {B, n, d});
  OTLOSS_LAUNCH(device_, cost_gradient,
                CostGradientGroup<T>{B, n, d, data<T>(z), data<T>(clouds_.norm[c]), sum, product,
                                     data<T>(grads_[c]), side},
                clouds_.kind);
}

template <typename T>
void PointGradients<T>::add_product(int64_t c, int64_t other, const Tensor& V, bool transposed,
                                    const Tensor& sum, SolvedSide<T> side) {
  if (!wants(c)) return;
  const Tensor& z = clouds_.z[other];
#if defined(OTLOSS_WITH_CUDA)
  if (device_.is_cuda()) {
    const Tensor product = empty(z, {z.size(0), clouds_.z[c].size(1), z.size(2)});
    torch_product(V, transposed, z, false, product);
    add_side(c, data<T>(sum), data<T>(product), side);
    return;
  }
#endif
  terms_[c].push_back({z.size(1), transposed, data<T>(V), data<T>(z), data<T>(sum), side});
  kept_.insert(kept_.end(), {V, sum});
}

template <typename T>
void PointGradients<T>::add_pair(int64_t i, int64_t j, const Tensor& C, PlanWeightGroup<T> group,
                                 const Eps& eps) {
  if (!wants(i) && !wants(j)) return;
  const int64_t B = C.size(0), n = C.size(1), m = C.size(2);
  const Tensor V = empty(C, {B, n, m}), row_sum = empty(C, {B, n}), col_sum = empty(C, {B, m});
  group.batch = B;
  group.n = n;
  group.m = m;
  group.symmetrise = i == j;
  group.C = data<T>(C);
  group.C_stride = row_stride(C);
  group.V = data<T>(V);
  group.row_sum = data<T>(row_sum);
  group.col_sum = data<T>(col_sum);
  if (group.W != nullptr)
    OTLOSS_LAUNCH(device_, cost_weights, static_cast<const CostWeightGroup<T>&>(group),
                  clouds_.kind);
  else
    OTLOSS_LAUNCH(device_, plan_weights, group, clouds_.kind, eps);
  add_product(i, j, V, false, row_sum, {group.a, group.f});
  if (i != j) add_product(j, i, V, true, col_sum, {group.b, group.g});
}

template <typename T>
Tensors PointGradients<T>::result() {
  std::vector<CloudGradientGroup<T>> products;
  for (size_t c = 0; c < grads_.size(); ++c) {
    if (terms_[c].empty()) continue;
    const Tensor& z = clouds_.z[c];
    const int64_t B = z.size(0), n = z.size(1), d = z.size(2);
    grads_[c] = empty(z, {B, n, d});
    products.push_back(
        {B, n, d, data<T>(z), data<T>(clouds_.norm[c]), data<T>(grads_[c]), std::move(terms_[c])});
  }
  if (!device_.is_cuda() && !products.empty()) cpu::cloud_gradients(products, clouds_.kind);
  Tensors all;
  for (const int64_t c : wanted_) {
    const Tensor& z = clouds_.z[c];
    all.push_back(grads_[c].defined() ? grads_[c] : zeros(z, {z.size(0), z.size(1), z.size(2)}));
  }
  return all;
}

#define OTLOSS_INSTANTIATE(T)                                                              \
  template Prepared prepare<T>(const Device&, const Clouds&);                              \
  template Tensors cost_matrices<T>(const Device&, const Prepared&, const Ints&,           \
                                    Tensor (*)(const Tensor&, int64_t, int64_t, int64_t)); \
  template class PointGradients<T>;
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss
