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
#include "cpu/gradient/point_sums.h"
#include "cpu/simd/sweep.h"
#include "cpu/solve/marginal.h"
#include "kernels.h"

namespace otloss::cpu {
namespace {

template <typename T>
class UnrolledProblem {
 public:
  UnrolledProblem(const UnrolledGroup<T>& group, int64_t p, double eps, Objective objective,
                  bool split)
      : group_(group), problem_(p), eps_(eps), objective_(objective), split_(split) {}

  // Gradients of scale * value + <grad_f, f> + <grad_g, g>.
  void run() {
    seed();
    for (int64_t l = L_ - 1; l >= 0 && !interrupted(); --l)
      step(f(l), g(l), l > 0 ? g(l - 1) : start_);
    if (made_.x.sum && !interrupted()) side_sums(false);
    if (made_.y.sum && !interrupted()) side_sums(true);
    if (!group_.grad_a) return;
    const auto give = [](int64_t count, const T* weight, const double* bar, T* grad) {
      for (int64_t i = 0; i < count; ++i)
        grad[i] = weight[i] > T(0) ? static_cast<T>(bar[i]) : T(0);
    };
    give(n_, a_, a_bar_.data(), group_.grad_a + problem_ * n_);
    give(m_, b_, b_bar_.data(), group_.grad_b + problem_ * m_);
  }

 private:
  using Values = std::vector<T>;

  const T* f(int64_t l) const { return trace_ + l * (n_ + m_); }
  const T* g(int64_t l) const { return f(l) + n_; }

  // The objective's own derivatives at the last potentials, and what comes from outside.
  void seed() {
    if (objective_ == Objective::kTransport) {
      seed_transport();
    } else {
      if (C_bar_) std::fill(C_bar_, C_bar_ + n_ * m_, T(0));
      seed_value(static_cast<double>(scale_));
    }
    const auto add = [](int64_t count, const T* weight, const T* grad, T* bar) {
      for (int64_t i = 0; i < count; ++i)
        if (weight[i] > T(0)) bar[i] += grad[i];
    };
    if (group_.grad_f) add(n_, a_, group_.grad_f + problem_ * n_, f_bar_.data());
    if (group_.grad_g) add(m_, b_, group_.grad_g + problem_ * m_, g_bar_.data());
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
      b_bar_[j] = scale * y_.weight_gradient(eps, x_.mass, v);
    }
  }

  // <P, C> with P = a b exp((f + g - C) / eps): P (1 - C / eps) to C, and the sums of P C.
  void seed_transport() {
    for (int64_t i = 0; i < n_; ++i) F_[i] = k_ * f(L_ - 1)[i];
    absorb_weights(m_, k_, g(L_ - 1), b_, G_.data());
    std::vector<double> row(n_);
    PartSums<double> column(parts_, m_);
    const std::vector<T> none_a(n_), none_b(m_);
    const int64_t block = costs_.at_once() * m_;
    BlockVector<T> made(C_bar_ ? 0 : parts_.count() * block);
    costs_.for_each([&](int64_t part, const T* C, int64_t i, int64_t rows) {
      T* P = C_bar_ ? C_bar_ + i * m_ : made.data() + part * block;
      plan_rows(PlanRows<T>{rows, m_, k_, T(1), C, m_, a_ + i, F_.data() + i, G_.data(), P});
      plan_sums(PlanSums<T>{rows, m_, P, C, row.data() + i, column.part(part)});
      if (C_bar_)
        weigh_plan(
            WeighPlan<T>{rows, m_, scale_, of_cost_, P, C, none_a.data() + i, none_b.data(), P});
    });
    const auto take = [&](int64_t count, const T* weight, const double* sums, T* bar,
                          double* weight_bar) {
      for (int64_t i = 0; i < count; ++i) {
        const double term = static_cast<double>(scale_) * sums[i];
        bar[i] = static_cast<T>(term / eps_);
        weight_bar[i] = weight[i] > T(0) ? term / static_cast<double>(weight[i]) : 0.0;
      }
    };
    take(n_, a_, row.data(), f_bar_.data(), a_bar_.data());
    take(m_, b_, column.total(), g_bar_.data(), b_bar_.data());
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

  // The term of what base(i), first(i) and second(i) are, of rows and of columns of any weight.
  template <typename X, typename Y>
  Term<T> term(X&& x, Y&& y) const {
    Term<T> both{TermSide<T>(n_), TermSide<T>(m_)};
    for (int64_t i = 0; i < n_; ++i)
      if (a_[i] > T(0)) both.x.set(i, x(i));
    for (int64_t j = 0; j < m_; ++j)
      if (b_[j] > T(0)) both.y.set(j, y(j));
    return both;
  }

  // What the iteration adds to the gradient of the cost.
  void keep_terms(bool apart) {
    using Entry = typename TermSide<T>::Entry;
    terms_.push_back(
        term([&](int64_t i) { return Entry{F_[i], a_[i], apart ? T(0) : f_bar_[i] * z_[i]}; },
             [&](int64_t j) { return Entry{G_[j], g_bar_[j], apart ? T(0) : w_[j]}; }));
    if (apart)
      terms_.push_back(term([&](int64_t i) { return Entry{E_[i], T(0), f_bar_[i] * z_[i]}; },
                            [&](int64_t j) { return Entry{H_[j], T(0), T(1)}; }));
  }

  // The plan of the last potentials.
  Term<T> plan_term() const {
    using Entry = typename TermSide<T>::Entry;
    std::vector<T> G(m_);
    absorb_weights(m_, k_, g(L_ - 1), b_, G.data());
    return term([&](int64_t i) { return Entry{k_ * f(L_ - 1)[i], a_[i], T(0)}; },
                [&](int64_t j) { return Entry{G[j], T(1), T(0)}; });
  }

  // Of x, or of y as rows. A cloud against itself takes the terms of both at once.
  void side_sums(bool exchange) const {
    const bool symmetric = made_.symmetric, transport = objective_ == Objective::kTransport;
    const int64_t n = (exchange ? m_ : n_) - group_.dummies;
    const int64_t m = (exchange ? n_ : m_) - group_.dummies;
    const PointPair<T> points = exchange ? exchanged(made_.points) : made_.points;
    std::vector<Term<T>> plan;
    if (transport) plan.push_back(plan_term());
    const auto gradient = [&](const T* C, int64_t i, int64_t rows, int64_t stride, T* V) {
      std::fill_n(V, kTermRows * stride, T(0));
      if (interrupted()) return;
      const auto add = [&](const std::vector<Term<T>>& terms) {
        add_terms(AddTerms<T>{i, rows, stride, k_, &terms, exchange, C, V});
        if (symmetric) add_terms(AddTerms<T>{i, rows, stride, k_, &terms, !exchange, C, V});
      };
      if (transport) {
        add(plan);
        for (int64_t at = 0; at < rows * stride; ++at) V[at] *= scale_ + of_cost_ * C[at];
      }
      add(terms_);
    };
    point_sums<T>(RowSource<T>(n, m, {}, m, points, problem_, symmetric), RowParts(n, m, split_),
                  kTermRows, of_problem(exchange ? made_.y : made_.x, problem_, n, points.d),
                  gradient);
  }

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

  const UnrolledGroup<T>& group_;
  const int64_t problem_;
  const double eps_;
  const Objective objective_;
  const bool split_;
  const MadeCost<T>& made_ = group_.made;
  const bool balanced_ = group_.penalties.balanced;
  const int64_t n_ = group_.n, m_ = group_.m, L_ = group_.L;
  const T k_ = factor<T>(eps_), scale_ = group_.coefficient * group_.grad[problem_];
  // What the transport objective's derivative P (scale + t C) takes of the cost.
  const T of_cost_ = static_cast<T>(-static_cast<double>(scale_) / eps_);
  const T* const a_ = group_.a + problem_ * n_;  // (n,)
  const std::vector<T> used_b_ =                 // what the iterations ran with
      column_weights(group_.penalties, n_, a_, m_, group_.b + problem_ * m_);
  const T* const b_ = used_b_.data();  // (m,)
  const Side<T> x_{n_, a_, group_.penalties.rho_x}, y_{m_, b_, group_.penalties.rho_y};
  const double damp_f_ = x_.damping(eps_), damp_g_ = y_.damping(eps_);
  const T* const trace_ = group_.trace + problem_ * L_ * (n_ + m_);                // (L, n + m)
  const T* const start_ = group_.start ? group_.start + problem_ * m_ : nullptr;   // (m,)
  T* const C_bar_ = group_.grad_C ? group_.grad_C + problem_ * n_ * m_ : nullptr;  // (n, m)
  const RowParts parts_{n_, m_, split_};
  CostBlocks<T> costs_{parts_, kBlockRows,
                       RowSource<T>(n_, m_, {group_.matrix(problem_), m_ - group_.dummies}, m_,
                                    made_.points, problem_, made_.symmetric, group_.dummies, eps_)};
  std::vector<Term<T>> terms_;  // of each iteration that was gone back, where costs are made
  PartSums<T> v_{parts_, m_};   // (m,)
  Values e_ = Values(parts_.count() * kAdjointRows * (m_ + kBlock<T>));
  Values F_ = Values(n_), E_ = Values(n_), z_ = Values(n_, static_cast<T>(damp_f_));
  Values G_ = Values(m_), H_ = Values(m_), w_ = Values(m_);
  Values u_ = Values(n_), f_bar_ = Values(n_), g_bar_ = Values(m_);
  std::vector<double> a_bar_ = std::vector<double>(n_);  // summed over all iterations
  std::vector<double> b_bar_ = std::vector<double>(m_);
};

}  // namespace

template <typename T>
void unrolled_backward(const std::vector<UnrolledGroup<T>>& groups, const Eps& eps,
                       Objective objective) {
  for_each_problem(groups, [&](const UnrolledGroup<T>& group, int64_t p, bool split) {
    UnrolledProblem<T>(group, p, eps.of(p), objective, split).run();
  });
}

template void unrolled_backward(const std::vector<UnrolledGroup<float>>&, const Eps&, Objective);
template void unrolled_backward(const std::vector<UnrolledGroup<double>>&, const Eps&, Objective);

}  // namespace otloss::cpu
