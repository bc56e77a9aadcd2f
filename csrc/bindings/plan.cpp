// Operations on the plan of a multiscale solve: plan_product, times what is given; plan_gap, what a
// duality gap takes of it; extend, its potential at other points.
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
    products.push_back(empty(a, {B, n, columns}, aoti_torch_dtype_float64()));
    groups.push_back(
        {{B, n, m, data<T>(a), data<T>(b), data<T>(f[p]), data<T>(g[p]), nullptr, T(1)},
         columns,
         clouds.pair(problem.x(p), problem.y(p), false, true),
         data<double>(v[p]),
         data<double>(products.back()),
         problem.penalties(p)});
  }
  OTLOSS_LAUNCH_ON_CPU(plan_products, groups, problem.eps.all);
  give_back(stack, products);
}

// Of float64, on a CPU: `lists` have a tensor for each pair, of the shape of f (true) or of g.
void check_listed(Problem& problem, std::initializer_list<std::pair<const Tensors*, bool>> lists) {
  problem.check();
  STD_TORCH_CHECK(problem.multiscale, "otloss: this operation is of a multiscale solve");
  STD_TORCH_CHECK(problem.dtype() == ScalarType::Double, "otloss: this operation is in float64");
  for (const auto& [list, of_rows] : lists)
    of_rows ? problem.check_f(*list, "values of x") : problem.check_g(*list, "values of y");
  for (const auto& entry : lists) {
    const Device device(problem.clouds.weights[0],
                        {&problem.clouds.points, &problem.clouds.weights, entry.first});
    STD_TORCH_CHECK(!device.is_cuda(), "otloss: this operation is on a CPU");
  }
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
    check(v[p], {problem.batch(), problem.b(p).size(1), v[p].size(2)}, ScalarType::Double, "v");
  }
  const Device device(problem.clouds.weights[0],
                      {&problem.clouds.points, &problem.clouds.weights, &f, &g, &v});
  STD_TORCH_CHECK(!device.is_cuda(), "otloss: plan_product is on a CPU");
  dispatch_dtype(problem.clouds.weights[0],
                 [&](auto zero) { plan_product_as<decltype(zero)>(stack, problem, f, g, v); });
}

void plan_gap(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  Problem problem(in);
  const Tensors f = in.next<Tensors>(), g = in.next<Tensors>();
  const Tensors A = in.next<Tensors>(), B = in.next<Tensors>();
  check_listed(problem, {{&f, true}, {&g, false}, {&A, true}, {&B, false}});
  const Prepared<double> clouds = as_given<double>(problem.clouds);
  Tensors rows, columns, numbers;
  std::vector<PlanGapGroup> groups;
  for (int64_t p = 0; p < problem.count(); ++p) {
    const Tensor &a = problem.a(p), &b = problem.b(p);
    const int64_t batch = problem.batch(), n = a.size(1), m = b.size(1);
    rows.push_back(empty(a, {batch, n})), columns.push_back(empty(a, {batch, m}));
    numbers.push_back(empty(a, {batch, 2}));
    groups.push_back({{batch, n, m, data<double>(a), data<double>(b), data<double>(f[p]),
                       data<double>(g[p]), nullptr, 1.0},
                      clouds.pair(problem.x(p), problem.y(p), false, true),
                      data<double>(A[p]),
                      data<double>(B[p]),
                      data<double>(rows.back()),
                      data<double>(columns.back()),
                      data<double>(numbers.back()),
                      problem.penalties(p)});
  }
  OTLOSS_LAUNCH_ON_CPU(plan_gaps, groups, problem.eps.all);
  give_back(stack, rows, columns, numbers);
}

void extend(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  Problem problem(in);
  const Tensors g = in.next<Tensors>();
  check_listed(problem, {{&g, false}});
  const Prepared<double> clouds = as_given<double>(problem.clouds);
  Tensors out;
  std::vector<ExtendGroup> groups;
  for (int64_t p = 0; p < problem.count(); ++p) {
    const Tensor &a = problem.a(p), &b = problem.b(p);
    const int64_t batch = problem.batch(), n = a.size(1), m = b.size(1);
    out.push_back(empty(a, {batch, n}));
    groups.push_back(
        {{batch, n, m, data<double>(a), data<double>(b), nullptr, data<double>(g[p]), nullptr, 1.0},
         clouds.pair(problem.x(p), problem.y(p), false, true),
         data<double>(out.back())});
  }
  OTLOSS_LAUNCH_ON_CPU(extend, groups, problem.eps.all);
  give_back(stack, out);
}

}  // namespace otloss
