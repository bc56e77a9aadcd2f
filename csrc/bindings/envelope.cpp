// Operation envelope_backward: the gradient at fixed potentials.
#include "bindings/gradients.h"

namespace otloss {
namespace {

template <typename T>
void envelope_as(StableIValue* stack, const Device& device, const Problem& problem,
                 const Tensor& grad_loss, const Tensors& f, const Tensors& g, const Wanted& wanted,
                 const std::optional<Tensor>& prepared) {
  Gradients<T> gradients(device, problem, grad_loss, wanted, prepared);
  // On a GPU points take the gradient of a stored matrix, too.
  const bool stored = !wanted.points.empty() && !problem.costs.empty();
  const bool matrices = stored && device.is_cuda();
  if (!wanted.costs.empty() || wanted.weights || matrices) {
    std::vector<EnvelopeGroup<T>> groups;
    for (int64_t p = 0; p < problem.count(); ++p)
      groups.push_back(gradients.group(p, matrices, data<T>(f[p]), data<T>(g[p])));
    OTLOSS_LAUNCH(device, envelope_backward, groups, problem.eps, problem.objective);
  }
  if (stored) matrices ? gradients.add_matrices() : gradients.add_plans(f, g);
  if (!wanted.points.empty() && problem.multiscale) {
    std::vector<PlanSumsGroup<T>> groups;
    for (int64_t p = 0; p < problem.count(); ++p)
      groups.push_back(gradients.plan_sides(p, f[p], g[p]));
    OTLOSS_LAUNCH_ON_CPU(plan_sums, groups, problem.eps.all);
    gradients.add_sums();
  } else if (!wanted.points.empty() && problem.costs.empty()) {
    std::vector<PointGradientGroup<T>> groups;
    for (int64_t p = 0; p < problem.count(); ++p) {
      gradients.add_plan_side(groups, p, problem.x(p), problem.y(p), f[p], g[p]);
      gradients.add_plan_side(groups, p, problem.y(p), problem.x(p), g[p], f[p]);
    }
    OTLOSS_LAUNCH(device, point_gradient_sums, groups, problem.eps);
    gradients.add_sums();
  }
  gradients.give_back(stack);
}

}  // namespace

void envelope_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensor grad_loss = in.next<Tensor>();
  Problem problem(in);
  const Tensors f = in.next<Tensors>(), g = in.next<Tensors>();
  const Wanted wanted(in);
  const auto prepared = in.next<std::optional<Tensor>>();
  problem.check();
  wanted.check(problem);
  problem.check_grad(grad_loss);
  problem.check_f(f, "f");
  problem.check_g(g, "g");
  STD_TORCH_CHECK(!prepared || (prepared->is_cpu() && !problem.clouds.points.empty()),
                  "otloss: clouds are prepared from points, on a CPU");
  const Device device(grad_loss,
                      {&problem.costs, &problem.clouds.points, &problem.clouds.weights, &f, &g});
  problem.fit(device);
  dispatch_dtype(grad_loss, [&](auto zero) {
    envelope_as<decltype(zero)>(stack, device, problem, grad_loss, f, g, wanted, prepared);
  });
}

}  // namespace otloss
