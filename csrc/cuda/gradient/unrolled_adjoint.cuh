// The recursion of unrolled.cu but for the sums over all pairs, for a team of blocks with a matrix,
// or for a block between sweeps. A thread touches its own entries only, but in H and g_bar, which
// the sums read.
#pragma once

#include "cuda/gradient/unrolled.h"
#include "cuda/pass/team_sweep.cuh"

namespace otloss::cuda {

template <typename T>
struct AdjointArguments {
  Pack<AdjointGroup<T>> pack;
  TeamArguments<T> blocks;
  double eps;
  Objective objective;
  T* f_bar;       // (teams, rows) of the last iteration
  T* G;           // (teams, columns) k g + log2 b of the last iteration
  double* a_bar;  // (teams, rows)
  double* b_bar;  // (teams, columns)
};

// P C from the costs: what <P, C> puts on potentials and weights.
template <typename T, class Block>
struct PlanCostWork {
  static constexpr bool kApart = false, kGuarded = false;
  using Column = T;  // G

  TeamMemory<Block> memory;
  const T* tile;  // (rows, m) costs
  const T* a;     // (rows,)
  const T* f;     // (rows,)
  const T* G;     // (m,) k g + log2 b
  T k;
  T* out;  // (rows,) row sums

  OTLOSS_DEVICE T none() const { return static_cast<T>(kLog2Zero); }
  OTLOSS_DEVICE T no_column() const { return static_cast<T>(kLog2Zero); }
  OTLOSS_DEVICE T row(int i) const { return a[i] > T(0) ? k * f[i] : none(); }
  OTLOSS_DEVICE T column(int j) const { return memory.load(G + j); }
  OTLOSS_DEVICE T entry(T F, T G, T c) const {
    const T t = F + G - k * c;
    return plan_entry(T(1), t) * (t > static_cast<T>(-kExp2Limit) ? c : T(0));
  }
  OTLOSS_DEVICE T term(T, T entry) const { return entry; }
  OTLOSS_DEVICE T finish(int i, T sum, bool leader) const {
    const T weight = a[i] > T(0) ? a[i] : T(0);
    if (leader) out[i] = weight > T(0) ? weight * sum : T(0);
    return weight;
  }
};

// One iteration back: row sums u, and v as column sums.
template <class Block, typename T>
struct IterationWork {
  static constexpr bool kApart = true, kGuarded = false;
  struct Column {
    T G, H, g_bar;
  };
  TeamMemory<Block> memory;
  const T* tile;   // (rows, m)
  const T* a;      // (rows,)
  const T* f;      // (rows,)
  const T* b;      // (m,)
  const T* g;      // (m,)
  const T* g_bar;  // (m,) times q
  const T* H;      // (m,)
  const T* f_bar;  // (rows,) from outside, or null
  double* a_bar;   // (rows,) accumulated
  T* R;            // (rows,) out, or null
  T k, to_E, to_G, damping;
  double eps;

  OTLOSS_DEVICE T none() const { return static_cast<T>(kLog2Zero); }
  OTLOSS_DEVICE Column no_column() const { return {none(), none(), T(0)}; }
  // Rows and columns of weight 0 must give finite entries.
  OTLOSS_DEVICE T row(int i) const { return a[i] > T(0) ? k * f[i] : none(); }
  OTLOSS_DEVICE T row_again(int i) const { return a[i] > T(0) ? to_E * f[i] : none(); }
  OTLOSS_DEVICE T exponent_of(int j) const { return b[j] > T(0) ? to_G * g[j] : none(); }
  OTLOSS_DEVICE Column column(int j) const {
    return {exponent_of(j), memory.load(H + j), memory.load(g_bar + j)};
  }
  OTLOSS_DEVICE T entry(T F, const Column& column, T c) const {
    return fast_exp2(F + column.G - k * c);
  }
  OTLOSS_DEVICE T term(const Column& column, T entry) const { return entry * column.g_bar; }
  OTLOSS_DEVICE T again(T E, const Column& column, T c) const {
    return fast_exp2(E + column.H - k * c);
  }
  OTLOSS_DEVICE T finish(int i, T u, bool leader) const {
    const bool counts = a[i] > T(0);
    const T outside = f_bar ? f_bar[i] : T(0);
    const T value = counts ? (outside - a[i] * u) * damping : T(0);
    if (leader && counts) a_bar[i] -= eps * static_cast<double>(u);
    if (leader && R) R[i] = value;
    return value;
  }
};

template <typename T, class Block, class Team>
class Adjoint {
 public:
  // tile: (rows, m) costs, where they are stored.
  OTLOSS_DEVICE Adjoint(const AdjointArguments<T>& arguments, Team& team, const AdjointGroup<T>& p,
                        int64_t batch, const T* tile)
      : team_(team),
        p_(p),
        batch_(batch),
        args_(arguments),
        tile_(tile),
        x_(row_penalty(p)),
        y_(column_penalty(p)),
        damp_f_(x_.damping(arguments.eps)),
        damp_g_(y_.damping(arguments.eps)),
        k_(static_cast<T>(kLog2E / arguments.eps)),
        a_(p.a + batch * p.n + team.first_row()),
        b_(p.b + batch * p.m),
        f_bar_(arguments.f_bar + team.index() * arguments.blocks.rows + team.first_row()),
        a_bar_(arguments.a_bar + team.index() * arguments.blocks.rows + team.first_row()),
        b_bar_(arguments.b_bar + team.index() * arguments.blocks.columns) {}

  OTLOSS_DEVICE bool is_transport() const { return args_.objective == Objective::kTransport; }

  OTLOSS_DEVICE void begin() {
    double sums[2] = {0, 0};
    team_.for_rows([&](int i) { sums[0] += static_cast<double>(a_[i]); });
    team_.for_columns([&](int j) { sums[1] += static_cast<double>(b_[j]); });
    team_.sum(sums);
    masses_ = Masses(sums[0], sums[1], p_.penalties.balanced);
    if (team_.first_thread()) p_.masses[2 * batch_] = sums[0], p_.masses[2 * batch_ + 1] = sums[1];
    make_H(p_.L - 1);
  }
  // In another launch.
  OTLOSS_DEVICE void resume() {
    const double* const sums = p_.masses + 2 * batch_;
    masses_ = Masses(sums[0], sums[1], p_.penalties.balanced);
  }

  // H of iteration l.
  OTLOSS_DEVICE void make_H(int64_t l) const {
    const T* const before = g_before(p_, batch_, l);
    T* const H = p_.H + (batch_ * p_.L + l) * p_.m;
    team_.for_columns([&](int j) {
      const T G = before ? k_ * before[j] : T(0);
      team_.store(H + j, b_[j] > T(0) ? G + log2_used(j) : static_cast<T>(kLog2Zero));
    });
  }

  // ------------------------------------------------------------------------------------- seeds

  // Exponents of the last plan.
  OTLOSS_DEVICE T plan_F(int i) const { return k_ * last_f()[i] + log2_weight(a_[i]); }
  OTLOSS_DEVICE T plan_G(int j) const { return k_ * last_g()[j] + log2_used(j); }

  // Row sums of P C go to f_bar; G: of the last plan.
  OTLOSS_DEVICE T* f_bar() const { return f_bar_; }
  OTLOSS_DEVICE PlanCostWork<T, Block> cost_work(const T* G) const {
    return {team_.memory(), tile_, a_, last_f(), G, k_, f_bar_};
  }

  // From its column sums.
  OTLOSS_DEVICE void put_costs(int j, T sum) const {
    const double term = scale() * static_cast<double>(sum);
    put(j, term / args_.eps,
        b_[j] > T(0) ? term / static_cast<double>(masses_.scaled(b_[j])) : 0.0);
  }
  // And from its row sums.
  OTLOSS_DEVICE void seed_costs() const {
    team_.for_rows([&](int i) {
      const double term = scale() * static_cast<double>(f_bar_[i]);
      f_bar_[i] = static_cast<T>(term / args_.eps);
      a_bar_[i] = a_[i] > T(0) ? term / static_cast<double>(a_[i]) : 0.0;
    });
  }

  // The derivatives of the dual objective at the last potentials.
  OTLOSS_DEVICE void seed_dual() const {
    const double eps = p_.penalties.balanced ? 0.0 : args_.eps;
    team_.for_rows([&](int i) {
      const double v = static_cast<double>(last_f()[i]);
      f_bar_[i] = static_cast<T>(scale() * x_.share(v)) * a_[i];
      a_bar_[i] = scale() * (x_.dual(v) + eps * masses_.b);
    });
    team_.for_columns([&](int j) {
      const double v = static_cast<double>(last_g()[j]), share = y_.share(v);
      put(j, scale() * share / damp_g_ * static_cast<double>(masses_.scaled(b_[j])),
          scale() * (y_.dual(v) + eps * (masses_.a - share)));
    });
  }

  // What comes from outside on f.
  OTLOSS_DEVICE void add_outside() const {
    team_.for_rows([&](int i) {
      const T outside = p_.grad_f ? p_.grad_f[batch_ * p_.n + team_.first_row() + i] : T(0);
      // Potentials that are NaN make the gradient NaN, which exponentials alone would not.
      f_bar_[i] += a_[i] > T(0) ? outside + T(0) * last_f()[i] : T(0);
    });
  }

  // -------------------------------------------------------------------------------- iterations

  OTLOSS_DEVICE IterationWork<Block, T> work(int64_t l) const {
    const int64_t at = batch_ * p_.L + l, row = team_.first_row();
    return {team_.memory(),
            tile_,
            a_,
            trace_f(p_, batch_, l) + row,
            b_,
            trace_g(p_, batch_, l),
            p_.g_bar + at * p_.m,
            p_.H + at * p_.m,
            l == p_.L - 1 ? f_bar_ : nullptr,
            a_bar_,
            p_.R ? p_.R + at * p_.n + row : nullptr,
            k_,
            static_cast<T>(kLog2E / args_.eps / damp_f_),
            static_cast<T>(kLog2E / args_.eps / damp_g_),
            static_cast<T>(damp_f_),
            args_.eps};
  }

  // v_j of iteration l.
  OTLOSS_DEVICE void take(int64_t l, int j, T v) const {
    const T g_bar = b_[j] > T(0) ? -v : T(0);
    if (b_[j] > T(0))
      b_bar_[j] +=
          args_.eps * static_cast<double>(g_bar) / static_cast<double>(masses_.scaled(b_[j]));
    if (l > 0)
      team_.store(p_.g_bar + (batch_ * p_.L + l - 1) * p_.m + j, static_cast<T>(damp_g_) * g_bar);
  }

  OTLOSS_DEVICE void write() const {
    if (p_.grad_a == nullptr) return;
    T* const grad_a = p_.grad_a + batch_ * p_.n + team_.first_row();
    T* const grad_b = p_.grad_b + batch_ * p_.m;
    team_.for_rows([&](int i) { grad_a[i] = a_[i] > T(0) ? static_cast<T>(a_bar_[i]) : T(0); });
    team_.for_columns([&](int j) { grad_b[j] = b_[j] > T(0) ? static_cast<T>(b_bar_[j]) : T(0); });
  }

 private:
  OTLOSS_DEVICE double scale() const {
    return static_cast<double>(p_.coefficient * p_.grad[batch_]);
  }
  OTLOSS_DEVICE T log2_used(int j) const { return log2_weight(masses_.scaled(b_[j])); }
  OTLOSS_DEVICE const T* last_f() const {
    return trace_f(p_, batch_, p_.L - 1) + team_.first_row();
  }
  OTLOSS_DEVICE const T* last_g() const { return trace_g(p_, batch_, p_.L - 1); }

  // g_bar of the last iteration, with what comes from outside.
  OTLOSS_DEVICE void put(int j, double of_g, double of_b) const {
    const bool counts = b_[j] > T(0);
    const T outside = p_.grad_g ? p_.grad_g[batch_ * p_.m + j] : T(0);
    const T whole = static_cast<T>(damp_g_) * (static_cast<T>(of_g) + outside);
    team_.store(p_.g_bar + (batch_ * p_.L + p_.L - 1) * p_.m + j, counts ? whole : T(0));
    b_bar_[j] = counts ? of_b : 0.0;
  }

 protected:
  Team& team_;
  const AdjointGroup<T>& p_;
  const int64_t batch_;

 private:
  const AdjointArguments<T>& args_;
  const T* const tile_;
  const Penalty x_, y_;
  const double damp_f_, damp_g_;
  const T k_;
  Masses masses_;
  const T *const a_, *const b_;  // (rows,) (m,)
  T* const f_bar_;               // (rows,)
  double* const a_bar_;          // (rows,) summed over all iterations
  double* const b_bar_;          // (m,)
};

}  // namespace otloss::cuda
