// The derivative of the solution (core/implicit_system.h). In turn, until all systems of a call are
// solved:
//
//     SweepKernel     P x or P^T w of each problem               ../pass/sweeps.cuh
//     ControlKernel   the vectors of the iteration
//
// The entries of P are made again in every product, the same bits for both sides. Then comes C_bar,
// or what the points receive, by the potentials and the solution (alpha, beta). All vectors and
// sums are in double as on the CPU, whatever the plan's dtype.
//
// At fixed potentials (envelope) there is no system, alpha = beta = 0, and one control alone.
#include <limits>

#include "core/implicit_system.h"
#include "core/rounding.h"
#include "cuda/gradient/side_sums.h"
#include "cuda/pass/sweeps.cuh"

namespace otloss::cuda {
namespace {

// As in csrc/cpu/gradient/implicit.cpp.
template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-8 : 1e-13;

// The plan of a group and the solution of its linear system.
template <typename T>
struct PlanOfPoints {
  PackedPair<T> points;
  T* F;      // (B, packed_stride(n)) k f + log2 a, kLog2Zero past the end
  T* G;      // (B, packed_stride(m)) k g + log2 b
  T* alpha;  // (B, n), or null: there is no system
  T* beta;   // (B, m)
};

template <typename T>
struct ImplicitWork {
  using State = ImplicitState;

  Pack<ImplicitGroup<T>> pack;
  PlanOfPoints<T> plans[kMaxGroups];
  double eps, tol;
  Objective objective;
  bool fixed;  // the gradient at fixed potentials
  Sweeps<T, double> orders;
  double* vectors;  // (problems, ImplicitState::kVectors, orders.length)

  OTLOSS_DEVICE const Pack<ImplicitGroup<T>>& groups() const { return pack; }

  template <class Block>
  OTLOSS_DEVICE bool advance(Block& block, ControlTeam<Block>& team, State& state,
                             const ImplicitGroup<T>& p, int64_t batch, bool first) const {
    const PlanOfPoints<T>& plan = plans[&p - pack.items];
    T* const F = plan.F + batch * packed_stride(p.n);
    T* const G = plan.G + batch * packed_stride(p.m);
    ImplicitSystem<ControlTeam<Block>> system(team, state);
    if (!first) {
      if (!complete(team, state, F, G)) return false;
      system.advance();
    } else {
      load(team, state, p, batch);
      system.fix_potentials();
      place(block, team, state, p, batch, plan, F, G);
      if (fixed)
        system.seed_value(state.transport ? 0.0 : state.scale);
      else
        system.open();
    }
    if (state.order.what == PlanOf::kNothing) {
      if (!fixed) put_solution(team, state, p, batch, plan);
      if (p.grad_a != nullptr) system.put_weights(p.grad_a + batch * p.n, p.grad_b + batch * p.m);
      return true;
    }
    const PlanOrder& order = state.order;
    if (order.what != PlanOf::kProduct || order.x != nullptr) return ask(team, order, 0, order.x);
    team.for_rows([&](int i) { order.w[i] = order.base[i]; });
    return ask(team, order, 1, order.w);
  }

 private:
  // The problem, with v and v_bar from outside.
  template <class Team>
  OTLOSS_DEVICE void load(Team& team, State& state, const ImplicitGroup<T>& p,
                          int64_t batch) const {
    team.one([&] {
      state = State{};
      state.x.rate = 1 / p.penalties.rho_x, state.y.rate = 1 / p.penalties.rho_y;
      state.place(vectors + team.index() * State::kVectors * orders.length, orders.length);
      state.eps = eps, state.tol = tol;
      state.scale = static_cast<double>(p.coefficient * p.grad[batch]);
      state.balanced = p.penalties.balanced, state.symmetric = p.symmetric;
      state.transport = objective == Objective::kTransport;
    });
    // Of padding anything may be there.
    const auto take = [&](const SystemSide& side, const T* weight, const T* v, const T* outside,
                          int64_t at, int i) {
      const bool counts = weight[at + i] > T(0);
      side.weight[i] = static_cast<double>(weight[at + i]);
      side.v[i] = counts ? static_cast<double>(v[at + i]) : 0.0;
      side.v_bar[i] = counts && outside != nullptr ? static_cast<double>(outside[at + i]) : 0.0;
      return side.weight[i];
    };
    const int64_t row = batch * p.n, column = batch * p.m;
    const TwoSums mass =
        team.sums([&](int i) { return take(state.x, p.a, p.f, p.grad_f, row, i); },
                  [&](int j) { return take(state.y, p.b, p.g, p.grad_g, column, j); });
    constexpr double kRoundoff = static_cast<double>(std::numeric_limits<T>::epsilon());
    team.one([&] {
      state.x.mass = snapped_total(mass.first, kRoundoff);
      state.y.mass = snapped_total(mass.second, kRoundoff);
    });
  }

  // The exponents of the plan.
  template <class Block, class Team>
  OTLOSS_DEVICE void place(Block& block, Team& team, const State& state, const ImplicitGroup<T>& p,
                           int64_t batch, const PlanOfPoints<T>& plan, T* F, T* G) const {
    const double k = kLog2E / eps;
    team.one([&] {
      const auto tiles = plan.points.tiles(batch, p.n, p.m, p.symmetric, static_cast<T>(k));
      orders.place(team.index(), tiles, F, G);
    });
    team.for_rows([&](int i) {
      F[i] = static_cast<T>(k * state.x.v[i]) + log2_weight(static_cast<T>(state.x.weight[i]));
    });
    team.for_columns([&](int j) {
      G[j] = static_cast<T>(k) * static_cast<T>(state.y.v[j]) +
             log2_weight(static_cast<T>(state.y.weight[j]));
    });
    orders.of[team.index()].pad(block);
  }

  // Sums over the columns of P, or of P C, times x, for the rows; the other way round for side 1.
  template <class Team>
  OTLOSS_DEVICE bool ask(Team& team, const PlanOrder& order, int side, const double* x) const {
    const RowSum what = order.what == PlanOf::kCostSums ? RowSum::kCost : RowSum::kPlan;
    team.one([&] { orders.of[team.index()].ask(side, what, x); });
    return false;
  }

  // After a sweep. Whether the order is done; else the other side's sums are asked for.
  template <class Team>
  OTLOSS_DEVICE bool complete(Team& team, const State& state, const T* F, const T* G) const {
    const PlanOrder& order = state.order;
    const bool product = order.what == PlanOf::kProduct;
    const auto sum = [&](int i, const T* exponents) {
      // NaN of a potential that is NaN, which its exponential alone would not make.
      return orders.sum(team.index(), i) +
             (product ? 0.0 : static_cast<double>(T(0) * exponents[i]));
    };
    if (orders.of[team.index()].side == 1) {
      team.for_columns([&](int j) { order.y[j] = sum(j, G); });
      return true;
    }
    team.for_rows([&](int i) {
      const double base = order.base != nullptr ? order.base[i] : 0.0;
      order.w[i] = product ? base + order.factor[i] * sum(i, F) : sum(i, F);
    });
    return order.y == nullptr || ask(team, order, 1, product ? order.w : nullptr);
  }

  template <class Team>
  OTLOSS_DEVICE void put_solution(Team& team, const State& state, const ImplicitGroup<T>& p,
                                  int64_t batch, const PlanOfPoints<T>& plan) const {
    T *const alpha = plan.alpha + batch * p.n, *const beta = plan.beta + batch * p.m;
    team.for_rows([&](int i) { alpha[i] = static_cast<T>(state.x.solution[i]); });
    team.for_columns([&](int j) { beta[j] = static_cast<T>(state.y.solution[j]); });
    if (!team.first_thread()) return;
    double* const status = p.status + batch * kImplicitStatusFields;
    status[kImplicitIterations] = static_cast<double>(state.iterations);
    status[kImplicitResidual] = state.residual();
  }
};

template <typename T>
void backward(const Context& context, const std::vector<ImplicitGroup<T>>& groups, double eps,
              Objective objective, bool fixed) {
  Packer<T> packer(context);
  std::vector<SideItem<T, SolvedPlan<T>>> sides;
  for_each_pack(groups, [&](const Pack<ImplicitGroup<T>>& pack) {
    const Shape shape = shape_of<T>(pack);
    if (shape.problems == 0) return;
    const SolvePlan plan =
        products_plan(context, shape, pack.items[0].made.points.d, pack.items[0].C != nullptr);
    ImplicitWork<T> work{};
    work.pack = pack;
    work.eps = eps, work.tol = kTolerance<T>, work.objective = objective, work.fixed = fixed;
    work.orders = Sweeps<T, double>::of_plan(context, shape, plan);
    work.vectors =
        context.scratch<double>(shape.problems * ImplicitState::kVectors * plan.vector_length);
    for (int i = 0; i < pack.count; ++i) {
      const ImplicitGroup<T>& p = pack.items[i];
      PlanOfPoints<T>& of = work.plans[i];
      of = {packer(p.batch, p.n, p.m, p.made.points, p.C),
            context.scratch<T>(p.batch * packed_stride(p.n)),
            context.scratch<T>(p.batch * packed_stride(p.m)), nullptr, nullptr};
      if (!fixed)
        of.alpha = context.scratch<T>(p.batch * p.n), of.beta = context.scratch<T>(p.batch * p.m);
      const T of_C = fixed ? T(0) : of_cost<T>(objective, eps);
      const SolvedPlan<T> of_x{of.alpha, of.beta, p.grad, p.coefficient, of_C, p.n, p.m};
      const SolvedPlan<T> of_y{of.beta, of.alpha, p.grad, p.coefficient, of_C, p.m, p.n};
      add_sides<T>(p, of.points, of.F, of.G, of_x, of_y, &sides);
    }
    // Beside the iterations: sums, sums of costs, the right-hand side, and the last product.
    const int64_t most = fixed ? 0 : 2 * (kMaxCgIterations + 4);
    run_controls(context, work, shape.problems, most, [&](Queue& queue) {
      queue_sweep<true>(queue, work.orders, work.plans[0].points);
    });
  });
  sum_sides(context, sides, static_cast<T>(kLog2E / eps));
}

}  // namespace

template <typename T>
void implicit_backward(const Context& context, const std::vector<ImplicitGroup<T>>& groups,
                       double eps, Objective objective) {
  backward(context, groups, eps, objective, false);
}

template <typename T>
void envelope_backward(const Context& context, const std::vector<EnvelopeGroup<T>>& groups,
                       double eps, Objective objective) {
  std::vector<ImplicitGroup<T>> fixed(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) static_cast<EnvelopeGroup<T>&>(fixed[i]) = groups[i];
  backward(context, fixed, eps, objective, true);
}

template <typename T>
void point_gradient_sums(const Context& context, const std::vector<PointGradientGroup<T>>& groups,
                         double eps) {
  std::vector<ImplicitGroup<T>> fixed(groups.size());
  for (size_t i = 0; i < groups.size(); ++i) {
    static_cast<SolvedGroup<T>&>(fixed[i]) = groups[i];
    fixed[i].made = {groups[i].points, groups[i].symmetric, {groups[i].sum, groups[i].product}, {}};
  }
  backward(context, fixed, eps, Objective::kRegularized, true);
}

#define OTLOSS_INSTANTIATE(T)                                                                   \
  template void implicit_backward(const Context&, const std::vector<ImplicitGroup<T>>&, double, \
                                  Objective);                                                   \
  template void envelope_backward(const Context&, const std::vector<EnvelopeGroup<T>>&, double, \
                                  Objective);                                                   \
  template void point_gradient_sums(const Context&, const std::vector<PointGradientGroup<T>>&,  \
                                    double);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss::cuda
