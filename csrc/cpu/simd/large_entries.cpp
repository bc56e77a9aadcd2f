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
struct RowCounts {
  int32_t n0, n1, n2, n3;
  T h0, h1, h2, h3;
};

// One reading and one exponential for all limits.
template <typename T>
OTLOSS_SIMD RowCounts<T> count_row(int64_t m, T F, T R, T k, T least, T step, const T* C,
                                   const T* G, const T* S) {
  static_assert(kLimits == 4, "four limits are unrolled");
  int32_t n0 = 0, n1 = 0, n2 = 0, n3 = 0;
  T h0 = 0, h1 = 0, h2 = 0, h3 = 0;
#pragma omp simd reduction(+ : n0, n1, n2, n3, h0, h1, h2, h3)
  for (int64_t j = 0; j < m; ++j) {
    const T entry = F + G[j] - k * C[j], value = fast_exp2(entry);
    const T above = largest_share(entry, R, S[j]) - least;
    n0 += above > T(0), h0 += above > T(0) ? value : T(0);
    n1 += above > step, h1 += above > step ? value : T(0);
    n2 += above > 2 * step, h2 += above > 2 * step ? value : T(0);
    n3 += above > 3 * step, h3 += above > 3 * step ? value : T(0);
  }
  return {n0, n1, n2, n3, h0, h1, h2, h3};
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
void count_large(const LargeEntries<T>& p, double step, LargeCounts& counts) {
  if (!(p.R > static_cast<T>(kLog2Zero))) return;
  const RowCounts<T> row =
      count_row(p.m, p.F, p.R, p.k, p.least, static_cast<T>(step), p.C, p.G, p.S);
  const int32_t entries[] = {row.n0, row.n1, row.n2, row.n3};
  const T held[] = {row.h0, row.h1, row.h2, row.h3};
  for (int k = 0; k < kLimits; ++k)
    counts.entries[k] += entries[k], counts.held[k] += static_cast<double>(held[k]);
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
  template void count_large(const LargeEntries<T>&, double, LargeCounts&);     \
  template int64_t list_large(const LargeEntries<T>&, uint8_t*, int32_t*, T*); \
  template void entry_values(const EntryValues<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
