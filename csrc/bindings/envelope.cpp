// Operation envelope_backward: the gradient at fixed potentials.
#include "bindings/gradients.h"

namespace otloss {
namespace {

// The potentials of all pairs, one tensor each or all in one, f and g of each pair in turn.
template <typename T>
struct Potentials {
  std::vector<const T*> f, g;

  Potentials(const Problem& problem, const Tensors& of_f, const Tensors& of_g) {
    const T* next = of_g.empty() ? data<T>(of_f[0]) : nullptr;
    for (int64_t p = 0; p < problem.count(); ++p) {
      f.push_back(next ? next : data<T>(of_f[p]));
      g.push_back(next ? next + problem.a(p).numel() : data<T>(of_g[p]));
      if (next) next = g.back() + problem.b(p).numel();
    }
  }
};

int64_t entries_of_potentials(const Problem& problem) {
  int64_t entries = 0;
  for (int64_t p = 0; p < problem.count(); ++p)
    entries += problem.a(p).numel() + problem.b(p).numel();
  return entries;
}

// Where g is empty: a solve has packed its results, see PackedCosts.
template <typename T>
void envelope_as(StableIValue* stack, const Device& device, const Problem& problem,
                 const Tensor& grad_loss, const Tensors& f, const Tensors& g, const Wanted& wanted,
                 const std::optional<Tensor>& prepared) {
  const bool packed = g.empty();
  Gradients<T> gradients(device, problem, grad_loss, wanted, prepared,
                         packed ? prepared->numel() : 0);
  const Potentials<T> potentials(problem, f, g);
  // On a GPU points take the gradient of a stored matrix, too.
  const bool stored = !wanted.points.empty() && (packed || !problem.costs.empty());
  const bool matrices = stored && device.is_cuda();
  if (!wanted.costs.empty() || wanted.weights || matrices) {
    std::vector<EnvelopeGroup<T>> groups;
    for (int64_t p = 0; p < problem.count(); ++p)
      groups.push_back(gradients.group(p, matrices, potentials.f[p], potentials.g[p]));
    OTLOSS_LAUNCH(device, envelope_backward, groups, problem.eps, problem.objective);
  }
  if (matrices) {
    gradients.add_matrices();
  } else if (stored) {
    const PackedCosts<T> costs(problem.clouds, packed ? problem.clouds.pairs : Ints());
    for (int64_t p = 0; p < problem.count(); ++p)
      gradients.add_plan(
          p, packed ? costs.matrix(gradients.memory(), p) : as_matrix<T>(problem.costs[p]),
          potentials.f[p], potentials.g[p]);
  } else if (!wanted.points.empty() && problem.multiscale) {
    std::vector<PlanSumsGroup<T>> groups;
    for (int64_t p = 0; p < problem.count(); ++p)
      groups.push_back(gradients.plan_sides(p, f[p], g[p]));
    OTLOSS_LAUNCH(device, plan_sums, groups, problem.eps.all);
    gradients.add_sums();
  } else if (!wanted.points.empty()) {
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
  STD_TORCH_CHECK(!prepared || (prepared->is_cpu() && !problem.clouds.points.empty()),
                  "otloss: clouds are prepared from points, on a CPU");
  if (g.empty() && f.size() == 1 && prepared) {
    check(f[0], {entries_of_potentials(problem)}, problem.dtype(), "f");
    STD_TORCH_CHECK(problem.costs.empty() && problem.dummies == 0 && !problem.multiscale,
                    "otloss: what is packed is of points");
  } else {
    problem.check_f(f, "f");
    problem.check_g(g, "g");
  }
  const Device device(grad_loss,
                      {&problem.costs, &problem.clouds.points, &problem.clouds.weights, &f, &g});
  problem.fit(device);
  dispatch_dtype(grad_loss, [&](auto zero) {
    envelope_as<decltype(zero)>(stack, device, problem, grad_loss, f, g, wanted, prepared);
  });
}

}  // namespace otloss
