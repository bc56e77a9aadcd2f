// The exact derivative of L Sinkhorn iterations, from the potentials of each: the adjoint of one
// iteration is one sweep over C with one exp2 per entry, like the iteration itself.
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
// A row needs u_i before it can add to v and C_bar, and is still in L1 when it is read again. Rows
// are taken kRows at a time, so that g_bar, w and v are read once per kRows entries.
//
// Where w or z is huge (a cold start at small eps, points that are not transported), e underflows
// although R does not: that iteration takes a second exponential for R.
//
// Where costs are made from points C_bar is not stored: the sweeps leave the vectors of each
// iteration, and then C_bar is made a few rows at a time, all iterations in turn, and applied to
// the points. That is a second exponential per entry and iteration, or a third where both sides
// want a gradient.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/math.h"
#include "cpu/engines/rows.h"
#include "cpu/gradient/adjoint.h"
#include "cpu/gradient/point_sums.h"
#include "cpu/parallel.h"
#include "cpu/problems.h"
#include "cpu/simd/blocks.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"
#include "cpu/solve/solver.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

constexpr int64_t kRows = kSweepScratchRows;

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
  T* e;            // (kRows, m) scratch
};

// kRows rows of the sweep. Rows past the end repeat the last one with factors of 0.
template <typename T>
struct RowGroup {
  const T* C[kRows];
  T* C_bar[kRows];
  T F[kRows], E[kRows];
  T S[kRows], R[kRows];  // what e is multiplied by with g_bar, and with w
};

// e_rj = exp2(F_r + G_j - k C_rj) and u_r = sum_j e_rj g_bar_j.
template <typename T>
OTLOSS_INLINE void first_pass(const AdjointSweep<T>& p, const Blocks<T>& blocks,
                              const RowGroup<T>& rows, T* u) {
  static_assert(kRows == 4, "four rows are unrolled");
  const T F0 = rows.F[0], F1 = rows.F[1], F2 = rows.F[2], F3 = rows.F[3];
  const auto range = [&](int64_t begin, int64_t end, const T* mask) OTLOSS_ALWAYS_INLINE {
    const T *C0 = rows.C[0] + begin, *C1 = rows.C[1] + begin;
    const T *C2 = rows.C[2] + begin, *C3 = rows.C[3] + begin;
    const T *G = p.G + begin, *g_bar = p.g_bar + begin;
    T *e0 = p.e + begin, *e1 = e0 + p.m, *e2 = e1 + p.m, *e3 = e2 + p.m;
    T s0 = 0, s1 = 0, s2 = 0, s3 = 0;
#pragma omp simd reduction(+ : s0, s1, s2, s3)
    for (int64_t j = 0; j < end - begin; ++j) {
      const T weight = mask ? mask[j] * g_bar[j] : g_bar[j];
      const T t0 = fast_exp2(F0 + G[j] - p.k * C0[j]);
      const T t1 = fast_exp2(F1 + G[j] - p.k * C1[j]);
      const T t2 = fast_exp2(F2 + G[j] - p.k * C2[j]);
      const T t3 = fast_exp2(F3 + G[j] - p.k * C3[j]);
      e0[j] = t0, e1[j] = t1, e2[j] = t2, e3[j] = t3;
      s0 += weight * t0, s1 += weight * t1, s2 += weight * t2, s3 += weight * t3;
    }
    u[0] += s0, u[1] += s1, u[2] += s2, u[3] += s3;
  };
  std::fill(u, u + kRows, T(0));
  range(0, blocks.whole, nullptr);
  if (blocks.tail < p.m)
    range(blocks.tail, p.m, blocks.mask);
  else
    range(blocks.whole, p.m, nullptr);
}

// v_j += sum_r R_r e_rj and C_bar_rj += e_rj (S_r g_bar_j + R_r w_j).
template <typename T>
OTLOSS_INLINE void second_pass(const AdjointSweep<T>& p, const Blocks<T>& blocks,
                               const RowGroup<T>& rows) {
  const T S0 = rows.S[0], S1 = rows.S[1], S2 = rows.S[2], S3 = rows.S[3];
  const T R0 = rows.R[0], R1 = rows.R[1], R2 = rows.R[2], R3 = rows.R[3];
  const auto range = [&](int64_t begin, int64_t end, const T* mask) OTLOSS_ALWAYS_INLINE {
    const T *e0 = p.e + begin, *e1 = e0 + p.m, *e2 = e1 + p.m, *e3 = e2 + p.m;
    const T *g_bar = p.g_bar + begin, *w = p.w + begin;
    T* v = p.v + begin;
    T *B0 = rows.C_bar[0] + begin, *B1 = rows.C_bar[1] + begin;
    T *B2 = rows.C_bar[2] + begin, *B3 = rows.C_bar[3] + begin;
    if (!p.C_bar) {
#pragma omp simd
      for (int64_t j = 0; j < end - begin; ++j) {
        const T sum = (R0 * e0[j] + R1 * e1[j]) + (R2 * e2[j] + R3 * e3[j]);
        v[j] += mask ? mask[j] * sum : sum;
      }
      return;
    }
#pragma omp simd
    for (int64_t j = 0; j < end - begin; ++j) {
      const T sum = (R0 * e0[j] + R1 * e1[j]) + (R2 * e2[j] + R3 * e3[j]);
      v[j] += mask ? mask[j] * sum : sum;
      const T x = mask ? mask[j] * g_bar[j] : g_bar[j], y = mask ? mask[j] * w[j] : w[j];
      B0[j] += e0[j] * (S0 * x + R0 * y);
      B1[j] += e1[j] * (S1 * x + R1 * y);
      B2[j] += e2[j] * (S2 * x + R2 * y);
      B3[j] += e3[j] * (S3 * x + R3 * y);
    }
  };
  range(0, blocks.whole, nullptr);
  if (blocks.tail < p.m)
    range(blocks.tail, p.m, blocks.mask);
  else
    range(blocks.whole, p.m, nullptr);
}

// The same with R computed on its own; rare, so one row at a time.
template <typename T>
OTLOSS_INLINE void second_pass_apart(const AdjointSweep<T>& p, const RowGroup<T>& rows) {
  for (int64_t r = 0; r < kRows; ++r) {
    const T E = rows.E[r], S = rows.S[r], R = rows.R[r];
    const T *C = rows.C[r], *e = p.e + r * p.m;
    T* C_bar = p.C_bar ? rows.C_bar[r] : nullptr;
    if (S == T(0) && R == T(0)) continue;
    for (int64_t j = 0; j < p.m; ++j) {
      const T value = R * fast_exp2(E + p.H[j] - p.k * C[j]);
      p.v[j] += value;
      if (C_bar) C_bar[j] += S * e[j] * p.g_bar[j] + (p.H[j] > T(0.5 * kLog2Zero) ? value : T(0));
    }
  }
}

template <typename T>
OTLOSS_INLINE void adjoint_sweep_body(const AdjointSweep<T>& p) {
  const Blocks<T> blocks(p.m);
  for (int64_t i = 0; i < p.rows; i += kRows) {
    RowGroup<T> rows;
    for (int64_t r = 0; r < kRows; ++r) {
      const bool inside = i + r < p.rows;
      const int64_t row = inside ? i + r : p.rows - 1;
      rows.C[r] = p.C + row * p.m;
      rows.C_bar[r] = inside && p.C_bar ? p.C_bar + row * p.m : p.e + r * p.m;
      rows.F[r] = p.F[row], rows.E[r] = p.E[row];
    }
    T u[kRows];
    first_pass(p, blocks, rows, u);
    for (int64_t r = 0; r < kRows; ++r) {
      const bool counts = i + r < p.rows && p.a[i + r] > T(0);
      rows.S[r] = counts ? p.a[i + r] : T(0);
      if (counts) p.f_bar[i + r] -= p.a[i + r] * u[r];
      if (i + r < p.rows) p.u[i + r] = counts ? u[r] : T(0);
      rows.R[r] = counts ? p.f_bar[i + r] * p.z[i + r] : T(0);
    }
    if (p.H)
      second_pass_apart(p, rows);
    else
      second_pass(p, blocks, rows);
  }
}

OTLOSS_SIMD void adjoint_sweep(const AdjointSweep<float>& p) { adjoint_sweep_body(p); }
OTLOSS_SIMD void adjoint_sweep(const AdjointSweep<double>& p) { adjoint_sweep_body(p); }

// ---------------------------------------------------------------- cost gradients without a matrix

// Rows of C_bar made together, and how many columns of them at a time: they and the costs stay in
// the first cache while the iterations pass by.
constexpr int64_t kTermRows = 16;
template <typename T>
constexpr int64_t kTermColumns = 512 / sizeof(T);
static_assert(kTermRows % kRows == 0, "rows are done kRows at a time");

// One side of a term. Rows are read kTermRows at a time and columns in whole blocks; what lies past
// the end is 0.
template <typename T>
struct TermSide {
  BlockVector<T> base, first, second;  // (count + kTermRows,) (..) (..)

  explicit TermSide(int64_t count)
      : base(count + kTermRows), first(count + kTermRows), second(count + kTermRows) {}

  void set(int64_t i, T base_i, T first_i, T second_i) {
    base[i] = base_i, first[i] = first_i, second[i] = second_i;
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
  int64_t rows;    // up to kTermRows; those after it are computed up to a multiple of kRows
  int64_t stride;  // columns in whole blocks
  T k;
  const std::vector<Term<T>>* terms;
  bool exchanged;  // rows are those of y
  const T* C;      // (kTermRows, stride)
  T* C_bar;        // (kTermRows, stride)
};

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

template <typename T>
OTLOSS_INLINE void add_terms_body(const AddTerms<T>& p) {
  for (int64_t begin = 0; begin < p.stride; begin += kTermColumns<T>) {
    const int64_t end = std::min(p.stride, begin + kTermColumns<T>);
    for (const Term<T>& term : *p.terms)
      for (int64_t r = 0; r < p.rows; r += kRows)
        add_term(p, p.exchanged ? term.y : term.x, p.exchanged ? term.x : term.y, r, begin, end);
  }
}

OTLOSS_SIMD void add_terms(const AddTerms<float>& p) { add_terms_body(p); }
OTLOSS_SIMD void add_terms(const AddTerms<double>& p) { add_terms_body(p); }

// ------------------------------------------------------------------------------- one problem

template <typename T>
class UnrolledProblem {
 public:
  UnrolledProblem(const UnrolledGroup<T>& group, int64_t p, double eps, bool split)
      : n_(group.n),
        m_(group.m),
        L_(group.L),
        eps_(eps),
        k_(static_cast<T>(kLog2E / eps)),
        problem_(p),
        made_(group.made),
        a_(group.a + p * n_),
        balanced_(group.strength.balanced),
        used_b_(column_weights(group.strength, n_, a_, m_, group.b + p * m_)),
        b_(used_b_.data()),
        x_(n_, a_, group.strength.rho_x),
        y_(m_, b_, group.strength.rho_y),
        damp_f_(x_.damping(eps)),
        damp_g_(y_.damping(eps)),
        trace_(group.trace + p * L_ * (n_ + m_)),
        start_(group.start ? group.start + p * m_ : nullptr),
        C_bar_(group.grad_C ? group.grad_C + p * n_ * m_ : nullptr),
        split_(split),
        parts_(n_, m_, split),
        costs_(parts_, n_, m_, group.C, made_.points, p, made_.symmetric),
        v_(parts_, m_),
        e_(parts_.count() * kRows * m_),
        F_(n_),
        E_(n_),
        z_(n_, static_cast<T>(damp_f_)),
        G_(m_),
        H_(m_),
        w_(m_),
        u_(n_),
        f_bar_(n_),
        g_bar_(m_),
        a_bar_(n_),
        b_bar_(m_) {}

  // Gradients of scale * value + <grad_f, f> + <grad_g, g>; grad_f and grad_g may be null.
  void run(T scale, Objective objective, const T* grad_f, const T* grad_g) {
    seed(scale, objective, grad_f, grad_g);
    for (int64_t l = L_ - 1; l >= 0 && !interrupted(); --l) {
      const T* before = l > 0 ? g(l - 1) : start_;
      step(f(l), g(l), before);
    }
  }

  // The sums that the points' gradients need.
  void point_gradients(T scale, Objective objective) const {
    if (made_.x.sum) side_sums(scale, objective, false);
    if (made_.y.sum) side_sums(scale, objective, true);
  }

  void weight_gradients(T* grad_a, T* grad_b) const {
    for (int64_t i = 0; i < n_; ++i) grad_a[i] = a_[i] > T(0) ? static_cast<T>(a_bar_[i]) : T(0);
    for (int64_t j = 0; j < m_; ++j) grad_b[j] = b_[j] > T(0) ? static_cast<T>(b_bar_[j]) : T(0);
  }

 private:
  const T* f(int64_t l) const { return trace_ + l * (n_ + m_); }
  const T* g(int64_t l) const { return f(l) + n_; }

  // The objective's own derivatives at the last potentials, and what comes from outside.
  void seed(T scale, Objective objective, const T* grad_f, const T* grad_g) {
    if (objective == Objective::kTransport) {
      seed_transport(scale);
    } else {
      if (C_bar_) std::fill(C_bar_, C_bar_ + n_ * m_, T(0));
      seed_value(static_cast<double>(scale));
    }
    for (int64_t i = 0; i < n_; ++i)
      if (grad_f && a_[i] > T(0)) f_bar_[i] += grad_f[i];
    for (int64_t j = 0; j < m_; ++j)
      if (grad_g && b_[j] > T(0)) g_bar_[j] += grad_g[j];
  }

  // The dual, in which the plan has the column sums b share(g): its last term is 0 if balanced.
  void seed_value(double scale) {
    const double eps = balanced_ ? 0.0 : eps_;
    for (int64_t i = 0; i < n_; ++i) {
      const double v = static_cast<double>(f(L_ - 1)[i]);
      f_bar_[i] = static_cast<T>(scale * x_.share(v)) * a_[i];
      a_bar_[i] = scale * (x_.dual(v) + eps * y_.mass);
    }
    for (int64_t j = 0; j < m_; ++j) {
      const double v = static_cast<double>(g(L_ - 1)[j]), share = y_.share(v);
      g_bar_[j] = static_cast<T>(scale * share / damp_g_) * b_[j];
      b_bar_[j] = scale * (y_.dual(v) + eps * (x_.mass - share));
    }
  }

  // <P, C> with P = a b exp((f + g - C) / eps): P (1 - C / eps) to C, and the sums of P C.
  void seed_transport(T scale) {
    for (int64_t i = 0; i < n_; ++i) F_[i] = k_ * f(L_ - 1)[i];
    absorb_weights(m_, k_, g(L_ - 1), b_, G_.data());
    std::vector<double> row(n_);
    PartSums<double> column(parts_, m_);
    const std::vector<T> none_a(n_), none_b(m_);
    const int64_t block = costs_.at_once() * m_;
    BlockVector<T> made(C_bar_ ? 0 : parts_.count() * block);
    costs_.for_each([&](int64_t part, const T* C, int64_t i, int64_t rows) {
      T* P = C_bar_ ? C_bar_ + i * m_ : made.data() + part * block;
      plan_rows(PlanRows<T>{rows, m_, k_, T(1), C, a_ + i, F_.data() + i, G_.data(), P});
      plan_sums(PlanSums<T>{rows, m_, P, C, row.data() + i, column.part(part)});
      if (C_bar_)
        weigh_plan(WeighPlan<T>{rows, m_, scale, of_cost(scale), P, C, none_a.data() + i,
                                none_b.data(), P});
    });
    const double* col = column.total();
    for (int64_t i = 0; i < n_; ++i) {
      const double term = static_cast<double>(scale) * row[i];
      f_bar_[i] = static_cast<T>(term / eps_);
      a_bar_[i] = a_[i] > T(0) ? term / static_cast<double>(a_[i]) : 0.0;
    }
    for (int64_t j = 0; j < m_; ++j) {
      const double term = static_cast<double>(scale) * col[j];
      g_bar_[j] = static_cast<T>(term / eps_);
      b_bar_[j] = b_[j] > T(0) ? term / static_cast<double>(b_[j]) : 0.0;
    }
  }

  // One iteration back. `before` is g of the iteration before, null for 0.
  void step(const T* f, const T* g, const T* before) {
    const T damp_g = static_cast<T>(damp_g_);
    for (int64_t j = 0; j < m_; ++j) g_bar_[j] *= damp_g;
    const bool tall = row_factors(f), apart = column_factors(g, before) || tall;
    if (apart) {
      const std::vector<T> zero(before ? 0 : m_);
      absorb_weights(m_, k_, before ? before : zero.data(), b_, H_.data());
      std::fill(z_.begin(), z_.end(), static_cast<T>(damp_f_));
    }
    v_.clear();
    costs_.for_each([&](int64_t part, const T* C, int64_t i, int64_t rows) {
      adjoint_sweep(AdjointSweep<T>{rows, m_, k_, C, a_ + i, F_.data() + i, G_.data(),
                                    E_.data() + i, apart ? H_.data() : nullptr, z_.data() + i,
                                    w_.data(), g_bar_.data(), f_bar_.data() + i, u_.data() + i,
                                    v_.part(part), C_bar_ ? C_bar_ + i * m_ : nullptr,
                                    e_.data() + part * kRows * m_});
    });
    if (made_.x.sum || made_.y.sum) keep_terms(apart);
    const T* v = v_.total();
    for (int64_t i = 0; i < n_; ++i) {
      a_bar_[i] -= eps_ * static_cast<double>(u_[i]);
      f_bar_[i] = 0;
    }
    for (int64_t j = 0; j < m_; ++j) {
      if (!(b_[j] > T(0))) continue;
      g_bar_[j] = apart ? -v[j] : -v[j] * w_[j];
      b_bar_[j] += eps_ * static_cast<double>(g_bar_[j]) / static_cast<double>(b_[j]);
    }
  }

  // What the iteration adds to the gradient of the cost.
  void keep_terms(bool apart) {
    terms_.push_back({TermSide<T>(n_), TermSide<T>(m_)});
    Term<T>& both = terms_.back();
    for (int64_t i = 0; i < n_; ++i)
      if (a_[i] > T(0)) both.x.set(i, F_[i], a_[i], apart ? T(0) : f_bar_[i] * z_[i]);
    for (int64_t j = 0; j < m_; ++j)
      if (b_[j] > T(0)) both.y.set(j, G_[j], g_bar_[j], apart ? T(0) : w_[j]);
    if (!apart) return;
    terms_.push_back({TermSide<T>(n_), TermSide<T>(m_)});
    Term<T>& second = terms_.back();
    for (int64_t i = 0; i < n_; ++i)
      if (a_[i] > T(0)) second.x.set(i, E_[i], T(0), f_bar_[i] * z_[i]);
    for (int64_t j = 0; j < m_; ++j)
      if (b_[j] > T(0)) second.y.set(j, H_[j], T(0), T(1));
  }

  // The plan of the last potentials.
  std::vector<Term<T>> plan_term() const {
    std::vector<T> G(m_);
    absorb_weights(m_, k_, g(L_ - 1), b_, G.data());
    std::vector<Term<T>> plan;
    plan.push_back({TermSide<T>(n_), TermSide<T>(m_)});
    for (int64_t i = 0; i < n_; ++i)
      if (a_[i] > T(0)) plan[0].x.set(i, k_ * f(L_ - 1)[i], a_[i], T(0));
    for (int64_t j = 0; j < m_; ++j)
      if (b_[j] > T(0)) plan[0].y.set(j, G[j], T(1), T(0));
    return plan;
  }

  // Of x, or of y as rows. A cloud against itself takes the terms of both at once.
  void side_sums(T scale, Objective objective, bool exchange) const {
    const bool symmetric = made_.symmetric, transport = objective == Objective::kTransport;
    const int64_t n = exchange ? m_ : n_, m = exchange ? n_ : m_;
    const PointPair<T> points = exchange ? exchanged(made_.points) : made_.points;
    const std::vector<Term<T>> plan = transport ? plan_term() : std::vector<Term<T>>();
    const auto gradient = [&](const T* C, int64_t i, int64_t rows, int64_t stride, T* V) {
      std::fill_n(V, kTermRows * stride, T(0));
      if (interrupted()) return;
      const auto add = [&](const std::vector<Term<T>>& terms) {
        add_terms(AddTerms<T>{i, rows, stride, k_, &terms, exchange, C, V});
        if (symmetric) add_terms(AddTerms<T>{i, rows, stride, k_, &terms, !exchange, C, V});
      };
      if (transport) {
        add(plan);
        for (int64_t at = 0; at < rows * stride; ++at) V[at] *= scale + of_cost(scale) * C[at];
      }
      add(terms_);
    };
    point_sums(MadeRows<T>(n, m, points, problem_, symmetric), RowParts(n, m, split_), kTermRows,
               of_problem(exchange ? made_.y : made_.x, problem_, n, points.d), gradient);
  }

  // What the transport objective's derivative P (scale + t C) takes of the cost.
  T of_cost(T scale) const { return static_cast<T>(-static_cast<double>(scale) / eps_); }

  // F, E and z; whether z is out of range.
  bool row_factors(const T* f) {
    const T to_E = static_cast<T>(kLog2E / eps_ / damp_f_), damp = static_cast<T>(damp_f_);
    T largest = 0;
    for (int64_t i = 0; i < n_; ++i) {
      F_[i] = k_ * f[i];
      E_[i] = to_E * f[i];
      if (x_.hard()) continue;
      const T change = static_cast<T>(kLog2E * x_.rate) * f[i];
      z_[i] = damp * fast_exp2(change);
      largest = std::max(largest, change);
    }
    return !(largest < std::log2(static_cast<T>(kTrusted)));
  }

  // G and w; whether w is out of range. Columns of weight 0 get w = 0 and g_bar = 0.
  bool column_factors(const T* g, const T* before) {
    const T to_G = static_cast<T>(kLog2E / eps_ / damp_g_);
    T largest = 0;
    for (int64_t j = 0; j < m_; ++j) {
      const bool counts = b_[j] > T(0);
      G_[j] = to_G * g[j];
      const T change = counts ? k_ * (before ? before[j] : T(0)) - G_[j] : T(0);
      w_[j] = counts ? b_[j] * fast_exp2(change) : T(0);
      if (!counts) g_bar_[j] = 0;
      largest = std::max(largest, change);
    }
    return !(largest < std::log2(static_cast<T>(kTrusted)));
  }

  const int64_t n_, m_, L_;
  const double eps_;
  const T k_;
  const int64_t problem_;
  const MadeCost<T>& made_;
  const T* const a_;  // (n,)
  const bool balanced_;
  const std::vector<T> used_b_;  // what the iterations ran with
  const T* const b_;             // (m,)
  const Side<T> x_, y_;
  const double damp_f_, damp_g_;
  const T* const trace_;  // (L, n + m)
  const T* const start_;  // (m,) or null
  T* const C_bar_;        // (n, m) or null
  const bool split_;
  RowParts parts_;
  CostBlocks<T> costs_;
  std::vector<Term<T>> terms_;  // of each iteration that was gone back, where costs are made
  PartSums<T> v_;               // (m,)
  std::vector<T> e_;            // (parts, kRows, m)
  std::vector<T> F_, E_, z_;    // (n,) each
  std::vector<T> G_, H_, w_;    // (m,) each
  std::vector<T> u_, f_bar_;    // (n,) each
  std::vector<T> g_bar_;        // (m,)
  std::vector<double> a_bar_;   // (n,) summed over all iterations
  std::vector<double> b_bar_;   // (m,)
};

}  // namespace

template <typename T>
void unrolled_backward(const std::vector<UnrolledGroup<T>>& groups, double eps,
                       Objective objective) {
  for_each_problem(groups, [&](const UnrolledGroup<T>& group, int64_t p, bool split) {
    UnrolledProblem<T> problem(group, p, eps, split);
    problem.run(group.coefficient * group.grad[p], objective,
                group.grad_f ? group.grad_f + p * group.n : nullptr,
                group.grad_g ? group.grad_g + p * group.m : nullptr);
    if (!group.C && !interrupted())
      problem.point_gradients(group.coefficient * group.grad[p], objective);
    if (group.grad_a)
      problem.weight_gradients(group.grad_a + p * group.n, group.grad_b + p * group.m);
  });
}

template void unrolled_backward(const std::vector<UnrolledGroup<float>>&, double, Objective);
template void unrolled_backward(const std::vector<UnrolledGroup<double>>&, double, Objective);

}  // namespace otloss::cpu
