// Operations unrolled_backward and implicit_backward.
#include "bindings/gradients.h"

namespace otloss {
namespace {

// What both take: gradients of the loss and, for each pair or not at all, of f and of g.
struct Seeds {
  Tensor loss;
  Tensors f, g;

  explicit Seeds(Arguments& in)
      : loss(in.next<Tensor>()), f(in.next<Tensors>()), g(in.next<Tensors>()) {}

  void check(const Problem& problem) const {
    problem.check_grad(loss);
    if (!f.empty()) problem.check_f(f, "grad_f");
    if (!g.empty()) problem.check_g(g, "grad_g");
    STD_TORCH_CHECK(!problem.costs.empty() || !problem.clouds.points.empty(),
                    "otloss: there must be costs or points");
    for (const Tensor& C : problem.costs)
      STD_TORCH_CHECK(C.is_contiguous(), "otloss: costs must be contiguous");
  }

  template <typename Group>
  void place(Group& group, int64_t p) const {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(group.grad_f)>>;
    group.grad_f = f.empty() ? nullptr : data<T>(f[p]);
    group.grad_g = g.empty() ? nullptr : data<T>(g[p]);
  }
};

template <typename T>
void unrolled_as(StableIValue* stack, const Device& device, const Problem& problem,
                 const Seeds& seeds, const Tensors& init, const Tensors& traces,
                 const Wanted& wanted) {
  const bool stored = !problem.costs.empty();
  Gradients<T> gradients(device, problem, seeds.loss, wanted);
  std::vector<UnrolledGroup<T>> groups;
  for (int64_t p = 0; p < problem.count(); ++p) {
    UnrolledGroup<T> group{};
    static_cast<EnvelopeGroup<T>&>(group) = gradients.group(p, stored);
    seeds.place(group, p);
    group.L = traces[p].size(1);
    group.trace = data<T>(traces[p]);
    if (!init.empty()) group.start = data<T>(init[2 * p + 1]);
    if (!stored) group.made = gradients.made(p);
    groups.push_back(group);
  }
  OTLOSS_LAUNCH(device, unrolled_backward, groups, problem.eps, problem.objective);
  stored ? gradients.add_matrices() : gradients.add_sums();
  gradients.give_back(stack);
}

template <typename T>
void implicit_as(StableIValue* stack, const Device& device, const Problem& problem,
                 const Seeds& seeds, const Tensors& f, const Tensors& g, const Wanted& wanted) {
  const int64_t P = problem.count(), B = problem.batch();
  const bool stored = !problem.costs.empty();
  const Tensor status =
      empty(seeds.loss, {P, B, kImplicitStatusFields}, aoti_torch_dtype_float64());
  Gradients<T> gradients(device, problem, seeds.loss, wanted);
  Tensors scratch;  // plans of pairs whose cost gradient, which could hold them, is not needed
  std::vector<PointPair<T>> given(P);
  std::vector<ImplicitGroup<T>> groups;
  for (int64_t p = 0; p < P; ++p) {
    ImplicitGroup<T> group{};
    static_cast<EnvelopeGroup<T>&>(group) =
        gradients.group(p, stored, data<T>(f[p]), data<T>(g[p]));
    seeds.place(group, p);
    group.symmetric = problem.x(p) == problem.y(p);
    group.status = data<double>(status) + p * B * kImplicitStatusFields;
    group.P = group.grad_C;
    if (stored && group.P == nullptr) {
      scratch.push_back(empty(seeds.loss, {B, group.n, group.m}));
      group.P = data<T>(scratch.back());
    }
    if (!stored) group.made = gradients.made(p);
    if (problem.multiscale) {
      given[p] = as_given<T>(problem.clouds).pair(problem.x(p), problem.y(p), false, true);
      group.given = &given[p];
    }
    groups.push_back(group);
  }
  OTLOSS_LAUNCH(device, implicit_backward, groups, problem.eps, problem.objective);
  stored ? gradients.add_matrices() : gradients.add_sums();
  gradients.give_back(stack, status);
}

}  // namespace

void unrolled_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Seeds seeds(in);
  Problem problem(in);
  const Tensors init = in.next<Tensors>(), traces = in.next<Tensors>();
  const Wanted wanted(in);
  problem.check();
  seeds.check(problem);
  wanted.check(problem);
  if (!init.empty()) check_count(init.size(), 2 * problem.count(), "init");
  check_count(traces.size(), problem.count(), "traces");
  for (int64_t p = 0; p < problem.count(); ++p) {
    const int64_t n = problem.a(p).size(1), m = problem.b(p).size(1);
    check_dims(traces[p], 3, "traces");
    check(traces[p], {problem.batch(), traces[p].size(1), n + m}, problem.dtype(), "traces");
    STD_TORCH_CHECK(traces[p].size(1) > 0, "otloss: a trace must have an iteration or more");
    if (!init.empty()) check(init[2 * p + 1], {problem.batch(), m}, problem.dtype(), "init");
  }
  const Device device(seeds.loss, {&seeds.f, &seeds.g, &problem.costs, &problem.clouds.points,
                                   &problem.clouds.weights, &init, &traces});
  problem.fit(device);
  dispatch_dtype(seeds.loss, [&](auto zero) {
    unrolled_as<decltype(zero)>(stack, device, problem, seeds, init, traces, wanted);
  });
}

void implicit_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Seeds seeds(in);
  Problem problem(in);
  const Tensors f = in.next<Tensors>(), g = in.next<Tensors>();
  const Wanted wanted(in);
  problem.check();
  seeds.check(problem);
  wanted.check(problem);
  problem.check_f(f, "f");
  problem.check_g(g, "g");
  const Device device(seeds.loss, {&seeds.f, &seeds.g, &problem.costs, &problem.clouds.points,
                                   &problem.clouds.weights, &f, &g});
  STD_TORCH_CHECK(!(problem.multiscale && device.is_cuda()),
                  "otloss: multiscale on a GPU has no implicit gradient");
  problem.fit(device);
  dispatch_dtype(seeds.loss, [&](auto zero) {
    implicit_as<decltype(zero)>(stack, device, problem, seeds, f, g, wanted);
  });
}

}  // namespace otloss
