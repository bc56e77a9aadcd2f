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
#include <limits>

#include "core/math.h"
#include "cpu/simd/blocks.h"
#include "cpu/simd/simd.h"

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

// Exponentials of kRows rows at once, `stride` apart in C and `width` apart in e, up to the padded
// width: G is loaded once and the latencies overlap.
template <typename T>
OTLOSS_INLINE void exponentials_of_rows(int64_t stride, int64_t width, const T* F, T k, const T* C,
                                        const T* G, T* e, T* sum) {
  static_assert(kRows == 4, "four rows are unrolled");
  const T F0 = F[0], F1 = F[1], F2 = F[2], F3 = F[3];
  const T *C0 = C, *C1 = C + stride, *C2 = C + 2 * stride, *C3 = C + 3 * stride;
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
  const T* C = p.C + i * p.stride;
  const T exact = -row_lse(blocks, p.m, p.k, C, p.G, e);
  p.s[i] = fast_exp2(p.F[i] - exact);
  p.F[i] = exact;
  return exponentials(blocks, p.m, exact, p.k, C, p.G, e);
}

// A clamped exponential stands for 0 in the plan, so that padding gets exactly 0.
template <typename T>
OTLOSS_INLINE T plan_entry(T t) {
  return t > kExp2Least<T> ? fast_exp2(t) : T(0);
}

// Functions of one row: the compiler does not vectorise such loops inside a loop over the rows.
template <typename T>
OTLOSS_SIMD void plan_row(int64_t m, T scale, T F, T k, const T* C, const T* G, T* P) {
#pragma omp simd
  for (int64_t j = 0; j < m; ++j) P[j] = scale * plan_entry(F + G[j] - k * C[j]);
}

// sum_j C_j exp2(F + G_j - k C_j).
template <typename T>
OTLOSS_SIMD T transport_row(int64_t m, T F, T k, const T* C, const T* G) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < m; ++j) {
    const T entry = C[j];
    const T weighted = plan_entry(F + G[j] - k * entry) * entry;
    sum += G[j] > static_cast<T>(kLog2Zero) ? weighted : T(0);  // padding may hold anything
  }
  return sum;
}

// Of columns of positive weight: the least and the largest cost, or 0, and NaN if one is not
// finite.
template <typename T>
struct RowRange {
  T least, most, nonfinite;
};

template <typename T>
OTLOSS_SIMD RowRange<T> range_of_row(int64_t m, const T* C, const T* b) {
  T least = 0, most = 0, nonfinite = 0;
#pragma omp simd reduction(min : least) reduction(max : most) reduction(+ : nonfinite)
  for (int64_t j = 0; j < m; ++j) {
    const T entry = C[j];  // read whatever the weight, so that the loop has no branch
    const T c = b[j] > T(0) ? entry : T(0);
    least = c < least ? c : least;
    most = c > most ? c : most;
    nonfinite += c * T(0);  // 0, or NaN for inf and NaN
  }
  return {least, most, nonfinite};
}

template <typename T>
OTLOSS_INLINE void sweep_rows_body(const RowSweep<T>& p) {
  const Blocks<T> blocks(p.m);
  const int64_t width = padded<T>(p.m);
  for (int64_t i = 0; i < p.rows; i += kRows) {
    const int64_t rows = i + kRows <= p.rows ? kRows : p.rows - i;
    const T* C = p.C + i * p.stride;
    T sum[kRows] = {1, 1, 1, 1}, a[kRows] = {}, F[kRows] = {};
    if (i + kRows <= p.readable)
      exponentials_of_rows(p.stride, width, p.F + i, p.k, C, p.G, p.e, sum);
    else
      for (int64_t r = 0; r < rows; ++r)
        sum[r] = exponentials(blocks, p.m, p.F[i + r], p.k, C + r * p.stride, p.G, p.e + r * width);
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

struct SweepRows {
  template <int kBytes, typename T>
  static OTLOSS_INLINE void run(const RowSweep<T>& p) {
    sweep_rows_body(p);
  }
};

}  // namespace

template <typename T>
void sweep_rows(const RowSweep<T>& p) {
  run_at_level<SweepRows>(p);
}

// e_j = exp2(G_j - k C_j) - 1; returns sum_j b_j e_j.
template <typename T>
OTLOSS_SIMD T excess_of_row(int64_t m, T k, const T* C, const T* b, const T* G, T* e) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < m; ++j) {
    const T value = fast_exp2m1(G[j] - k * C[j]);
    e[j] = b[j] > T(0) ? value : T(0);  // padding may hold anything
    sum += b[j] * e[j];
  }
  return sum;
}

// c_j += shift + factor e_j.
template <typename T>
OTLOSS_SIMD void add_excess(int64_t m, T shift, T factor, const T* e, T* c) {
#pragma omp simd
  for (int64_t j = 0; j < m; ++j) c[j] += shift + factor * e[j];
}

template <typename T>
void unit_sweep_rows(const UnitSweep<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!(p.a[i] > T(0))) {
      p.F[i] = 0, p.s[i] = 1;
      continue;
    }
    const double sum =
        static_cast<double>(excess_of_row(p.m, p.k, p.C + i * p.stride, p.b, p.G, p.e));
    const double F = -kLog2E * std::log1p(sum);
    p.s[i] = static_cast<T>(fast_exp2(static_cast<double>(p.F[i])) * (1 + sum));
    p.F[i] = static_cast<T>(F);
    if (!p.c) continue;
    // Of the plan of (1 + tilt) F, over b, less 1: (1 + E)(1 + t) - 1, E = (e - sum) / (1 + sum).
    const double t = fast_exp2m1(p.tilt * F), a = static_cast<double>(p.a[i]);
    const double factor = a * (1 + t) / (1 + sum);
    add_excess(p.m, static_cast<T>(a * t - factor * sum), static_cast<T>(factor), p.e, p.c);
  }
}

template <typename T>
OTLOSS_SIMD void column_softmin(const ColumnSoftmin<T>& p) {
  T largest[kColumnBlock], sum[kColumnBlock];
  for (int64_t j = 0; j < p.width; ++j) {
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
  for (int64_t j = 0; j < p.width; ++j) p.out[j] = -largest[j];
  subtract_log2(p.width, sum, p.out);
}

template <typename T>
void plan_rows(const PlanRows<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    T* P = p.P + i * p.m;
    if (!(p.a[i] > T(0)))
      std::fill(P, P + p.m, T(0));
    else if (std::isnan(p.F[i]))  // of a solve that failed
      for (int64_t j = 0; j < p.m; ++j) P[j] = p.G[j] > static_cast<T>(kLog2Zero) ? p.F[i] : T(0);
    else
      plan_row(p.m, p.scale * p.a[i], p.F[i], p.k, p.C + i * p.stride, p.G, P);
  }
}

template <typename T>
double transport_rows(const PlanRows<T>& p) {
  double total = 0;
  for (int64_t i = 0; i < p.rows; ++i) {
    if (!(p.a[i] > T(0))) continue;
    const T row = transport_row(p.m, p.F[i], p.k, p.C + i * p.stride, p.G);
    total += static_cast<double>(p.a[i]) * static_cast<double>(row);
  }
  return total;
}

template <typename T>
CostRange cost_range(int64_t n, int64_t m, const T* C, int64_t stride, const T* a, const T* b) {
  CostRange range{0, 0};
  for (int64_t i = 0; i < n; ++i) {
    if (!(a[i] > T(0))) continue;
    const RowRange<T> row = range_of_row(m, C + i * stride, b);
    range.least = std::min(range.least, static_cast<double>(row.least));
    range.most = std::max(range.most, static_cast<double>(row.most));
    const double nonfinite = static_cast<double>(row.nonfinite);
    if (std::isnan(nonfinite)) return {nonfinite, nonfinite};
  }
  return range;
}

// ----------------------------------------------------------------------------- plans in memory
//
// These passes are few and bandwidth-bound; sums are taken in double whatever the plan's dtype,
// because the linear system of the implicit gradient is a graph Laplacian whose smallest
// eigenvalues are differences of these sums.

template <typename T>
OTLOSS_SIMD void plan_sums(const PlanSums<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const T* P = p.P + i * p.m;
    double sum = 0;
    if (p.C) {
      const T* C = p.C + i * p.m;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < p.m; ++j) {
        const T c = P[j] != T(0) ? C[j] : T(0);
        const double value = static_cast<double>(P[j]) * static_cast<double>(c);
        sum += value;
        p.col[j] += value;
      }
    } else {
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < p.m; ++j) {
        const double value = static_cast<double>(P[j]);
        sum += value;
        p.col[j] += value;
      }
    }
    p.row[i] = sum;
  }
}

template <typename T>
OTLOSS_SIMD void weigh_plan(const WeighPlan<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const T *P = p.P + i * p.m, *C = p.C + i * p.m;
    T* out = p.out + i * p.m;
    const T shift = p.s + p.alpha[i];
#pragma omp simd
    for (int64_t j = 0; j < p.m; ++j) {
      const T value = P[j] * (shift + p.t * C[j] + p.beta[j]);
      out[j] = P[j] != T(0) ? value : T(0);
    }
  }
}

template <typename T>
OTLOSS_SIMD void plan_product(const PlanProduct<T>& p) {
  for (int64_t i = 0; i < p.rows; ++i) {
    const T* P = p.P + i * p.m;
    double w = p.base ? p.base[i] : 0.0;
    if (p.x) {
      double sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int64_t j = 0; j < p.m; ++j) sum += static_cast<double>(P[j]) * p.x[j];
      w += p.factor[i] * sum;
    }
    p.w[i] = w;
    if (p.y) {
#pragma omp simd
      for (int64_t j = 0; j < p.m; ++j) p.y[j] += w * static_cast<double>(P[j]);
    }
  }
}

#define OTLOSS_INSTANTIATE(T)                                                             \
  template void sweep_rows(const RowSweep<T>&);                                           \
  template void unit_sweep_rows(const UnitSweep<T>&);                                     \
  template void column_softmin(const ColumnSoftmin<T>&);                                  \
  template void plan_rows(const PlanRows<T>&);                                            \
  template double transport_rows(const PlanRows<T>&);                                     \
  template CostRange cost_range(int64_t, int64_t, const T*, int64_t, const T*, const T*); \
  template void plan_sums(const PlanSums<T>&);                                            \
  template void weigh_plan(const WeighPlan<T>&);                                          \
  template void plan_product(const PlanProduct<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
