// Operations on densities on a grid, in float64; the solve on a CPU only.
#include <torch/csrc/stable/ops.h>

#include "bindings/operations.h"
#include "bindings/problem.h"
#include "grid_kernels.h"

namespace otloss {
namespace {

constexpr ScalarType kDouble = ScalarType::Double;

GridAxes axes_of(const Tensors& costs, const Doubles& spacing) {
  GridAxes axes;
  STD_TORCH_CHECK(!costs.empty(), "otloss: a grid has at least one axis");
  for (const Tensor& C : costs) {
    check_dims(C, 2, "axes");
    check(C, {C.size(0), C.size(0)}, kDouble, "axes");
    axes.shape.push_back(C.size(0));
    axes.cost.push_back(data<double>(C));
  }
  if (!spacing.empty()) check_count(spacing.size(), costs.size(), "spacing");
  axes.spacing = spacing;
  return axes;
}

}  // namespace

void grid_means(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensors costs = in.next<Tensors>();
  const Tensor eps = in.next<Tensor>();
  const Tensor v = in.next<Tensor>(), u = in.next<Tensor>();
  GridMeans means{};
  means.axes = axes_of(costs, {});
  means.eps = positive(eps, "eps");
  check_dims(v, 2, "v");
  check_dims(u, 3, "u");
  const int64_t B = v.size(0), N = means.axes.size();
  check(v, {B, N}, kDouble, "v");
  if (u.size(1) > 0) check(u, {B, u.size(1), N}, kDouble, "u");
  const Tensor sums = torch::stable::clone(v), of_u = torch::stable::clone(u);
  means.batch = B;
  means.channels = u.size(1);
  means.v = data<double>(sums);
  means.u = means.channels > 0 ? data<double>(of_u) : nullptr;
  const Tensors all{v, u};
  const Device device(v, {&costs, &all});
  OTLOSS_LAUNCH(device, grid_means, means);
  give_back(stack, sums, of_u);
}

void grid_solve(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensors costs = in.next<Tensors>();
  const Doubles spacing = in.next<Doubles>();
  const Tensors weights = in.next<Tensors>();
  const Ints pairs = in.next<Ints>();
  const Tensor eps = in.next<Tensor>();
  const auto rho = in.next<std::optional<Tensor>>();
  const Tensors init = in.next<Tensors>();
  const Tensor tol = in.next<Tensor>();
  SolveOptions options{};
  options.max_iters = in.next<int64_t>();
  options.n_iters = -1;
  options.eps = positive(eps, "eps");
  options.tol = positive(tol, "tol");
  options.objective = Objective::kRegularized;
  options.warm_start = !init.empty();
  STD_TORCH_CHECK(options.max_iters > 0, "otloss: max_iters must be > 0");
  const GridAxes axes = axes_of(costs, spacing);
  STD_TORCH_CHECK(!weights.empty() && !pairs.empty() && pairs.size() % 2 == 0,
                  "otloss: there must be weights and pairs");
  check_indices(pairs, weights.size(), "pairs");
  const int64_t P = static_cast<int64_t>(pairs.size()) / 2, B = weights[0].size(0);
  for (const Tensor& w : weights) check(w, {B, axes.size()}, kDouble, "weights");
  if (!init.empty()) check_count(init.size(), 2 * P, "init");
  for (const Tensor& t : init) check(t, {B, axes.size()}, kDouble, "init");
  const Penalties given = penalties_of(rho);
  const Tensor status = empty(weights[0], {P, B, kStatusFields});
  Tensors f, g;
  std::vector<GridGroup> groups;
  for (int64_t p = 0; p < P; ++p) {
    const int64_t i = pairs[2 * p], j = pairs[2 * p + 1];
    for (Tensors* each : {&f, &g})
      each->push_back(init.empty() ? empty(weights[0], {B, axes.size()})
                                   : torch::stable::clone(init[2 * p + (each == &g ? 1 : 0)]));
    GridGroup group{};
    group.batch = B;
    group.axes = axes;
    group.symmetric = i == j;
    group.a = data<double>(weights[i]);
    group.b = data<double>(weights[j]);
    group.f = data<double>(f[p]);
    group.g = data<double>(g[p]);
    group.status = data<double>(status) + p * B * kStatusFields;
    group.penalties = {i == 0 ? given.rho_x : given.rho_y, j == 0 ? given.rho_x : given.rho_y,
                       given.balanced};
    groups.push_back(group);
  }
  OTLOSS_LAUNCH_ON_CPU(solve_grid, groups, options);
  give_back(stack, status, f, g);
}

}  // namespace otloss
