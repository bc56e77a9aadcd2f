// The compiler's vector types, of any length.
#pragma once

#include "cpu/simd/simd.h"

namespace otloss::cpu {

template <typename T, int kBytes>
struct VectorOf {
  using type __attribute__((vector_size(kBytes))) = T;
};
template <typename T, int kBytes>
using Vector = typename VectorOf<T, kBytes>::type;

// kBytes of T, wherever a T may lie. (Clang forgets an alignment that is part of a dependent type.)
template <typename T, int kBytes>
struct __attribute__((packed, may_alias)) InMemory {
  Vector<T, kBytes> vector;
};
template <int kBytes, typename T>
OTLOSS_INLINE const InMemory<T, kBytes>& in_memory(const T* p) {
  return *reinterpret_cast<const InMemory<T, kBytes>*>(p);
}
template <int kBytes, typename T>
OTLOSS_INLINE InMemory<T, kBytes>& in_memory(T* p) {
  return *reinterpret_cast<InMemory<T, kBytes>*>(p);
}

}  // namespace otloss::cpu
