// Dense CPU sweeps: one reading of C per full Sinkhorn iteration, one exp2 per entry.
//
// With current F, G an entry e_ij = exp2(F_i + G_j - k C_ij) is P_ij / a_i. The row sum s_i updates
// F exactly (F_i -= log2 s_i) and a_i e_ij / s_i is the plan after that update, so the column sums
// for the G update need no second exponential; the row is still in L1 when it is used again. Near
// the fixed point every e is O(1) and no maximum is needed. A row whose sum is 0, inf, NaN or far
// from 1 (a cold start at small eps, extreme weights) is done again with its maximum subtracted.
//
// Cost: per 16 float entries about 14 vector instructions for exp2 and the row sum, 4 for the
// column sums. Rows are taken kRows at a time so that the column sums are loaded and stored once
// per kRows entries.
#include "cpu/simd/sweep.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "core/math.h"
#include "cpu/parallel.h"
#include "cpu/simd/blocks.h"

namespace otloss::cpu {
namespace {

constexpr int64_t kRows = kSweepScratchRows;

// e_j = exp2(F + G_j - k C_j) in the columns after the whole blocks, returns their sum.
template <typename T>
OTLOSS_INLINE T tail_exponentials(const Blocks<T>& blocks, int64_t m, T F, T k, const T* C,
                                  const T* G, T* e) {
  T sum = 0;
  if (blocks.tail < m) {
    C += blocks.tail, G += blocks.tail, e += blocks.tail;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < kBlock<T>; ++j) {
      const T value = fast_exp2(F + G[j] - k * C[j]);
      e[j] = value;
      sum += blocks.mask[j] * value;
    }
  } else {
    for (int64_t j = blocks.whole; j < m; ++j) sum += e[j] = fast_exp2(F + G[j] - k * C[j]);
  }
  return sum;
}

// e_j = exp2(F + G_j - k C_j), returns the sum.
template <typename T>
OTLOSS_INLINE T exponentials(const Blocks<T>& blocks, int64_t m, T F, T k, const T* C, const T* G,
                             T* e) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < blocks.whole; ++j) {
    const T value = fast_exp2(F + G[j] - k * C[j]);
    e[j] = value;
    sum += value;
  }
  return sum + tail_exponentials(blocks, m, F, k, C, G, e);
}

// log2 sum_j exp2(G_j - k C_j), with the maximum subtracted. `e` is scratch.
template <typename T>
OTLOSS_INLINE T row_lse(const Blocks<T>& blocks, int64_t m, T k, const T* C, const T* G, T* e) {
  T largest = std::numeric_limits<T>::lowest();
#pragma omp simd reduction(max : largest)
  for (int64_t j = 0; j < m; ++j) {
    const T t = G[j] - k * C[j];
    largest = t > largest ? t : largest;
  }
  return largest + fast_log2(exponentials(blocks, m, -largest, k, C, G, e));
}

// c_j += sum_r w_r e_rj; the rows of e are `width` apart.
template <typename T>
OTLOSS_INLINE void add_rows(int64_t width, const T* w, const T* e, T* c) {
  static_assert(kRows == 4, "add_rows adds four rows");
  const T w0 = w[0], w1 = w[1], w2 = w[2], w3 = w[3];
  const T *e0 = e, *e1 = e + width, *e2 = e + 2 * width, *e3 = e + 3 * width;
#pragma omp simd
  for (int64_t j = 0; j < width; ++j) c[j] += (w0 * e0[j] + w1 * e1[j]) + (w2 * e2[j] + w3 * e3[j]);
}

// The same for kRows rows at once, m apart in C and `width` apart in e, up to the padded width: G
// is loaded once and the latencies overlap.
template <typename T>
OTLOSS_INLINE void exponentials_of_rows(int64_t m, int64_t width, const T* F, T k, const T* C,
                                        const T* G, T* e, T* sum) {
  static_assert(kRows == 4, "four rows are unrolled");
  const T F0 = F[0], F1 = F[1], F2 = F[2], F3 = F[3];
  const T *C0 = C, *C1 = C + m, *C2 = C + 2 * m, *C3 = C + 3 * m;
  T *e0 = e, *e1 = e + width, *e2 = e + 2 * width, *e3 = e + 3 * width;
  T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
  for (int64_t j = 0; j < width; ++j) {
    const T v0 = fast_exp2(F0 + G[j] - k * C0[j]);
    const T v1 = fast_exp2(F1 + G[j] - k * C1[j]);
    const T v2 = fast_exp2(F2 + G[j] - k * C2[j]);
    const T v3 = fast_exp2(F3 + G[j] - k * C3[j]);
    e0[j] = v0, e1[j] = v1, e2[j] = v2, e3[j] = v3;
    s0 += v0, s1 += v1, s2 += v2, s3 += v3;
  }
  sum[0] = s0, sum[1] = s1, sum[2] = s2, sum[3] = s3;
}

// Looks after the rows whose sum cannot be used as it is. Rows of weight 0 are padding: their
// potential is kept at 0. Returns the sum by which the row is to be divided.
template <typename T>
OTLOSS_INLINE T checked_sum(const RowSweep<T>& p, const Blocks<T>& blocks, int64_t i, T sum, T* e) {
  p.s[i] = sum;
  if (p.a[i] > T(0) && trusted(sum)) return sum;
  if (!(p.a[i] > T(0))) {
    p.F[i] = 0;
    p.s[i] = 1;
    std::fill(e, e + p.m, T(0));
    return T(1);
  }
  const T* C = p.C + i * p.m;
  const T exact = -row_lse(blocks, p.m, p.k, C, p.G, e);
  p.s[i] = fast_exp2(p.F[i] - exact);
  p.F[i] = exact;
  return exponentials(blocks, p.m, exact, p.k, C, p.G, e);
}

template <typename T>
OTLOSS_INLINE void sweep_rows_body(const RowSweep<T>& p) {
  const Blocks<T> blocks(p.m);
  const int64_t width = padded<T>(p.m);
  for (int64_t i = 0; i < p.rows; i += kRows) {
    const int64_t rows = i + kRows <= p.rows ? kRows : p.rows - i;
    const T* C = p.C + i * p.m;
    T sum[kRows] = {1, 1, 1, 1}, a[kRows] = {}, F[kRows] = {};
    if (i + kRows <= p.readable)
      exponentials_of_rows(p.m, width, p.F + i, p.k, C, p.G, p.e, sum);
    else
      for (int64_t r = 0; r < rows; ++r)
        sum[r] = exponentials(blocks, p.m, p.F[i + r], p.k, C + r * p.m, p.G, p.e + r * width);
    bool good = rows == kRows;
    for (int64_t r = 0; r < rows; ++r) {
      p.s[i + r] = sum[r], a[r] = p.a[i + r];
      good &= a[r] > T(0) && trusted(sum[r]);
    }
    for (int64_t r = 0; r < rows && !good; ++r)
      sum[r] = checked_sum(p, blocks, i + r, sum[r], p.e + r * width);
    std::copy(p.F + i, p.F + i + rows, F);
    T w[kRows];
    for (int64_t r = 0; r < kRows; ++r) {
      w[r] = a[r] / sum[r];
      F[r] -= fast_log2(sum[r]);
    }
    if (p.tilt != T(0))
      for (int64_t r = 0; r < kRows; ++r) w[r] *= fast_exp2(p.tilt * F[r]);
    std::copy(F, F + rows, p.F + i);
    if (p.c) add_rows(width, w, p.e, p.c);
  }
}

template <typename T>
OTLOSS_INLINE void column_lse_body(const ColumnLse<T>& p) {
  T largest[kColumnBlock], sum[kColumnBlock];
  for (int64_t j = 0; j < kColumnBlock; ++j) {
    largest[j] = static_cast<T>(2 * kLog2Zero);
    sum[j] = 0;
  }
  for (int64_t i = 0; i < p.n; ++i) {
    const T* C = p.C + i * p.stride;
    const T A = p.A[i];
#pragma omp simd
    for (int64_t j = 0; j < p.width; ++j) {
      const T t = A - p.k * C[j];
      largest[j] = t > largest[j] ? t : largest[j];
    }
  }
  for (int64_t i = 0; i < p.n; ++i) {
    const T* C = p.C + i * p.stride;
    const T A = p.A[i];
#pragma omp simd
    for (int64_t j = 0; j < p.width; ++j) sum[j] += fast_exp2(A - largest[j] - p.k * C[j]);
  }
  for (int64_t j = 0; j < p.width; ++j) p.out[j] = largest[j] + fast_log2(sum[j]);
}

// A clamped exponential stands for 0 in the plan, so that padding gets exactly 0.
template <typename T>
OTLOSS_INLINE T plan_entry(T t) {
  return t > static_cast<T>(-kExp2Limit) ? fast_exp2(t) : T(0);
}

template <typename T>
OTLOSS_INLINE void plan_row_body(int64_t m, T scale, T F, T k, const T* C, const T* G, T* P) {
#pragma omp simd
  for (int64_t j = 0; j < m; ++j) P[j] = scale * plan_entry(F + G[j] - k * C[j]);
}

// sum_j C_j exp2(F + G_j - k C_j).
template <typename T>
OTLOSS_INLINE T transport_row_body(int64_t m, T F, T k, const T* C, const T* G) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < m; ++j) {
    const T entry = C[j];
    const T weighted = plan_entry(F + G[j] - k * entry) * entry;
    sum += G[j] > static_cast<T>(kLog2Zero) ? weighted : T(0);  // padding may hold anything
  }
  return sum;
}

// Functions of one row: the compiler does not vectorise such loops inside a loop over the rows.
OTLOSS_SIMD void plan_row(int64_t m, float scale, float F, float k, const float* C, const float* G,
                          float* P) {
  plan_row_body(m, scale, F, k, C, G, P);
}
OTLOSS_SIMD void plan_row(int64_t m, double scale, double F, double k, const double* C,
                          const double* G, double* P) {
  plan_row_body(m, scale, F, k, C, G, P);
}

template <typename T>
void plan_of_rows(const PlanRows<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    T* P = p.P + i * p.m;
    if (p.a[i] > T(0))
      plan_row(p.m, p.scale * p.a[i], p.F[i], p.k, p.C + i * p.m, p.G, P);
    else
      std::fill(P, P + p.m, T(0));
  }
}

OTLOSS_SIMD float transport_row(int64_t m, float F, float k, const float* C, const float* G) {
  return transport_row_body(m, F, k, C, G);
}
OTLOSS_SIMD double transport_row(int64_t m, double F, double k, const double* C, const double* G) {
  return transport_row_body(m, F, k, C, G);
}

template <typename T>
double transport_sum(const PlanRows<T>& p) {
  double total = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!(p.a[i] > T(0))) continue;
    const T row = transport_row(p.m, p.F[i], p.k, p.C + i * p.m, p.G);
    total += static_cast<double>(p.a[i]) * static_cast<double>(row);
  }
  return total;
}

// log2 of an entry of the plan over its row's sum or its column's, whichever is more.
template <typename T>
OTLOSS_INLINE T largest_share(T entry, T R, T S) {
  const T more = R - S;
  return more > T(0) ? entry + more : entry;
}

// Functions of one row, as plan_row.
template <typename T>
OTLOSS_INLINE LargeCount count_large_body(int64_t m, T F, T R, T k, T least, const T* C, const T* G,
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
OTLOSS_INLINE void mark_large_body(int64_t m, T F, T R, T k, T least, const T* C, const T* G,
                                   const T* S, uint8_t* marks) {
#pragma omp simd
  for (int64_t j = 0; j < m; ++j)
    marks[j] = static_cast<uint8_t>(largest_share(F + G[j] - k * C[j], R, S[j]) > least);
}

template <typename T>
OTLOSS_INLINE void entry_values_body(int64_t count, T F, T k, const T* G, const int32_t* column,
                                     const T* cost, T* value) {
#pragma omp simd
  for (int64_t e = 0; e < count; ++e) value[e] = fast_exp2(F + G[column[e]] - k * cost[e]);
}

#define OTLOSS_ENTRIES(T)                                                                    \
  OTLOSS_SIMD LargeCount count_large_row(int64_t m, T F, T R, T k, T least, const T* C,      \
                                         const T* G, const T* S) {                           \
    return count_large_body(m, F, R, k, least, C, G, S);                                     \
  }                                                                                          \
  OTLOSS_SIMD void mark_large_row(int64_t m, T F, T R, T k, T least, const T* C, const T* G, \
                                  const T* S, uint8_t* marks) {                              \
    mark_large_body(m, F, R, k, least, C, G, S, marks);                                      \
  }                                                                                          \
  OTLOSS_SIMD void values_of_row(int64_t count, T F, T k, const T* G, const int32_t* column, \
                                 const T* cost, T* value) {                                  \
    entry_values_body(count, F, k, G, column, cost, value);                                  \
  }
OTLOSS_ENTRIES(float)
OTLOSS_ENTRIES(double)
#undef OTLOSS_ENTRIES

template <typename T>
LargeCount count_large_entries(const LargeEntries<T>& p) {
  LargeCount all{0, 0};
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!(p.R[i] > static_cast<T>(kLog2Zero))) continue;
    const LargeCount row =
        count_large_row(p.m, p.F[i], p.R[i], p.k, p.least, p.C + i * p.m, p.G, p.S);
    all.entries += row.entries, all.held += row.held;
  }
  return all;
}

// Most marks are 0, so they are read many at a time.
template <typename T>
int64_t list_large_entries(const LargeEntries<T>& p, uint8_t* marks, int32_t* column, T* cost) {
  if (!(p.R[0] > static_cast<T>(kLog2Zero))) return 0;
  mark_large_row(p.m, p.F[0], p.R[0], p.k, p.least, p.C, p.G, p.S, marks);
  int64_t count = 0;
  for (int64_t j = 0; j < p.m; j += kEntriesAtOnce) {
    uint64_t some;
    static_assert(sizeof(some) == kEntriesAtOnce, "a byte for each entry");
    std::memcpy(&some, marks + j, sizeof(some));
    if (some == 0) continue;
    const int64_t end = std::min(p.m, j + kEntriesAtOnce);
    for (int64_t t = j; t < end; ++t) {
      column[count] = static_cast<int32_t>(t);
      cost[count] = p.C[t];
      count += marks[t];
    }
  }
  return count;
}

template <typename T>
void values_of_entries(const EntryValues<T>& p) {
  int64_t begin = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    values_of_row(p.end[i] - begin, p.F[i], p.k, p.G, p.column + begin, p.cost + begin,
                  p.value + begin);
    begin = p.end[i];
  }
}

// max |C_j| over columns of positive weight; NaN if one is not finite.
template <typename T>
OTLOSS_INLINE T max_abs_row_body(int64_t m, const T* C, const T* b) {
  T largest = 0, nonfinite = 0;
#pragma omp simd reduction(max : largest) reduction(+ : nonfinite)
  for (int64_t j = 0; j < m; ++j) {
    const T entry = C[j];  // read whatever the weight, so that the loop has no branch
    const T c = b[j] > T(0) ? entry : T(0);
    const T magnitude = std::abs(c);
    largest = magnitude > largest ? magnitude : largest;
    nonfinite += c * T(0);  // 0, or NaN for inf and NaN
  }
  return largest + nonfinite;
}

OTLOSS_SIMD float max_abs_row(int64_t m, const float* C, const float* b) {
  return max_abs_row_body(m, C, b);
}
OTLOSS_SIMD double max_abs_row(int64_t m, const double* C, const double* b) {
  return max_abs_row_body(m, C, b);
}

template <typename T>
double max_abs_rows(const MaxAbs<T>& p) {
  double largest = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!(p.a[i] > T(0))) continue;
    const double row = static_cast<double>(max_abs_row(p.m, p.C + i * p.m, p.b));
    largest = largest >= row ? largest : row;
    if (std::isnan(row)) return row;
  }
  return largest;
}

template <typename T>
OTLOSS_INLINE void subtract_log2_body(int64_t count, const T* x, T* y) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) y[j] -= fast_log2(x[j]);
}

template <typename T>
OTLOSS_INLINE void absorb_weights_body(int64_t count, T k, const T* g, const T* b, T* G) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) {
    const T safe = b[j] > T(0) ? b[j] : T(1);
    const T value = k * g[j] + fast_log2(safe);
    G[j] = b[j] > T(0) ? value : static_cast<T>(kLog2Zero);
  }
}

}  // namespace

OTLOSS_SIMD void sweep_rows(const RowSweep<float>& p) { sweep_rows_body(p); }
OTLOSS_SIMD void sweep_rows(const RowSweep<double>& p) { sweep_rows_body(p); }
OTLOSS_SIMD void column_lse(const ColumnLse<float>& p) { column_lse_body(p); }
OTLOSS_SIMD void column_lse(const ColumnLse<double>& p) { column_lse_body(p); }
void plan_rows(const PlanRows<float>& p) { plan_of_rows(p); }
void plan_rows(const PlanRows<double>& p) { plan_of_rows(p); }
double transport_rows(const PlanRows<float>& p) { return transport_sum(p); }
double transport_rows(const PlanRows<double>& p) { return transport_sum(p); }
LargeCount count_large(const LargeEntries<float>& p) { return count_large_entries(p); }
LargeCount count_large(const LargeEntries<double>& p) { return count_large_entries(p); }
int64_t list_large(const LargeEntries<float>& p, uint8_t* marks, int32_t* column, float* cost) {
  return list_large_entries(p, marks, column, cost);
}
int64_t list_large(const LargeEntries<double>& p, uint8_t* marks, int32_t* column, double* cost) {
  return list_large_entries(p, marks, column, cost);
}
void entry_values(const EntryValues<float>& p) { values_of_entries(p); }
void entry_values(const EntryValues<double>& p) { values_of_entries(p); }
double max_abs(const MaxAbs<float>& p) { return max_abs_rows(p); }
double max_abs(const MaxAbs<double>& p) { return max_abs_rows(p); }
OTLOSS_SIMD void subtract_log2(int64_t count, const float* x, float* y) {
  subtract_log2_body(count, x, y);
}
OTLOSS_SIMD void subtract_log2(int64_t count, const double* x, double* y) {
  subtract_log2_body(count, x, y);
}
OTLOSS_SIMD void absorb_weights(int64_t count, float k, const float* g, const float* b, float* G) {
  absorb_weights_body(count, k, g, b, G);
}
OTLOSS_SIMD void absorb_weights(int64_t count, double k, const double* g, const double* b,
                                double* G) {
  absorb_weights_body(count, k, g, b, G);
}

template <typename T>
OTLOSS_INLINE void add_sums_body(int64_t count, const T* c, double* total) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) total[j] += static_cast<double>(c[j]);
}

template <typename T>
OTLOSS_INLINE bool column_ratios_body(int64_t count, const double* c, const T* b, double least,
                                      T* q) {
  int bad = 0;
#pragma omp simd reduction(+ : bad)
  for (int64_t j = 0; j < count; ++j) {
    const bool counts = b[j] > T(0);
    const double weight = counts ? static_cast<double>(b[j]) : 1.0, sum = counts ? c[j] : 1.0;
    const T ratio = static_cast<T>(sum / weight);
    q[j] = ratio;
    bad += static_cast<int>(!trusted(ratio)) + static_cast<int>(counts && !(c[j] > least));
  }
  return bad == 0;
}

OTLOSS_SIMD void add_sums(int64_t count, const float* c, double* total) {
  add_sums_body(count, c, total);
}
OTLOSS_SIMD void add_sums(int64_t count, const double* c, double* total) {
  add_sums_body(count, c, total);
}
OTLOSS_SIMD bool column_ratios(int64_t count, const double* c, const float* b, double least,
                               float* q) {
  return column_ratios_body(count, c, b, least, q);
}
OTLOSS_SIMD bool column_ratios(int64_t count, const double* c, const double* b, double least,
                               double* q) {
  return column_ratios_body(count, c, b, least, q);
}

// In vector lanes: the two dozen sums of a quasi-Newton step, added up one by one, would take as
// long as a sweep over a few hundred rows.
template <typename T>
OTLOSS_INLINE double dot_body(int64_t count, const T* x, const T* y) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i) sum += static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return sum;
}

template <typename T>
OTLOSS_INLINE double dot_body(int64_t count, const T* w, const T* x, const T* y) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < count; ++i)
    sum += static_cast<double>(w[i]) * static_cast<double>(x[i]) * static_cast<double>(y[i]);
  return sum;
}

template <typename T>
OTLOSS_INLINE double marginal_error_body(int64_t count, const T* w, const T* q) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < count; ++j)
    sum += static_cast<double>(w[j]) * std::abs(static_cast<double>(q[j]) - 1.0);
  return sum;
}

template <typename T>
OTLOSS_INLINE SumAndSize sum_and_size_body(int64_t count, const T* w, const T* v) {
  double sum = 0, size = 0;
#pragma omp simd reduction(+ : sum, size)
  for (int64_t i = 0; i < count; ++i) {
    const double term = static_cast<double>(w[i]) * static_cast<double>(v[i]);
    sum += term;
    size += std::abs(term);
  }
  return {sum, size};
}

#define OTLOSS_SUMS(T)                                                                            \
  OTLOSS_SIMD double dot(int64_t count, const T* x, const T* y) { return dot_body(count, x, y); } \
  OTLOSS_SIMD double dot(int64_t count, const T* w, const T* x, const T* y) {                     \
    return dot_body(count, w, x, y);                                                              \
  }                                                                                               \
  OTLOSS_SIMD double marginal_error(int64_t count, const T* w, const T* q) {                      \
    return marginal_error_body(count, w, q);                                                      \
  }                                                                                               \
  OTLOSS_SIMD SumAndSize sum_and_size(int64_t count, const T* w, const T* v) {                    \
    return sum_and_size_body(count, w, v);                                                        \
  }
OTLOSS_SUMS(float)
OTLOSS_SUMS(double)
#undef OTLOSS_SUMS

}  // namespace otloss::cpu
