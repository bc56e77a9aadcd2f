// Gradients of OT values at fixed potentials, all groups of a call in one launch each.
//
//     grad_C_ij = grad a_i b_j exp((f_i + g_j - C_ij) / eps)      PlanKernel
//     grad_a_i  = grad (f_i + shift), grad_b likewise             PotentialKernel
//                 or, unbalanced, grad dOT/da_i of csrc/core/penalty.h
//
// PlanKernel reads C once and writes grad_C once, so it is bound by memory: a warp takes a row, its
// lanes neighbouring columns, and the four potentials and weights come from L2. One block holds
// kRows rows of one problem. PotentialKernel is one block per problem: three weighted sums, then
// n + m values.
#include <algorithm>
#include <limits>

#include "core/math.h"
#include "core/penalty.h"
#include "core/rounding.h"
#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"

namespace otloss::cuda {
namespace {

template <typename T>
struct PlanKernel {
  static constexpr int kThreads = 256;
  static constexpr int kRows = 4 * kThreads / kWarp;  // rows of a block

  Pack<EnvelopeGroup<T>> groups;
  T k;  // log2(e) / eps

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const EnvelopeGroup<T>& p = groups.items[block.z()];
    if (p.grad_C == nullptr) return;
    const int lane = block.thread() % kWarp, warp = block.thread() / kWarp;
    for (int64_t batch = block.y(); batch < p.batch; batch += kGridY) {
      const T* b = p.b + batch * p.m;
      const T* g = p.g + batch * p.m;
      const T scale = p.coefficient * p.grad[batch];
      for (int r = warp; r < kRows; r += kThreads / kWarp) {
        const int64_t i = block.x() * kRows + r;
        if (i >= p.n) break;
        const T weight = p.a[batch * p.n + i];
        const T F = k * p.f[batch * p.n + i];
        const T row_scale = scale * weight + (F - F);  // NaN where a solve failed
        const int64_t row = (batch * p.n + i) * p.m;
        for (int64_t j = lane; j < p.m; j += kWarp) {
          // A clamped exponential stands for 0, so that padding gets exactly 0.
          const T t = F + (k * g[j] - k * p.C[row + j]);
          const bool counted = weight > T(0) && b[j] > T(0) && !(t <= static_cast<T>(-kExp2Limit));
          p.grad_C[row + j] = counted ? row_scale * b[j] * fast_exp2(t) : T(0);
        }
      }
    }
  }
};

template <typename T>
struct PotentialKernel {
  static constexpr int kThreads = 256;

  Pack<EnvelopeGroup<T>> groups;
  double eps;
  T on;  // 1, or 0 for the transport objective, whose plan is held constant

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const EnvelopeGroup<T>& p = groups.items[block.z()];
    double* scratch = block.template shared<double>();
    for (int64_t batch = block.x(); batch < p.batch; batch += kGridX) {
      const T *a = p.a + batch * p.n, *f = p.f + batch * p.n;
      const T *b = p.b + batch * p.m, *g = p.g + batch * p.m;
      double sums[4] = {};  // <a, f>, <b, g>, <a, 1>, <b, 1>
      for (int64_t i = block.thread(); i < p.n; i += kThreads) {
        sums[0] += static_cast<double>(a[i]) * static_cast<double>(f[i]);
        sums[2] += static_cast<double>(a[i]);
      }
      for (int64_t j = block.thread(); j < p.m; j += kThreads) {
        sums[1] += static_cast<double>(b[j]) * static_cast<double>(g[j]);
        sums[3] += static_cast<double>(b[j]);
      }
      block_sum<kThreads>(block, sums, scratch);
      // dOT/da = f up to a constant; the one with <a, f> = <b, g>. Where a side is soft there is
      // none to choose.
      const double shift = (sums[1] - sums[0]) / (2 * sums[2]);
      const T scale = on * p.coefficient * p.grad[batch];
      const bool balanced = p.penalties.balanced;
      const auto fill = [&](int64_t count, const T* weight, const T* v, double rho,
                            double other_mass, double constant, T* grad) {
        if (grad == nullptr) return;
        const Penalty side{1 / rho};
        for (int64_t i = block.thread(); i < count; i += kThreads) {
          const double potential = static_cast<double>(v[i]);
          const double value =
              balanced ? potential + constant : side.weight_gradient(eps, other_mass, potential);
          grad[batch * count + i] = weight[i] > T(0) ? scale * static_cast<T>(value) : T(0);
        }
      };
      constexpr double kRoundoff = static_cast<double>(std::numeric_limits<T>::epsilon());
      const double mass_a = snapped_total(sums[2], kRoundoff);
      const double mass_b = snapped_total(sums[3], kRoundoff);
      fill(p.n, a, f, p.penalties.rho_x, mass_b, shift, p.grad_a);
      fill(p.m, b, g, p.penalties.rho_y, mass_a, -shift, p.grad_b);
    }
  }
};

}  // namespace

template <typename T>
void envelope_backward(const Context& context, const std::vector<EnvelopeGroup<T>>& groups,
                       double eps, Objective objective) {
  for_each_pack(groups, [&](const Pack<EnvelopeGroup<T>>& pack) {
    int64_t rows = 0, batch = 0;
    bool any_cost = false, any_weight = false;
    for (int i = 0; i < pack.count; ++i) {
      rows = std::max(rows, pack.items[i].n);
      batch = std::max(batch, pack.items[i].batch);
      any_cost |= pack.items[i].grad_C != nullptr;
      any_weight |= pack.items[i].grad_a != nullptr || pack.items[i].grad_b != nullptr;
    }
    if (any_cost) {
      Grid grid;
      grid.x = ceil_div(rows, PlanKernel<T>::kRows);
      grid.y = std::min(batch, kGridY);
      grid.z = pack.count;
      launch(context, PlanKernel<T>{pack, static_cast<T>(kLog2E / eps)}, grid);
    }
    if (any_weight) {
      Grid grid;
      grid.x = std::min(batch, kGridX);
      grid.z = pack.count;
      grid.shared = block_sum_bytes<PotentialKernel<T>::kThreads>(4);
      const T on = objective == Objective::kRegularized ? T(1) : T(0);
      launch(context, PotentialKernel<T>{pack, eps, on}, grid);
    }
  });
}

template void envelope_backward(const Context&, const std::vector<EnvelopeGroup<float>>&, double,
                                Objective);
template void envelope_backward(const Context&, const std::vector<EnvelopeGroup<double>>&, double,
                                Objective);

}  // namespace otloss::cuda
