// The inner loops of the unrolled gradient, vectorised: the adjoint of one iteration is one sweep
// over C with one exp2 per entry, like the iteration itself.
//
// Iteration l computes f from g' = g of iteration l - 1 and g from f. With
//     e_ij = exp((f_i + g_j - C_ij) / eps),
//     S_ij = a_i e_ij         (columns sum to 1: the softmax of the g update),
//     R_ij = e_ij w_j         (rows sum to 1: the softmax of the f update),
//     w_j  = b_j exp((g'_j - g_j) / eps)
// the gradients f_bar, g_bar of f, g go back as
//     u_i = sum_j e_ij g_bar_j        f_bar_i -= a_i u_i       a_bar_i -= eps u_i
//     v_j = sum_i R_ij f_bar_i        g_bar'_j = -v_j          b_bar_j -= eps v_j / b_j
//     C_bar_ij += S_ij g_bar_j + R_ij f_bar_i.
// Where a marginal is soft, f and g are softmins times dampings p and q. Then g stands for g / q in
// e and in w, g_bar for q g_bar from the start, f_bar in the second line for p f_bar, and
// R_ij = z_i e_ij w_j with z_i = exp((f_i / p - f_i) / eps) = exp(f_i / rho_x).
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/simd/blocks.h"

namespace otloss::cpu {

constexpr int64_t kAdjointRows = 4;  // at once

// The potentials are in base-2 units, as in sweep.h.
template <typename T>
struct AdjointSweep {
  int64_t rows;  // n
  int64_t m;     // columns
  T k;
  const T* C;      // (n, m)
  const T* a;      // (n,)
  const T* F;      // (n,) k f
  const T* G;      // (m,) k g / q
  const T* E;      // (n,) k f / p, read with H
  const T* H;      // (m,) k g' + log2 b, or null: R = z e w
  const T* z;      // (n,) times p
  const T* w;      // (m,)
  const T* g_bar;  // (m,)
  T* f_bar;        // (n,) in: the gradient from outside, out: the whole
  T* u;            // (n,) out
  T* v;            // (m,) accumulated, over w where R = e w
  T* C_bar;        // (n, m) accumulated, or null
  T* e;            // (kAdjointRows, m + kBlock) scratch
};

template <typename T>
void adjoint_sweep(const AdjointSweep<T>& sweep);

// ---------------------------------------------------------------- cost gradients without a matrix

constexpr int64_t kTermRows = 16;  // of C_bar, made together
static_assert(kTermRows % kAdjointRows == 0, "rows are done kAdjointRows at a time");

// One side of a term. Rows are read kTermRows at a time and columns in whole blocks; what lies past
// the end is 0.
template <typename T>
struct TermSide {
  BlockVector<T> base, first, second;  // (count + kTermRows,) (..) (..)

  explicit TermSide(int64_t count)
      : base(count + kTermRows), first(count + kTermRows), second(count + kTermRows) {}

  struct Entry {
    T base, first, second;
  };
  void set(int64_t i, const Entry& entry) {
    base[i] = entry.base, first[i] = entry.first, second[i] = entry.second;
  }
};

// C_bar_ij += exp2(x.base_i + y.base_j - k C_ij) (x.first_i y.first_j + x.second_i y.second_j):
// what an iteration adds, or half of it where R takes its own exponential.
template <typename T>
struct Term {
  TermSide<T> x, y;  // (n,) (m,)
};

template <typename T>
struct AddTerms {
  int64_t row;     // the first
  int64_t rows;    // up to kTermRows; those after it are computed up to a multiple of kAdjointRows
  int64_t stride;  // columns in whole blocks
  T k;
  const std::vector<Term<T>>* terms;
  bool exchanged;  // rows are those of y
  const T* C;      // (kTermRows, stride)
  T* C_bar;        // (kTermRows, stride)
};

template <typename T>
void add_terms(const AddTerms<T>& terms);

}  // namespace otloss::cpu
