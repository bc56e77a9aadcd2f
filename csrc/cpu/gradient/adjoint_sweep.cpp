// A row needs u_i before it can add to v and C_bar, and is still in L1 when it is read again. Rows
// are taken kRows at a time, so that g_bar, w and v are read once per kRows entries.
#include "cpu/gradient/adjoint_sweep.h"

#include <algorithm>

#include "core/math.h"
#include "cpu/simd/simd.h"

namespace otloss::cpu {
namespace {

constexpr int64_t kRows = kAdjointRows;

// Columns of a term done at a time: they and the costs stay in the first cache while the
// iterations pass by.
template <typename T>
constexpr int64_t kTermColumns = 512 / sizeof(T);

// kRows rows of the sweep. Rows past the end repeat the last one with factors of 0.
template <typename T>
struct RowGroup {
  const T* C[kRows];
  T* C_bar[kRows];
  T F[kRows], E[kRows];
  T S[kRows], R[kRows];  // what e is multiplied by with g_bar, and with w
};

// The columns of a row in one part, or in two: whole blocks, and the one that overlaps them.
template <typename T>
struct Part {
  int64_t column, count;
  T* e;  // of the first row
};

template <typename T>
OTLOSS_INLINE int64_t parts_of(const AdjointSweep<T>& p, const Blocks<T>& blocks) {
  return blocks.tail < p.m ? 2 : 1;
}

template <typename T>
OTLOSS_INLINE Part<T> part_of(const AdjointSweep<T>& p, const Blocks<T>& blocks, int64_t part) {
  if (part == 1) return {blocks.tail, kBlock<T>, p.e + blocks.whole};
  return {0, blocks.tail < p.m ? blocks.whole : p.m, p.e};
}

// e_rj = exp2(F_r + G_j - k C_rj) and u_r = sum_j e_rj g_bar_j. The columns after the whole blocks
// are one more block that overlaps them (see Blocks); e has room for it behind the others, where it
// is 0 in columns done already. tail_g_bar (kBlock,): likewise.
template <typename T>
OTLOSS_INLINE void first_pass(const AdjointSweep<T>& p, const Blocks<T>& blocks,
                              const RowGroup<T>& rows, const T* tail_g_bar, T* u) {
  static_assert(kRows == 4, "four rows are unrolled");
  const T F0 = rows.F[0], F1 = rows.F[1], F2 = rows.F[2], F3 = rows.F[3];
  const int64_t stride = p.m + kBlock<T>;
  std::fill(u, u + kRows, T(0));
  for (int64_t part = 0; part < parts_of(p, blocks); ++part) {
    const Part<T> at = part_of(p, blocks, part);
    const T *C0 = rows.C[0] + at.column, *C1 = rows.C[1] + at.column;
    const T *C2 = rows.C[2] + at.column, *C3 = rows.C[3] + at.column;
    const T *G = p.G + at.column, *g_bar = part == 0 ? p.g_bar : tail_g_bar;
    T *e0 = at.e, *e1 = e0 + stride, *e2 = e1 + stride, *e3 = e2 + stride;
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < at.count; ++j) {
      const T t0 = fast_exp2(F0 + G[j] - p.k * C0[j]);
      const T t1 = fast_exp2(F1 + G[j] - p.k * C1[j]);
      const T t2 = fast_exp2(F2 + G[j] - p.k * C2[j]);
      const T t3 = fast_exp2(F3 + G[j] - p.k * C3[j]);
      e0[j] = t0, e1[j] = t1, e2[j] = t2, e3[j] = t3;
      s0 += g_bar[j] * t0, s1 += g_bar[j] * t1, s2 += g_bar[j] * t2, s3 += g_bar[j] * t3;
    }
    u[0] += s0, u[1] += s1, u[2] += s2, u[3] += s3;
    for (int64_t r = 0; part == 1 && r < kRows; ++r)
#pragma omp simd
      for (int64_t j = 0; j < kBlock<T>; ++j) at.e[r * stride + j] *= blocks.mask[j];
  }
}

// v_j += sum_r R_r e_rj and C_bar_rj += e_rj (S_r g_bar_j + R_r w_j).
template <typename T>
OTLOSS_INLINE void second_pass(const AdjointSweep<T>& p, const Blocks<T>& blocks,
                               const RowGroup<T>& rows) {
  const T S0 = rows.S[0], S1 = rows.S[1], S2 = rows.S[2], S3 = rows.S[3];
  const T R0 = rows.R[0], R1 = rows.R[1], R2 = rows.R[2], R3 = rows.R[3];
  const int64_t stride = p.m + kBlock<T>;
  for (int64_t part = 0; part < parts_of(p, blocks); ++part) {
    const Part<T> at = part_of(p, blocks, part);
    const T *e0 = at.e, *e1 = e0 + stride, *e2 = e1 + stride, *e3 = e2 + stride;
    const T *g_bar = p.g_bar + at.column, *w = p.w + at.column;
    T* v = p.v + at.column;
    T *B0 = rows.C_bar[0] + at.column, *B1 = rows.C_bar[1] + at.column;
    T *B2 = rows.C_bar[2] + at.column, *B3 = rows.C_bar[3] + at.column;
    if (!p.C_bar) {
#pragma omp simd
      for (int64_t j = 0; j < at.count; ++j)
        v[j] += (R0 * e0[j] + R1 * e1[j]) + (R2 * e2[j] + R3 * e3[j]);
      continue;
    }
#pragma omp simd
    for (int64_t j = 0; j < at.count; ++j) {
      v[j] += (R0 * e0[j] + R1 * e1[j]) + (R2 * e2[j] + R3 * e3[j]);
      B0[j] += e0[j] * (S0 * g_bar[j] + R0 * w[j]);
      B1[j] += e1[j] * (S1 * g_bar[j] + R1 * w[j]);
      B2[j] += e2[j] * (S2 * g_bar[j] + R2 * w[j]);
      B3[j] += e3[j] * (S3 * g_bar[j] + R3 * w[j]);
    }
  }
}

// R takes its own exponential; rare, so one row at a time.
template <typename T>
OTLOSS_INLINE void second_pass_separate(const AdjointSweep<T>& p, const Blocks<T>& blocks,
                                        const RowGroup<T>& rows) {
  for (int64_t r = 0; r < kRows; ++r) {
    const T E = rows.E[r], S = rows.S[r], R = rows.R[r];
    const T *C = rows.C[r], *e = p.e + r * (p.m + kBlock<T>);
    T* C_bar = p.C_bar ? rows.C_bar[r] : nullptr;
    if (S == T(0) && R == T(0)) continue;
    for (int64_t j = 0; j < p.m; ++j) {
      const bool behind = blocks.tail < p.m && j >= blocks.whole;
      const T entry = e[behind ? blocks.whole + j - blocks.tail : j];
      const T value = R * fast_exp2(E + p.H[j] - p.k * C[j]);
      p.v[j] += value;
      if (C_bar) C_bar[j] += S * entry * p.g_bar[j] + (p.H[j] > T(0.5 * kLog2Zero) ? value : T(0));
    }
  }
}

template <typename T>
OTLOSS_INLINE void add_term(const AddTerms<T>& p, const TermSide<T>& x, const TermSide<T>& y,
                            int64_t r, int64_t begin, int64_t end) {
  static_assert(kRows == 4, "four rows are unrolled");
  const T *F = x.base.data() + p.row + r, *S = x.first.data() + p.row + r;
  const T* R = x.second.data() + p.row + r;
  const T F0 = F[0], F1 = F[1], F2 = F[2], F3 = F[3];
  const T S0 = S[0], S1 = S[1], S2 = S[2], S3 = S[3];
  const T R0 = R[0], R1 = R[1], R2 = R[2], R3 = R[3];
  const T *C0 = p.C + r * p.stride, *C1 = C0 + p.stride, *C2 = C1 + p.stride, *C3 = C2 + p.stride;
  T *B0 = p.C_bar + r * p.stride, *B1 = B0 + p.stride, *B2 = B1 + p.stride, *B3 = B2 + p.stride;
  const T *G = y.base.data(), *u = y.first.data(), *w = y.second.data();
#pragma omp simd
  for (int64_t j = begin; j < end; ++j) {
    B0[j] += fast_exp2(F0 + G[j] - p.k * C0[j]) * (S0 * u[j] + R0 * w[j]);
    B1[j] += fast_exp2(F1 + G[j] - p.k * C1[j]) * (S1 * u[j] + R1 * w[j]);
    B2[j] += fast_exp2(F2 + G[j] - p.k * C2[j]) * (S2 * u[j] + R2 * w[j]);
    B3[j] += fast_exp2(F3 + G[j] - p.k * C3[j]) * (S3 * u[j] + R3 * w[j]);
  }
}

}  // namespace

template <typename T>
OTLOSS_SIMD void adjoint_sweep(const AdjointSweep<T>& p) {
  const Blocks<T> blocks(p.m);
  alignas(64) T tail_g_bar[kBlock<T>];
  for (int64_t j = 0; blocks.tail < p.m && j < kBlock<T>; ++j)
    tail_g_bar[j] = blocks.mask[j] * p.g_bar[blocks.tail + j];
  for (int64_t i = 0; i < p.rows; i += kRows) {
    RowGroup<T> rows;
    for (int64_t r = 0; r < kRows; ++r) {
      const bool inside = i + r < p.rows;
      const int64_t row = inside ? i + r : p.rows - 1;
      rows.C[r] = p.C + row * p.m;
      rows.C_bar[r] = inside && p.C_bar ? p.C_bar + row * p.m : p.e + r * (p.m + kBlock<T>);
      rows.F[r] = p.F[row], rows.E[r] = p.E[row];
    }
    T u[kRows];
    first_pass(p, blocks, rows, tail_g_bar, u);
    for (int64_t r = 0; r < kRows; ++r) {
      const bool counts = i + r < p.rows && p.a[i + r] > T(0);
      rows.S[r] = counts ? p.a[i + r] : T(0);
      if (counts) p.f_bar[i + r] -= p.a[i + r] * u[r];
      if (i + r < p.rows) p.u[i + r] = counts ? u[r] : T(0);
      rows.R[r] = counts ? p.f_bar[i + r] * p.z[i + r] : T(0);
    }
    if (p.H)
      second_pass_separate(p, blocks, rows);
    else
      second_pass(p, blocks, rows);
  }
}

template <typename T>
OTLOSS_SIMD void add_terms(const AddTerms<T>& p) {
  for (int64_t begin = 0; begin < p.stride; begin += kTermColumns<T>) {
    const int64_t end = std::min(p.stride, begin + kTermColumns<T>);
    for (const Term<T>& term : *p.terms)
      for (int64_t r = 0; r < p.rows; r += kRows)
        add_term(p, p.exchanged ? term.y : term.x, p.exchanged ? term.x : term.y, r, begin, end);
  }
}

#define OTLOSS_INSTANTIATE(T)                          \
  template void adjoint_sweep(const AdjointSweep<T>&); \
  template void add_terms(const AddTerms<T>&);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)

}  // namespace otloss::cpu
