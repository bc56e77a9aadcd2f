// The derivative of the solution, in the notation of csrc/cpu/gradient/implicit_system.h: with the
// marginals r, c of the plan P, divided by the dampings,
//     [diag(r)  P     ] (alpha)   (f_bar)
//     [P^T      diag(c)] (beta) = (g_bar),   C_bar_ij += P_ij (alpha_i + beta_j),
// by conjugate gradients on the Schur complement diag(c) - P^T diag(1/r) P, or, for a cloud against
// itself, on diag(r) + P. In turn, until all systems of a call are solved:
//
//     SweepKernel     P x or P^T w of each problem               ../pass/sweeps.cuh
//     ControlKernel   the vectors of the iteration
//
// The entries of P are made again in every product, the same bits for both sides. Then comes C_bar,
// or what the points receive, by the potentials and the solution (alpha, beta).
//
// At fixed potentials (envelope) there is no system, alpha = beta = 0, and one control alone.
#include "cuda/gradient/implicit_system.cuh"
#include "cuda/gradient/side_sums.h"

namespace otloss::cuda {
namespace {

template <typename T>
struct ImplicitWork : ImplicitArguments<T> {
  using State = ImplicitState;

  OTLOSS_DEVICE const Pack<ImplicitGroup<T>>& groups() const { return this->pack; }

  template <class Block>
  OTLOSS_DEVICE bool advance(Block& block, ControlTeam<Block>& team, State& state,
                             const ImplicitGroup<T>& p, int64_t batch, bool first) const {
    Implicit<T, Block> system(block, *this, team, p, batch, state);
    return first ? system.open() : system.advance();
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
    work.eps = eps, work.objective = objective, work.fixed = fixed;
    work.orders = Sweeps<T, double>::of_plan(context, shape, plan);
    work.vectors =
        context.scratch<double>(shape.problems * ImplicitVectors::kCount * plan.vector_length);
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
