// The exact derivative of L Sinkhorn iterations, in the notation of csrc/cpu/gradient/unrolled.cpp:
//     e_ij = exp((f_i + g_j / q - C_ij) / eps),  R_ij = z_i e_ij w_j,
//     u_i = sum_j e_ij g_bar_j,   f_bar_i -= a_i u_i,   a_bar_i -= eps u_i,
//     v_j = sum_i R_ij f_bar_i,   g_bar'_j = -q v_j,    b_bar_j -= eps v_j / b_j,
//     C_bar_ij = sum over iterations of a_i e_ij g_bar_j + R_ij f_bar_i.
//
// R_ij has an exponential of its own, of E_i + H_j - k C_ij: factors z and w can be beyond any
// number where e is 0. The recursion keeps its vectors, L (n + 2 m) values, and two launches do
// all, whatever L:
//
//     AdjointKernel     the recursion: a team of blocks for each problem, which passes over C once
//                       per iteration (pass.cuh) and meets twice, for v and for the next g_bar
//     accumulate.cu     C_bar, a plain sum over the iterations
//
// The recursion's vectors are cut by rows and columns: all are in global memory, and a block only
// sees others' v (in parts) and g_bar.
//
// Without cost matrices (made_sums.cuh) the recursion makes e, and then R, from the points, once
// for the rows and once for the columns, and waits three times per iteration; point_sums_launch.cuh
// makes the sums of the points.
#include "cuda/gradient/unrolled_costs.cuh"

namespace otloss::cuda {
namespace {

template <typename T, class Block, class Costs>
class Adjoint {
 public:
  using Team = typename Costs::Team;

  OTLOSS_DEVICE Adjoint(Block& block, const typename Costs::Kernel& kernel)
      : kernel_(kernel.arguments),
        eps_(kernel.arguments.eps),
        team_(block, kernel.arguments.team),
        costs_(block, kernel, team_) {}

  OTLOSS_DEVICE void run() {
    team_.for_problems(kernel_.groups, [&](const AdjointGroup<T>& p, int64_t batch) {
      place(p, batch);
      seed(p, batch);
      for (int64_t l = p.L - 1; l >= 0; --l) step(p, batch, l);
      if (p.grad_a == nullptr) return;
      T *grad_a = p.grad_a + batch * p.n + team_.first_row(), *grad_b = p.grad_b + batch * p.m;
      team_.for_rows([&](int i) { grad_a[i] = a_[i] > T(0) ? static_cast<T>(a_bar_[i]) : T(0); });
      team_.for_columns(
          [&](int j) { grad_b[j] = b_[j] > T(0) ? static_cast<T>(b_bar_[j]) : T(0); });
    });
  }

 private:
  OTLOSS_DEVICE void place(const AdjointGroup<T>& p, int64_t batch) {
    const int64_t row = team_.first_row(), rows = kernel_.team.rows;
    x_ = row_penalty(p), y_ = column_penalty(p);
    damp_f_ = x_.damping(eps_), damp_g_ = y_.damping(eps_);
    k_ = static_cast<T>(kLog2E / eps_);
    a_ = p.a + batch * p.n + row;
    b_ = p.b + batch * p.m;
    f_bar_ = kernel_.f_bar + team_.index() * rows + row;
    a_bar_ = kernel_.a_bar + team_.index() * rows + row;
    b_bar_ = kernel_.b_bar + team_.index() * kernel_.team.columns;
    double sums[2] = {0, 0};
    team_.for_rows([&](int i) { sums[0] += static_cast<double>(a_[i]); });
    team_.for_columns([&](int j) { sums[1] += static_cast<double>(b_[j]); });
    team_.sum(sums);
    masses_ = Masses(sums[0], sums[1], p.penalties.balanced);
    if (team_.first_thread()) p.masses[2 * batch] = sums[0], p.masses[2 * batch + 1] = sums[1];
    costs_.place(p, batch);
  }

  OTLOSS_DEVICE T log2_used(int j) const { return log2_weight(masses_.scaled(b_[j])); }

  // H of iteration l, for all blocks to see after the next barrier.
  OTLOSS_DEVICE void make_H(const AdjointGroup<T>& p, int64_t batch, int64_t l) {
    const T* const before = g_before(p, batch, l);
    T* const H = p.H + (batch * p.L + l) * p.m;
    team_.for_columns([&](int j) {
      const T G = before ? k_ * before[j] : T(0);
      team_.store(H + j, b_[j] > T(0) ? G + log2_used(j) : static_cast<T>(kLog2Zero));
    });
  }

  // The objective's own derivatives at the last potentials, and what comes from outside.
  OTLOSS_DEVICE void seed(const AdjointGroup<T>& p, int64_t batch) {
    const int64_t last = p.L - 1, row = team_.first_row();
    const T *f = trace_f(p, batch, last) + row, *g = trace_g(p, batch, last);
    const double scale = static_cast<double>(p.coefficient * p.grad[batch]);
    T* const g_bar = p.g_bar + (batch * p.L + last) * p.m;
    make_H(p, batch, last);
    const auto put = [&](int j, double of_g, double of_b) {
      const bool counts = b_[j] > T(0);
      const T outside = p.grad_g ? p.grad_g[batch * p.m + j] : T(0);
      const T whole = static_cast<T>(damp_g_) * (static_cast<T>(of_g) + outside);
      team_.store(g_bar + j, counts ? whole : T(0));
      b_bar_[j] = counts ? of_b : 0.0;
    };
    if (kernel_.objective == Objective::kTransport) {
      T* const G = kernel_.G + team_.index() * kernel_.team.columns;
      team_.for_columns([&](int j) { team_.store(G + j, k_ * g[j] + log2_used(j)); });
      team_.sync();
      costs_.transport(
          PlanCostWork<T, T, Block>{team_.memory(), costs_.tile(), a_, f, G, k_, k_, f_bar_},
          [&](int j, T sum) {
            const double term = scale * static_cast<double>(sum);
            put(j, term / eps_,
                b_[j] > T(0) ? term / static_cast<double>(masses_.scaled(b_[j])) : 0.0);
          });
      team_.for_rows([&](int i) {
        const double term = scale * static_cast<double>(f_bar_[i]);
        f_bar_[i] = static_cast<T>(term / eps_);
        a_bar_[i] = a_[i] > T(0) ? term / static_cast<double>(a_[i]) : 0.0;
      });
    } else {
      const double eps = p.penalties.balanced ? 0.0 : eps_;
      team_.for_rows([&](int i) {
        const double v = static_cast<double>(f[i]);
        f_bar_[i] = static_cast<T>(scale * x_.share(v)) * a_[i];
        a_bar_[i] = scale * (x_.dual(v) + eps * masses_.b);
      });
      team_.for_columns([&](int j) {
        const double v = static_cast<double>(g[j]), share = y_.share(v);
        put(j, scale * share / damp_g_ * static_cast<double>(masses_.scaled(b_[j])),
            scale * (y_.dual(v) + eps * (masses_.a - share)));
      });
    }
    team_.for_rows([&](int i) {
      const T outside = p.grad_f ? p.grad_f[batch * p.n + row + i] : T(0);
      // Potentials that are NaN make the gradient NaN, which exponentials alone would not.
      f_bar_[i] += a_[i] > T(0) ? outside + T(0) * f[i] : T(0);
    });
    team_.sync();
  }

  OTLOSS_DEVICE void step(const AdjointGroup<T>& p, int64_t batch, int64_t l) {
    const int64_t at = batch * p.L + l, row = team_.first_row();
    const IterationWork<Block, T> work{
        team_.memory(),
        costs_.tile(),
        a_,
        trace_f(p, batch, l) + row,
        b_,
        trace_g(p, batch, l),
        p.g_bar + at * p.m,
        p.H + at * p.m,
        l == p.L - 1 ? f_bar_ : nullptr,
        a_bar_,
        p.R ? p.R + at * p.n + row : nullptr,
        k_,
        static_cast<T>(kLog2E / eps_ / damp_f_),
        static_cast<T>(kLog2E / eps_ / damp_g_),
        static_cast<T>(damp_f_),
        eps_,
    };
    T* const next = l > 0 ? p.g_bar + (at - 1) * p.m : nullptr;
    costs_.iteration(work, [&](int j, T v) {
      const T g_bar = b_[j] > T(0) ? -v : T(0);
      if (b_[j] > T(0))
        b_bar_[j] += eps_ * static_cast<double>(g_bar) / static_cast<double>(masses_.scaled(b_[j]));
      if (next) team_.store(next + j, static_cast<T>(damp_g_) * g_bar);
    });
    if (l > 0) make_H(p, batch, l - 1);
    team_.sync();
  }

  const AdjointArguments<T>& kernel_;
  const double eps_;
  Team team_;
  Costs costs_;
  Penalty x_, y_;
  double damp_f_, damp_g_;
  T k_;
  Masses masses_;
  const T* a_;     // (rows,)
  const T* b_;     // (m,)
  T* f_bar_;       // (rows,)
  double* a_bar_;  // (rows,) summed over all iterations
  double* b_bar_;  // (m,)
};

}  // namespace

template <typename T>
template <class Block>
OTLOSS_DEVICE void AdjointKernel<T>::operator()(Block& block) const {
  Adjoint<T, Block, StoredIterations<T, Block>>(block, *this).run();
}

template <typename T>
template <class Block>
OTLOSS_DEVICE void MadeAdjointKernel<T>::operator()(Block& block) const {
  Adjoint<T, Block, MadeIterations<T, Block>>(block, *this).run();
}

namespace {

// Every workspace that the launches share.
template <typename T>
Pack<AdjointGroup<T>> with_workspace(const Context& context, const Pack<UnrolledGroup<T>>& pack) {
  Pack<AdjointGroup<T>> groups{};
  groups.count = pack.count;
  for (int g = 0; g < pack.count; ++g) {
    const UnrolledGroup<T>& p = pack.items[g];
    const int64_t iterations = p.batch * p.L;
    groups.items[g] = {p, p.grad_C || !p.C ? context.scratch<T>(iterations * p.n) : nullptr,
                       context.scratch<T>(iterations * p.m), context.scratch<T>(iterations * p.m),
                       context.scratch<double>(p.batch * 2)};
  }
  return groups;
}

// All but the team.
template <typename T>
void fill_arguments(const Context& context, const Pack<AdjointGroup<T>>& pack, double eps,
                    Objective objective, AdjointArguments<T>* arguments) {
  const TeamArguments<T>& team = arguments->team;
  arguments->groups = pack;
  arguments->eps = eps;
  arguments->objective = objective;
  arguments->f_bar = context.scratch<T>(team.teams * team.rows);
  arguments->G = context.scratch<T>(team.teams * team.columns);
  arguments->a_bar = context.scratch<double>(team.teams * team.rows);
  arguments->b_bar = context.scratch<double>(team.teams * team.columns);
}

template <typename T>
void stored_backward(const Context& context, const Pack<AdjointGroup<T>>& pack, double eps,
                     Objective objective) {
  AdjointKernel<T> adjoint{};
  const Grid team = plan_team<AdjointKernel<T>, T>(context, pack, &adjoint.arguments.team);
  fill_arguments(context, pack, eps, objective, &adjoint.arguments);
  launch(context, adjoint, team);
  accumulate_costs(context, pack, eps, objective);
}

template <typename T>
void made_backward(const Context& context, const Pack<UnrolledGroup<T>>& given,
                   const Pack<AdjointGroup<T>>& pack, double eps, Objective objective,
                   Packer<T>& packer) {
  MadeAdjointKernel<T> adjoint{};
  TeamArguments<T>& team = adjoint.arguments.team;
  const Grid grid = plan_made_team<T>(context, pack, &team, &adjoint.layout);
  fill_arguments(context, pack, eps, objective, &adjoint.arguments);
  adjoint.rows = context.scratch<T>(team.teams * 3 * team.rows);
  adjoint.columns = context.scratch<T>(team.teams * 3 * team.columns);
  for (int g = 0; g < pack.count; ++g) {
    const AdjointGroup<T>& p = pack.items[g];
    adjoint.made[g] = {packer(p.batch, p.n, p.m, p.made.points),
                       context.scratch<T>(p.batch * packed_stride(p.n)),
                       context.scratch<T>(p.batch * packed_stride(p.m)),
                       p.R,
                       p.g_bar,
                       p.H};
    if (objective == Objective::kTransport) continue;
    // There is no last plan, but its exponents are loaded with the points.
    const auto bytes = [&](int64_t count) {
      return p.batch * packed_stride(count) * static_cast<int64_t>(sizeof(T));
    };
    clear(context, adjoint.made[g].F, bytes(p.n));
    clear(context, adjoint.made[g].G, bytes(p.m));
  }
  launch(context, adjoint, grid);
  unrolled_point_sums(context, given, adjoint.made, eps, objective);
}

}  // namespace

template <typename T>
void unrolled_backward(const Context& context, const std::vector<UnrolledGroup<T>>& groups,
                       double eps, Objective objective) {
  Packer<T> packer(context);
  for_each_pack(groups, [&](const Pack<UnrolledGroup<T>>& given) {
    const Pack<AdjointGroup<T>> pack = with_workspace(context, given);
    if (given.items[0].C != nullptr)
      stored_backward(context, pack, eps, objective);
    else
      made_backward(context, given, pack, eps, objective, packer);
  });
}

template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<float>>&, double,
                                Objective);
template void unrolled_backward(const Context&, const std::vector<UnrolledGroup<double>>&, double,
                                Objective);

}  // namespace otloss::cuda
