// Operation plan_product: the plan of a multiscale solve times what is given.
#include "bindings/operations.h"
#include "bindings/points.h"

namespace otloss {
namespace {

template <typename T>
void plan_product_as(StableIValue* stack, const Problem& problem, const Tensors& f,
                     const Tensors& g, const Tensors& v) {
  const Prepared<T> clouds = as_given<T>(problem.clouds);
  Tensors products;
  std::vector<PlanProductGroup<T>> groups;
  for (int64_t p = 0; p < problem.count(); ++p) {
    const Tensor &a = problem.a(p), &b = problem.b(p);
    const int64_t B = problem.batch(), n = a.size(1), m = b.size(1), columns = v[p].size(2);
    products.push_back(empty(a, {B, n, columns}));
    groups.push_back(
        {{B, n, m, data<T>(a), data<T>(b), data<T>(f[p]), data<T>(g[p]), nullptr, T(1)},
         columns,
         clouds.pair(problem.x(p), problem.y(p), false, true),
         data<T>(v[p]),
         data<T>(products.back()),
         problem.penalties(p)});
  }
  OTLOSS_LAUNCH_ON_CPU(plan_products, groups, problem.eps.all);
  give_back(stack, products);
}

}  // namespace

void plan_product(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  Problem problem(in);
  const Tensors f = in.next<Tensors>(), g = in.next<Tensors>(), v = in.next<Tensors>();
  problem.check();
  STD_TORCH_CHECK(problem.multiscale, "otloss: plan_product is of a multiscale solve");
  problem.check_f(f, "f");
  problem.check_g(g, "g");
  check_count(v.size(), problem.count(), "v");
  for (int64_t p = 0; p < problem.count(); ++p) {
    check_dims(v[p], 3, "v");
    check(v[p], {problem.batch(), problem.b(p).size(1), v[p].size(2)}, problem.dtype(), "v");
  }
  const Device device(problem.clouds.weights[0],
                      {&problem.clouds.points, &problem.clouds.weights, &f, &g, &v});
  STD_TORCH_CHECK(!device.is_cuda(), "otloss: plan_product is on a CPU");
  dispatch_dtype(problem.clouds.weights[0],
                 [&](auto zero) { plan_product_as<decltype(zero)>(stack, problem, f, g, v); });
}

}  // namespace otloss
