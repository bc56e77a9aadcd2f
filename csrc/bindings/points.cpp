#include "bindings/points.h"

#include <array>

namespace otloss {

// ------------------------------------------------------------------------------------ products

namespace {

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

// V z, or V^T z.
template <typename T>
Tensor product([[maybe_unused]] const Device& device, const Tensor& V, bool transposed,
               const Tensor& z) {
  const Tensor out = empty(z, {V.size(0), V.size(transposed ? 2 : 1), z.size(2)});
#if defined(OTLOSS_WITH_CUDA)
  if (device.is_cuda()) {
    torch_product(V, transposed, z, false, out);
    return out;
  }
#endif
  cpu::multiply(ProductGroup<T>{out.size(0), out.size(1), z.size(1), z.size(2), transposed,
                                data<T>(V), data<T>(z), data<T>(out)});
  return out;
}

}  // namespace

// --------------------------------------------------------------------------------------- costs

template <typename T>
Prepared prepare(const Device& device, const Clouds& given) {
  Prepared prepared{given.kind, {}, {}};
  std::vector<CloudGroup<T>> clouds;
  for (size_t c = 0; c < given.points.size(); ++c) {
    const Tensor& x = given.points[c];
    const int64_t B = x.size(0), n = x.size(1), d = x.size(2);
    prepared.z.push_back(empty(x, {B, n, d}));
    prepared.norm.push_back(empty(x, {B, n}));
    clouds.push_back({B, n, d, data<T>(x),
                      given.weights.empty() ? nullptr : data<T>(given.weights[c]),
                      data<T>(prepared.z.back()), data<T>(prepared.norm.back())});
  }
  OTLOSS_LAUNCH(device, prepare_clouds, clouds, given.kind);
  return prepared;
}

template <typename T>
Tensors cost_matrices(const Device& device, const Prepared& clouds, const Ints& pairs) {
  Tensors costs;
  for (size_t p = 0; p < pairs.size(); p += 2) {
    const int64_t i = pairs[p], j = pairs[p + 1];
    const Tensor &zx = clouds.z[i], &zy = clouds.z[j];
    const int64_t B = zx.size(0), n = zx.size(1), m = zy.size(1), d = zx.size(2);
    costs.push_back(empty(zx, {B, n, m}));
#if defined(OTLOSS_WITH_CUDA)
    if (device.is_cuda() && d > kDirectDims) torch_product(zx, false, zy, true, costs.back());
#endif
    OTLOSS_LAUNCH(
        device, cost_matrices,
        CostGroup<T>{B, n, m, d, i == j, data<T>(zx), data<T>(zy), data<T>(clouds.norm[i]),
                     data<T>(clouds.norm[j]), data<T>(costs.back())},
        clouds.kind);
  }
  return costs;
}

// ----------------------------------------------------------------------------------- gradients

template <typename T>
PointGradients<T>::PointGradients(const Device& device, const Prepared& clouds, const Ints& wanted)
    : device_(device), clouds_(clouds), wanted_(wanted), grads_(clouds.z.size()) {
  for (const int64_t c : wanted) {
    const Tensor& z = clouds.z[c];
    grads_[c] = zeros(z, {z.size(0), z.size(1), z.size(2)});
  }
}

template <typename T>
void PointGradients<T>::add_side(int64_t c, const T* sum, const T* product, const T* weight,
                                 const T* v) const {
  const Tensor& z = clouds_.z[c];
  OTLOSS_LAUNCH(
      device_, cost_gradient,
      CostGradientGroup<T>{z.size(0), z.size(1), z.size(2), data<T>(z), data<T>(clouds_.norm[c]),
                           sum, product, data<T>(grads_[c]), weight, v},
      clouds_.kind);
}

template <typename T>
void PointGradients<T>::add_pair(int64_t i, int64_t j, const Tensor& C, PlanWeightGroup<T> group,
                                 double eps) const {
  if (!wants(i) && !wants(j)) return;
  const int64_t B = C.size(0), n = C.size(1), m = C.size(2);
  const Tensor V = empty(C, {B, n, m}), row_sum = empty(C, {B, n}), col_sum = empty(C, {B, m});
  group.batch = B;
  group.n = n;
  group.m = m;
  group.symmetrise = i == j;
  group.C = data<T>(C);
  group.V = data<T>(V);
  group.row_sum = data<T>(row_sum);
  group.col_sum = data<T>(col_sum);
  if (group.W != nullptr)
    OTLOSS_LAUNCH(device_, cost_weights, static_cast<const CostWeightGroup<T>&>(group),
                  clouds_.kind);
  else
    OTLOSS_LAUNCH(device_, plan_weights, group, clouds_.kind, eps);
  if (wants(i))
    add_side(i, data<T>(row_sum), data<T>(product<T>(device_, V, false, clouds_.z[j])), group.a,
             group.f);
  if (i != j && wants(j))
    add_side(j, data<T>(col_sum), data<T>(product<T>(device_, V, true, clouds_.z[i])), group.b,
             group.g);
}

template <typename T>
Tensors PointGradients<T>::result() const {
  Tensors all;
  for (const int64_t c : wanted_) all.push_back(grads_[c]);
  return all;
}

#define OTLOSS_INSTANTIATE(T)                                                     \
  template Prepared prepare<T>(const Device&, const Clouds&);                     \
  template Tensors cost_matrices<T>(const Device&, const Prepared&, const Ints&); \
  template class PointGradients<T>;
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss
