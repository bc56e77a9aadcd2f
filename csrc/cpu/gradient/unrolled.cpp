// The exact derivative of L Sinkhorn iterations, from the potentials of each (adjoint_sweep.h).
//
// Where costs are made from points C_bar is not stored: the sweeps leave the vectors of each
// iteration, and then C_bar is made a few rows at a time, all iterations in turn, and applied to
// the points. That is a second exponential per entry and iteration, or a third where both sides
// want a gradient.
#include <algorithm>
#include <cmath>
#include <vector>

#include "core/math.h"
#include "cpu/gradient/adjoint_sweep.h"
#include "cpu/gradient/plan_passes.h"
#include "cpu/gradient/point_sums.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

template <typename T>
class UnrolledProblem {
 public:
  UnrolledProblem(const UnrolledGroup<T>& group, int64_t p, double eps, bool split)
      : n_(group.n),
        m_(group.m),
        L_(group.L),
        eps_(eps),
        k_(factor<T>(eps)),
        problem_(p),
        made_(group.made),
        a_(group.a + p * n_),
        balanced_(group.penalties.balanced),
        used_b_(column_weights(group.penalties, n_, a_, m_, group.b + p * m_)),
        b_(used_b_.data()),
        x_(n_, a_, group.penalties.rho_x),
        y_(m_, b_, group.penalties.rho_y),
        damp_f_(x_.damping(eps)),
        damp_g_(y_.damping(eps)),
        trace_(group.trace + p * L_ * (n_ + m_)),
        start_(group.start ? group.start + p * m_ : nullptr),
        C_bar_(group.grad_C ? group.grad_C + p * n_ * m_ : nullptr),
        split_(split),
        parts_(n_, m_, split),
        costs_(parts_, kBlockRows, RowSource<T>(n_, m_, group.C, made_.points, p, made_.symmetric)),
        v_(parts_, m_),
        e_(parts_.count() * kAdjointRows * (m_ + kBlock<T>)),
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
                                    e_.data() + part * kAdjointRows * (m_ + kBlock<T>)});
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
    point_sums<T>(RowSource<T>(n, m, nullptr, points, problem_, symmetric), RowParts(n, m, split_),
                  kTermRows, of_problem(exchange ? made_.y : made_.x, problem_, n, points.d),
                  gradient);
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
  std::vector<T> e_;            // (parts, kAdjointRows, m + kBlock)
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
