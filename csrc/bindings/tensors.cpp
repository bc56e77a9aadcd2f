#include "bindings/tensors.h"

#include <torch/csrc/stable/ops.h>

#include <array>
#include <cstring>
#include <string>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace otloss {
namespace {

std::string in_words(const int64_t* sizes, int64_t count) {
  std::string text = "(";
  for (int64_t k = 0; k < count; ++k) text += (k ? ", " : "") + std::to_string(sizes[k]);
  return text + ")";
}

std::string shape_of(const Tensor& t) { return in_words(t.sizes().data(), t.dim()); }

// Large pages for large matrices. A fresh matrix costs a page fault for every page that is written
// to; with pages of 4 KiB these take longer than several sweeps over it. Allocators give memory of
// this size back to the system, so that every call pays again.
constexpr int64_t kLargePage = int64_t{1} << 21;

// Asks for large pages where `bytes` at `memory` span whole ones, before anything is written there.
// Only a wish: a system that does not grant it loses nothing.
[[maybe_unused]] void prefer_large_pages([[maybe_unused]] void* memory,
                                         [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < 2 * kLargePage) return;
  const auto mask = static_cast<uintptr_t>(kLargePage - 1);
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + mask) & ~mask;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) & ~mask;
  madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
#endif
}

}  // namespace

namespace {

void check_layout(const Tensor& t, bool layout, std::initializer_list<int64_t> shape,
                  ScalarType dtype, const char* name) {
  bool good = layout && t.dim() == static_cast<int64_t>(shape.size()) && t.scalar_type() == dtype;
  int64_t k = 0;
  for (const int64_t size : shape) good = good && t.size(k++) == size;
  STD_TORCH_CHECK(good, "otloss: ", name, " must be contiguous, of shape ",
                  in_words(shape.begin(), static_cast<int64_t>(shape.size())),
                  " and of one dtype with the other tensors, but is ", shape_of(t));
  // What torch keeps without memory, such as zeros of its own, comes as a null pointer.
  STD_TORCH_CHECK(t.const_data_ptr() != nullptr, "otloss: ", name, " must not be empty, but is ",
                  shape_of(t));
}

}  // namespace

void check(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype,
           const char* name) {
  check_layout(t, t.is_contiguous(), shape, dtype, name);
}

void check_rows(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype,
                const char* name) {
  check_layout(t, t.dim() == 3 && row_stride(t) > 0, shape, dtype, name);
}

void check_dims(const Tensor& t, int64_t dims, const char* name) {
  STD_TORCH_CHECK(t.dim() == dims, "otloss: ", name, " must have ", std::to_string(dims),
                  " dimensions, but is ", shape_of(t));
}

void check_count(size_t count, size_t expected, const char* name) {
  STD_TORCH_CHECK(count == expected, "otloss: ", name, " must have ", std::to_string(expected),
                  " entries, but has ", std::to_string(count));
}

void check_indices(const Ints& indices, size_t count, const char* name) {
  for (const int64_t k : indices)
    STD_TORCH_CHECK(k >= 0 && k < static_cast<int64_t>(count), "otloss: ", name, " must be in [0, ",
                    std::to_string(count), "), but one is ", std::to_string(k));
}

namespace {

Tensor strided(const Tensor& like, std::initializer_list<int64_t> shape, const int64_t* strides,
               int64_t count, int32_t dtype) {
  int32_t device_type = 0, device_index = 0;
  if (dtype < 0) TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle = nullptr;
  const auto dims = static_cast<int64_t>(shape.size());
  const bool made = aoti_torch_empty_strided(dims, shape.begin(), strides, dtype, device_type,
                                             device_index, &handle) == AOTI_TORCH_SUCCESS;
  // In torch's words, by which programs know that a smaller batch may help.
  STD_TORCH_CHECK(made, "otloss: ",
                  device_type == aoti_torch_device_type_cpu()
                      ? "DefaultCPUAllocator: can't allocate memory"
                      : "CUDA out of memory.",
                  " for a tensor of shape ", in_words(shape.begin(), dims));
  Tensor t(handle);
#if defined(OTLOSS_EMULATED)
  std::memset(t.mutable_data_ptr(), 0xff, count * t.element_size());
#else
  if (t.is_cpu()) prefer_large_pages(t.mutable_data_ptr(), count * t.element_size());
#endif
  return t;
}

}  // namespace

Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, int32_t dtype) {
  std::array<int64_t, 3> strides{};
  int64_t count = 1;
  for (size_t k = shape.size(); k-- > 0;) {
    strides.at(k) = count;
    count *= shape.begin()[k];
  }
  return strided(like, shape, strides.data(), count, dtype);
}

Tensor view(const Tensor& t, const Ints& sizes, const Ints& strides, int64_t first) {
  AtenTensorHandle handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch__reinterpret_tensor(
      t.get(), static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), first, &handle));
  return Tensor(handle);
}

Tensor empty_matrices(const Tensor& like, int64_t B, int64_t n, int64_t m) {
  return empty(like, {B, n, m});
}

Tensor empty_rows(const Tensor& like, int64_t B, int64_t n, int64_t m) {
#if !defined(OTLOSS_EMULATED)
  if (like.is_cpu()) {
    const int64_t line = 64 / like.element_size(), stride = (m + line - 1) / line * line;
    const std::array<int64_t, 3> strides{n * stride, stride, 1};
    return strided(like, {B, n, m}, strides.data(), (B * n - 1) * stride + m, -1);
  }
#endif
  return empty_matrices(like, B, n, m);
}

int64_t row_stride(const Tensor& C) {
  const int64_t n = C.size(1), m = C.size(2);
  if (C.is_contiguous()) return m;
  const int64_t stride = C.stride(1);
  const bool rows = C.is_cpu() && C.stride(2) == 1 && stride >= m;
  return rows && (C.size(0) == 1 || C.stride(0) == n * stride) ? stride : 0;
}

bool is_shared(const Tensor& C, int64_t B) { return C.dim() == 3 && C.size(0) == 1 && B > 1; }

Tensor repeated(const Tensor& C, int64_t B) {
  return torch::stable::contiguous(
      view(C, {B, C.size(1), C.size(2)}, {0, C.stride(1), C.stride(2)}));
}

Tensor first_entries(const Tensor& w, int64_t n) {
  return w.size(1) == n ? w : torch::stable::contiguous(view(w, {w.size(0), n}, {w.stride(0), 1}));
}

Tensor first_entries(const Tensor& C, int64_t n, int64_t m) {
  if (C.size(1) == n && C.size(2) == m) return C;
  return torch::stable::contiguous(view(C, {C.size(0), n, m}, {C.stride(0), C.stride(1), 1}));
}

Tensor zeroed(const Tensor& t) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_zero_(t.get()));
  return t;
}

}  // namespace otloss
