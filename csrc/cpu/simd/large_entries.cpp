// Kernels take one row by values: by reference, or inside a loop over rows, the compiler does not
// vectorise them.
#include "cpu/simd/large_entries.h"

#include <cstring>

#include "core/math.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu {
namespace {

// log2 of an entry of the plan over its row's sum or its column's, whichever is more.
template <typename T>
OTLOSS_INLINE T largest_share(T entry, T R, T S) {
  const T more = R - S;
  return more > T(0) ? entry + more : entry;
}

template <typename T>
OTLOSS_SIMD LargeCount count_row(int64_t m, T F, T R, T k, T least, const T* C, const T* G,
                                 const T* S) {
  int32_t count = 0;
  T held = 0;
#pragma omp simd reduction(+ : count, held)
  for (int64_t j = 0; j < m; ++j) {
    const T entry = F + G[j] - k * C[j], value = fast_exp2(entry);
    const bool large = largest_share(entry, R, S[j]) > least;
    count += static_cast<int32_t>(large);
    held += large ? value : T(0);
  }
  return {count, static_cast<double>(held)};
}

template <typename T>
OTLOSS_SIMD void mark_row(int64_t m, T F, T R, T k, T least, const T* C, const T* G, const T* S,
                          uint8_t* marks) {
#pragma omp simd
  for (int64_t j = 0; j < m; ++j)
    marks[j] = static_cast<uint8_t>(largest_share(F + G[j] - k * C[j], R, S[j]) > least);
}

template <typename T>
OTLOSS_SIMD void values_of_row(int64_t count, T F, T k, const T* G, const int32_t* column,
                               const T* cost, T* value) {
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) value[e] = fast_exp2(F + G[column[e]] - k * cost[e]);
}

}  // namespace

template <typename T>
LargeCount count_large(const LargeEntries<T>& p) {
  if (!(p.R > static_cast<T>(kLog2Zero))) return {0, 0};
  return count_row(p.m, p.F, p.R, p.k, p.least, p.C, p.G, p.S);
}

// Most marks are 0, so they are read many at a time.
template <typename T>
int64_t list_large(const LargeEntries<T>& p, uint8_t* marks, int32_t* column, T* cost) {
  if (!(p.R > static_cast<T>(kLog2Zero))) return 0;
  mark_row(p.m, p.F, p.R, p.k, p.least, p.C, p.G, p.S, marks);
  int64_t count = 0;
  for (int64_t j = 0; j < p.m; j += kEntriesAtOnce) {
    uint64_t some;
    static_assert(sizeof(some) == kEntriesAtOnce, "a byte for each entry");
    std::memcpy(&some, marks + j, sizeof(some));
    if (some == 0) continue;
    const int64_t end = p.m < j + kEntriesAtOnce ? p.m : j + kEntriesAtOnce;
    for (int64_t t = j; t < end; ++t) {
      column[count] = static_cast<int32_t>(t);
      cost[count] = p.C[t];
      count += marks[t];
    }
  }
  return count;
}

template <typename T>
void entry_values(const EntryValues<T>& p) {
  int64_t begin = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    values_of_row(p.end[i] - begin, p.F[i], p.k, p.G, p.column + begin, p.cost + begin,
                  p.value + begin);
    begin = p.end[i];
  }
}

#define OTLOSS_INSTANTIATE(T)                                                  \
  template LargeCount count_large(const LargeEntries<T>&);                     \
  template int64_t list_large(const LargeEntries<T>&, uint8_t*, int32_t*, T*); \
  template void entry_values(const EntryValues<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
