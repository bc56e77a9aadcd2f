// Tensors as the bindings use them: checked before a pointer is taken, and allocated without the
// dispatcher, whose share would be most of a small call.
//
// Only LibTorch's stable ABI is used, so one build serves every later torch.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <initializer_list>
#include <vector>

namespace otloss {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;
using Doubles = std::vector<double>;

// Each raises, naming the argument, unless the tensor is as described: also contiguous, with
// memory.
void check(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype,
           const char* name);
// Contiguous, or with rows as empty_rows makes them.
void check_rows(const Tensor& t, std::initializer_list<int64_t> shape, ScalarType dtype,
                const char* name);
void check_dims(const Tensor& t, int64_t dims, const char* name);
// The entries of a list, or of one that may be empty.
void check_count(size_t count, size_t expected, const char* name);
void check_indices(const Ints& indices, size_t count, const char* name);

// Contiguous and uninitialised, on the device of `like` and of its dtype unless another is named.
// In the emulated build filled with NaN: what is read before it is written shows.
Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, int32_t dtype = -1);
// The memory of `t` from entry `first` on, in another shape.
Tensor view(const Tensor& t, const Ints& sizes, const Ints& strides, int64_t first = 0);
Tensor zeroed(const Tensor& t);

// (B, n, m) uninitialised: contiguous, or on a CPU with rows that start on cache lines.
Tensor empty_matrices(const Tensor& like, int64_t B, int64_t n, int64_t m);
Tensor empty_rows(const Tensor& like, int64_t B, int64_t n, int64_t m);
// The distance of rows of such matrices, or of contiguous ones; 0 where they are neither.
int64_t row_stride(const Tensor& C);
// Whether C (1, n, m) is one matrix of B problems, and B copies of it.
bool is_shared(const Tensor& C, int64_t B);
Tensor repeated(const Tensor& C, int64_t B);
// The first n entries of w (B, n) or (B, n + 1), contiguous, and the first n rows and m columns.
Tensor first_entries(const Tensor& w, int64_t n);
Tensor first_entries(const Tensor& C, int64_t n, int64_t m);

template <typename T>
constexpr ScalarType dtype_of() {
  return sizeof(T) == sizeof(float) ? ScalarType::Float : ScalarType::Double;
}

template <typename T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Calls function(T{}) for the tensor's dtype.
template <typename F>
void dispatch_dtype(const Tensor& t, F&& function) {
  if (t.scalar_type() == ScalarType::Float) return function(float{});
  STD_TORCH_CHECK(t.scalar_type() == ScalarType::Double,
                  "otloss: kernels take float32 and float64 tensors");
  return function(double{});
}

}  // namespace otloss
