// Gradients of OT values at fixed potentials:
//
//     grad_C_ij = grad a_i b_j exp((f_i + g_j - C_ij) / eps), or what points need (side_sums.h)
//     grad_a_i  = grad (f_i + shift), grad_b likewise,
//                 or, unbalanced, grad dOT/da_i of csrc/core/penalty.h
//
//     ExponentKernel   k f + log2 a and k g + log2 b          thread: a point
//     PotentialKernel  gradients of the weights                block: a problem
#include <algorithm>
#include <limits>

#include "core/penalty.h"
#include "core/rounding.h"
#include "cuda/device/team.cuh"
#include "cuda/gradient/side_sums.h"

namespace otloss::cuda {
namespace {

template <typename T, class Group>
struct ExponentKernel {
  static constexpr int kThreads = 256;

  Pack<Group> groups;
  T* F[kMaxGroups];  // (B, packed_stride(n)) out, kLog2Zero past the end
  T* G[kMaxGroups];  // (B, packed_stride(m)) out
  T k;               // log2(e) / eps
  int64_t blocks;    // of a problem

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    with_problem(block, groups, blocks, [&](const Group& p, int64_t batch, int64_t number) {
      const int64_t i = number * kThreads + block.thread(), group = &p - groups.items;
      put(i, p.n, p.f + batch * p.n, p.a + batch * p.n, F[group] + batch * packed_stride(p.n));
      put(i, p.m, p.g + batch * p.m, p.b + batch * p.m, G[group] + batch * packed_stride(p.m));
    });
  }

 private:
  OTLOSS_DEVICE void put(int64_t i, int64_t count, const T* v, const T* weight, T* out) const {
    if (i >= packed_stride(count)) return;
    out[i] = i < count ? k * v[i] + log2_weight(weight[i]) : static_cast<T>(kLog2Zero);
  }
};

// The sides of groups at fixed potentials; set(side, group) says what of them is wanted.
template <typename T, class Group, class Set>
void sum_plans(const Context& context, const std::vector<Group>& groups, double eps, Set&& set) {
  const T k = static_cast<T>(kLog2E / eps);
  std::vector<SideItem<T, SolvedPlan<T>>> sides;
  for_each_pack(groups, [&](const Pack<Group>& pack) {
    ExponentKernel<T, Group> kernel{pack, {}, {}, k, 0};
    for (int i = 0; i < pack.count; ++i) {
      const Group& p = pack.items[i];
      T* const F = kernel.F[i] = context.scratch<T>(p.batch * packed_stride(p.n));
      T* const G = kernel.G[i] = context.scratch<T>(p.batch * packed_stride(p.m));
      const SolvedPlan<T> plan{nullptr, nullptr, p.grad, p.coefficient, T(0), T(1), p.n, p.m};
      sides.push_back({p.batch, p.n, p.m, false, {}, nullptr, F, G, plan, {}, nullptr});
      set(sides.back(), p);
      const int64_t points = packed_stride(std::max(p.n, p.m));
      kernel.blocks = std::max(kernel.blocks, ceil_div(points, kernel.kThreads));
    }
    launch(context, kernel, Grid{problems_of(pack) * kernel.blocks});
  });
  sum_sides(context, sides, k);
}

template <typename T>
struct PotentialKernel {
  static constexpr int kThreads = 256;

  Pack<EnvelopeGroup<T>> groups;
  double eps;
  T on;  // 1, or 0 for the transport objective, whose plan is held constant

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    Team<Block, kThreads> team(block, TeamArguments{1, nullptr});
    team.with_problem(groups, [&](const EnvelopeGroup<T>& p, int64_t batch) {
      if (p.grad_a == nullptr) return;
      const T *a = p.a + batch * p.n, *f = p.f + batch * p.n;
      const T *b = p.b + batch * p.m, *g = p.g + batch * p.m;
      double sums[4] = {};  // <a, f>, <b, g>, <a, 1>, <b, 1>
      team.for_rows([&](int i) {
        sums[0] += static_cast<double>(a[i]) * static_cast<double>(f[i]);
        sums[2] += static_cast<double>(a[i]);
      });
      team.for_columns([&](int j) {
        sums[1] += static_cast<double>(b[j]) * static_cast<double>(g[j]);
        sums[3] += static_cast<double>(b[j]);
      });
      team.sum(sums);
      // dOT/da = f up to a constant; the one with <a, f> = <b, g>. Where a side is soft there is
      // none to choose.
      const double shift = (sums[1] - sums[0]) / (2 * sums[2]);
      const T scale = on * p.coefficient * p.grad[batch];
      constexpr double kRoundoff = static_cast<double>(std::numeric_limits<T>::epsilon());
      const auto of = [&](T weight, T v, double rho, double other_mass, double constant) {
        const double potential = static_cast<double>(v),
                     mass = snapped_total(other_mass, kRoundoff);
        const double value = p.penalties.balanced
                                 ? potential + constant
                                 : Penalty{1 / rho}.weight_gradient(eps, mass, potential);
        return weight > T(0) ? scale * static_cast<T>(value) : T(0);
      };
      team.for_rows([&](int i) {
        p.grad_a[batch * p.n + i] = of(a[i], f[i], p.penalties.rho_x, sums[3], shift);
      });
      team.for_columns([&](int j) {
        p.grad_b[batch * p.m + j] = of(b[j], g[j], p.penalties.rho_y, sums[2], -shift);
      });
    });
  }
};

}  // namespace

template <typename T>
void envelope_backward(const Context& context, const std::vector<EnvelopeGroup<T>>& groups,
                       double eps, Objective objective) {
  std::vector<EnvelopeGroup<T>> of_costs;
  bool any_weight = false;
  for (const EnvelopeGroup<T>& p : groups) {
    if (p.grad_C != nullptr) of_costs.push_back(p);
    any_weight |= p.grad_a != nullptr;
  }
  sum_plans<T>(context, of_costs, eps, [](auto& side, const EnvelopeGroup<T>& p) {
    side.points.C = p.C, side.grad_C = p.grad_C;
  });
  const T on = objective == Objective::kRegularized ? T(1) : T(0);
  for_each_pack(groups, [&](const Pack<EnvelopeGroup<T>>& pack) {
    if (any_weight)
      launch(context, PotentialKernel<T>{pack, eps, on},
             Grid{problems_of(pack), sizeof(TeamScratch)});
  });
}

template <typename T>
void point_gradient_sums(const Context& context, const std::vector<PointGradientGroup<T>>& groups,
                         double eps) {
  Packer<T> packer(context);
  sum_plans<T>(context, groups, eps, [&](auto& side, const PointGradientGroup<T>& p) {
    side.symmetric = p.symmetric;
    side.points = packer(p.batch, p.n, p.m, p.points), side.y = p.points.zy;
    side.out = {p.sum, p.product};
  });
}

#define OTLOSS_INSTANTIATE(T)                                                                   \
  template void envelope_backward(const Context&, const std::vector<EnvelopeGroup<T>>&, double, \
                                  Objective);                                                   \
  template void point_gradient_sums(const Context&, const std::vector<PointGradientGroup<T>>&,  \
                                    double);
OTLOSS_INSTANTIATE(float)
OTLOSS_INSTANTIATE(double)
#undef OTLOSS_INSTANTIATE

}  // namespace otloss::cuda
