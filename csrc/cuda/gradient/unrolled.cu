// The exact derivative of L Sinkhorn iterations, in the notation of csrc/cpu/gradient/unrolled.cpp:
//     e_ij = exp((f_i + g_j / q - C_ij) / eps),  R_ij = z_i e_ij w_j,
//     u_i = sum_j e_ij g_bar_j,   f_bar_i -= a_i u_i,   a_bar_i -= eps u_i,
//     v_j = sum_i R_ij f_bar_i,   g_bar'_j = -q v_j,    b_bar_j -= eps v_j / b_j,
//     C_bar_ij = sum over iterations of a_i e_ij g_bar_j + R_ij f_bar_i.
//
// R_ij has an exponential of its own, of E_i + H_j - k C_ij: factors z and w can be beyond any
// number where e is 0. e, and then R, are made from the costs, once for the rows and once for the
// columns: sweeps (../pass/sweeps.cuh) with a block for each problem between them. The recursion
// keeps its vectors, L (n + 2 m) values; C_bar, or what the points receive, is a plain sum over the
// iterations afterwards (side_sums.h).
#include "core/penalty.h"
#include "cuda/gradient/side_sums.h"
#include "cuda/pass/sweeps.cuh"

namespace otloss::cuda {
namespace {

// The vectors of all iterations of a group.
template <typename T>
struct IterationsOfPoints {
  PackedPair<T> points;
  T* F;      // (B, packed_stride(n)) k f + log2 a of the last iteration
  T* G;      // (B, packed_stride(m)) k g + log2 b
  T* R;      // (B, L, n) f_bar times the damping of f
  T* g_bar;  // (B, L, m) times the damping of g
  T* H;      // (B, L, m) k g' + log2 b
};

template <typename T>
struct AdjointWork {
  struct State {
    int64_t l;  // iteration, or -1: P C
    // The totals of the weights a, and of the weights b that the iterations ran with: if balanced,
    // those given, scaled by the ratio to the total of a.
    double mass_a, mass_b, ratio;
  };

  Pack<UnrolledGroup<T>> pack;
  IterationsOfPoints<T> all[kMaxGroups];
  double eps;
  Objective objective;
  Sweeps<T> orders;
  T* vectors;     // (problems, 3, orders.length) exponents of an iteration; f_bar
  double* grads;  // (problems, 2, orders.length) of the weights, summed over all iterations

  OTLOSS_DEVICE const Pack<UnrolledGroup<T>>& groups() const { return pack; }

  template <class Block>
  OTLOSS_DEVICE bool advance(Block& block, ControlTeam<Block>& team, State& state,
                             const UnrolledGroup<T>& p, int64_t batch, bool first) const;
};

// A thread touches its own entries only, but in what the sums read.
template <typename T, class Block>
class Adjoint {
 public:
  using Work = AdjointWork<T>;
  using Team = ControlTeam<Block>;

  OTLOSS_DEVICE Adjoint(Block& block, const Work& work, Team& team, typename Work::State& state,
                        const UnrolledGroup<T>& p, int64_t batch)
      : block_(block),
        work_(work),
        team_(team),
        state_(state),
        p_(p),
        batch_(batch),
        all_(work.all[&p - work.pack.items]),
        x_{1 / p.penalties.rho_x},
        y_{1 / p.penalties.rho_y},
        k_(static_cast<T>(kLog2E / work.eps)),
        a_(p.a + batch * p.n),
        b_(p.b + batch * p.m),
        exponents_(work.vectors + team.index() * 3 * work.orders.length),
        f_bar_(exponents_ + 2 * work.orders.length),
        a_bar_(work.grads + team.index() * 2 * work.orders.length),
        b_bar_(a_bar_ + work.orders.length) {}

  // Asks for the first sums.
  OTLOSS_DEVICE bool open() {
    const TwoSums mass = team_.sums([&](int i) { return static_cast<double>(a_[i]); },
                                    [&](int j) { return static_cast<double>(b_[j]); });
    team_.one([&] {
      const bool balanced = p_.penalties.balanced;
      state_.mass_a = mass.first, state_.mass_b = balanced ? mass.first : mass.second;
      state_.ratio = balanced ? mass.first / mass.second : 1.0;
      const auto tiles = all_.points.tiles(batch_, p_.n, p_.m, p_.made.symmetric, k_);
      work_.orders.place(team_.index(), tiles, nullptr, nullptr);
    });
    make_H(p_.L - 1);
    if (work_.objective != Objective::kTransport) {
      seed_dual();
      return iterate(p_.L - 1);
    }
    T *const F = exponents(-1).F, *const G = exponents(-1).G;
    team_.for_rows([&](int i) { F[i] = k_ * last_f()[i] + log2_weight(a_[i]); });
    team_.for_columns([&](int j) { G[j] = k_ * last_g()[j] + log2_weight(used(j)); });
    return ask(-1, 0, RowSum::kCost, nullptr);
  }

  // After those that were asked for. True: done.
  OTLOSS_DEVICE bool advance() {
    const bool rows = work_.orders.of[team_.index()].side == 0;
    if (state_.l < 0) return rows ? row_costs() : column_costs();
    return rows ? row_sums() : column_sums();
  }

 private:
  struct Exponents {
    T *F, *G;
  };
  // Of an iteration, or of the last plan, which stay for the gradient of the costs.
  OTLOSS_DEVICE Exponents exponents(int64_t l) const {
    if (l >= 0) return {exponents_, exponents_ + work_.orders.length};
    return {all_.F + batch_ * packed_stride(p_.n), all_.G + batch_ * packed_stride(p_.m)};
  }

  OTLOSS_DEVICE T sum(int i) const { return static_cast<T>(work_.orders.sum(team_.index(), i)); }

  OTLOSS_DEVICE bool ask(int64_t l, int side, RowSum what, const T* x) {
    const Exponents of = exponents(l);
    SweepOrder<T>& order = work_.orders.of[team_.index()];
    team_.one([&] {
      state_.l = l;
      order.tiles.F = of.F, order.tiles.G = of.G;
      order.ask(side, what, x);
    });
    order.pad(block_);
    return false;
  }

  OTLOSS_DEVICE double scale() const {
    return static_cast<double>(p_.coefficient * p_.grad[batch_]);
  }
  OTLOSS_DEVICE T used(int j) const {  // the weight b_j that the iterations ran with
    return static_cast<T>(static_cast<double>(b_[j]) * state_.ratio);
  }
  // f of iteration l, and g.
  OTLOSS_DEVICE const T* trace_f(int64_t l) const {
    return p_.trace + (batch_ * p_.L + l) * (p_.n + p_.m);
  }
  OTLOSS_DEVICE const T* trace_g(int64_t l) const { return trace_f(l) + p_.n; }
  OTLOSS_DEVICE const T* last_f() const { return trace_f(p_.L - 1); }
  OTLOSS_DEVICE const T* last_g() const { return trace_g(p_.L - 1); }
  OTLOSS_DEVICE T* of_rows(T* vectors, int64_t l) const {
    return vectors + (batch_ * p_.L + l) * p_.n;
  }
  OTLOSS_DEVICE T* of_columns(T* vectors, int64_t l) const {
    return vectors + (batch_ * p_.L + l) * p_.m;
  }

  // H of iteration l, from the g before it.
  OTLOSS_DEVICE void make_H(int64_t l) const {
    const T* const start = p_.start ? p_.start + batch_ * p_.m : nullptr;
    const T* const before = l > 0 ? trace_g(l - 1) : start;
    T* const H = of_columns(all_.H, l);
    team_.for_columns([&](int j) {
      H[j] = (before && b_[j] > T(0) ? k_ * before[j] : T(0)) + log2_weight(used(j));
    });
  }

  // ------------------------------------------------------------------------------------- seeds

  OTLOSS_DEVICE bool row_costs() {
    team_.for_rows([&](int i) {
      const double term = scale() * static_cast<double>(sum(i));
      put_row(i, term / work_.eps, a_[i] > T(0) ? term / static_cast<double>(a_[i]) : 0.0);
    });
    return ask(-1, 1, RowSum::kCost, nullptr);
  }

  OTLOSS_DEVICE bool column_costs() {
    team_.for_columns([&](int j) {
      const double term = scale() * static_cast<double>(sum(j));
      put_column(j, term / work_.eps, b_[j] > T(0) ? term / static_cast<double>(used(j)) : 0.0);
    });
    return iterate(p_.L - 1);
  }

  // The derivatives of the dual objective at the last potentials.
  OTLOSS_DEVICE void seed_dual() const {
    const double eps = p_.penalties.balanced ? 0.0 : work_.eps, damping = y_.damping(work_.eps);
    team_.for_rows([&](int i) {
      const double v = static_cast<double>(last_f()[i]);
      put_row(i, scale() * x_.share(v) * static_cast<double>(a_[i]),
              scale() * (x_.dual(v) + eps * state_.mass_b));
    });
    team_.for_columns([&](int j) {
      const double v = static_cast<double>(last_g()[j]), share = y_.share(v);
      put_column(j, scale() * share / damping * static_cast<double>(used(j)),
                 scale() * (y_.dual(v) + eps * (state_.mass_a - share)));
    });
  }

  // f_bar and g_bar of the last iteration, with what comes from outside, and the weights'.
  OTLOSS_DEVICE void put_row(int i, double of_f, double of_a) const {
    const T outside = p_.grad_f ? p_.grad_f[batch_ * p_.n + i] : T(0);
    // Potentials that are NaN make the gradient NaN, which exponentials alone would not.
    f_bar_[i] = static_cast<T>(of_f) + (a_[i] > T(0) ? outside + T(0) * last_f()[i] : T(0));
    a_bar_[i] = of_a;
  }
  OTLOSS_DEVICE void put_column(int j, double of_g, double of_b) const {
    const bool counts = b_[j] > T(0);
    const T outside = p_.grad_g ? p_.grad_g[batch_ * p_.m + j] : T(0);
    const T whole = static_cast<T>(y_.damping(work_.eps)) * (static_cast<T>(of_g) + outside);
    of_columns(all_.g_bar, p_.L - 1)[j] = counts ? whole : T(0);
    b_bar_[j] = counts ? of_b : 0.0;
  }

  // -------------------------------------------------------------------------------- iterations

  // The row sums of iteration l.
  OTLOSS_DEVICE bool iterate(int64_t l) {
    const T none = static_cast<T>(kLog2Zero);
    const T to_G = static_cast<T>(kLog2E / work_.eps / y_.damping(work_.eps));
    const Exponents of = exponents(l);
    team_.for_rows([&](int i) { of.F[i] = a_[i] > T(0) ? k_ * trace_f(l)[i] : none; });
    team_.for_columns([&](int j) { of.G[j] = b_[j] > T(0) ? to_G * trace_g(l)[j] : none; });
    return ask(l, 0, RowSum::kPlan, of_columns(all_.g_bar, l));
  }

  OTLOSS_DEVICE bool row_sums() {
    const int64_t l = state_.l;
    const double damping = x_.damping(work_.eps);
    const T to_E = static_cast<T>(kLog2E / work_.eps / damping);
    const Exponents of = exponents(l);
    T *const R = of_rows(all_.R, l), *const H = of_columns(all_.H, l);
    team_.for_rows([&](int i) {
      const bool counts = a_[i] > T(0);
      const T u = sum(i), outside = l == p_.L - 1 ? f_bar_[i] : T(0);
      R[i] = counts ? (outside - a_[i] * u) * static_cast<T>(damping) : T(0);
      if (counts) a_bar_[i] -= work_.eps * static_cast<double>(u);
      of.F[i] = counts ? to_E * trace_f(l)[i] : static_cast<T>(kLog2Zero);
    });
    team_.for_columns([&](int j) { of.G[j] = H[j]; });
    return ask(l, 1, RowSum::kPlan, R);
  }

  OTLOSS_DEVICE bool column_sums() {
    const int64_t l = state_.l;
    const T damping = static_cast<T>(y_.damping(work_.eps));
    team_.for_columns([&](int j) {
      const bool counts = b_[j] > T(0);
      const T g_bar = counts ? -sum(j) : T(0);
      if (counts)
        b_bar_[j] += work_.eps * static_cast<double>(g_bar) / static_cast<double>(used(j));
      if (l > 0) of_columns(all_.g_bar, l - 1)[j] = damping * g_bar;
    });
    if (l > 0) {
      make_H(l - 1);
      return iterate(l - 1);
    }
    if (p_.grad_a == nullptr) return true;
    T *const grad_a = p_.grad_a + batch_ * p_.n, *const grad_b = p_.grad_b + batch_ * p_.m;
    team_.for_rows([&](int i) { grad_a[i] = a_[i] > T(0) ? static_cast<T>(a_bar_[i]) : T(0); });
    team_.for_columns([&](int j) { grad_b[j] = b_[j] > T(0) ? static_cast<T>(b_bar_[j]) : T(0); });
    return true;
  }

  Block& block_;
  const Work& work_;
  Team& team_;
  typename Work::State& state_;
  const UnrolledGroup<T>& p_;
  const int64_t batch_;
  const IterationsOfPoints<T>& all_;
  const Penalty x_, y_;
  const T k_;
  const T *const a_, *const b_;  // (n,) (m,)
  T *const exponents_, *const f_bar_;
  double *const a_bar_, *const b_bar_;
};

template <typename T>
template <class Block>
OTLOSS_DEVICE bool AdjointWork<T>::advance(Block& block, ControlTeam<Block>& team, State& state,
                                           const UnrolledGroup<T>& p, int64_t batch,
                                           bool first) const {
  Adjoint<T, Block> adjoint(block, *this, team, state, p, batch);
  return first ? adjoint.open() : adjoint.advance();
}

// The gradients of the costs, or the sums that the points want.
template <typename T>
void sum_iterations(const Context& context, const Pack<UnrolledGroup<T>>& pack,
                    const IterationsOfPoints<T> (&iterations)[kMaxGroups], double eps,
                    Objective objective) {
  std::vector<SideItem<T, Iterations<T>>> sides;
  const double k = kLog2E / eps;
  for (int i = 0; i < pack.count; ++i) {
    const UnrolledGroup<T>& p = pack.items[i];
    const IterationsOfPoints<T>& all = iterations[i];
    const Penalty x{1 / p.penalties.rho_x}, y{1 / p.penalties.rho_y};
    IterationSide<T> rows{}, columns{};
    rows.trace = p.trace, rows.weight = p.a, rows.R = all.R, rows.count = p.n;
    rows.to_base = static_cast<T>(k), rows.to_other = static_cast<T>(k / x.damping(eps));
    columns.trace = p.trace + p.n, columns.weight = p.b, columns.g_bar = all.g_bar;
    columns.H = all.H, columns.count = p.m;
    columns.to_base = static_cast<T>(k / y.damping(eps));
    const T of_C = of_cost<T>(objective, eps);
    const SolvedPlan<T> last{nullptr, nullptr, p.grad, p.coefficient, of_C, p.n, p.m};
    const bool transport = objective == Objective::kTransport;
    const Iterations<T> of_x{rows, columns, p.L, p.n + p.m, last, transport};
    const Iterations<T> of_y{columns, rows, p.L, p.n + p.m, last, transport};
    add_sides<T>(p, all.points, all.F, all.G, of_x, of_y, &sides);
  }
  sum_sides(context, sides, static_cast<T>(k));
}

template <typename T>
void backward(const Context& context, const Pack<UnrolledGroup<T>>& pack, double eps,
              Objective objective, Packer<T>& packer) {
  const Shape shape = shape_of<T>(pack);
  if (shape.problems == 0) return;
  const SolvePlan plan =
      products_plan(context, shape, pack.items[0].made.points.d, pack.items[0].C != nullptr);
  AdjointWork<T> work{};
  work.pack = pack, work.eps = eps, work.objective = objective;
  work.orders = Sweeps<T>::of_plan(context, shape, plan);
  work.vectors = context.scratch<T>(shape.problems * 3 * plan.vector_length);
  work.grads = context.scratch<double>(shape.problems * 2 * plan.vector_length);
  int64_t most = 0;
  for (int g = 0; g < pack.count; ++g) {
    const UnrolledGroup<T>& p = pack.items[g];
    const int64_t iterations = p.batch * p.L;
    const int64_t F = p.batch * packed_stride(p.n), G = p.batch * packed_stride(p.m);
    most = std::max(most, 2 * (p.L + 1));
    IterationsOfPoints<T>& all = work.all[g];
    all = {packer(p.batch, p.n, p.m, p.made.points, p.C),
           context.scratch<T>(F),
           context.scratch<T>(G),
           context.scratch<T>(iterations * p.n),
           context.scratch<T>(iterations * p.m),
           context.scratch<T>(iterations * p.m)};
    if (objective == Objective::kTransport) continue;
    // There is no last plan, but its exponents are loaded with the costs.
    clear(context, all.F, F * static_cast<int64_t>(sizeof(T)));
    clear(context, all.G, G * static_cast<int64_t>(sizeof(T)));
  }
  run_controls(context, work, shape.problems, most,
               [&](Queue& queue) { queue_sweep<true>(queue, work.orders, work.all[0].points); });
  sum_iterations(context, pack, work.all, eps, objective);
}

}  // namespace

template <typename T>
void unrolled_backward(const Context& context, const std::vector<UnrolledGroup<T>>& groups,
                       double eps, Objective objective) {
  Packer<T> packer(context);
  for_each_pack(groups, [&](const Pack<UnrolledGroup<T>>& pack) {
    backward(context, pack, eps, objective, packer);
  });
}

template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<float>>&, double,
                                Objective);
template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<double>>&, double,
                                Objective);

}  // namespace otloss::cuda
