// Operation solve.
#include <torch/csrc/stable/ops.h>

#include "bindings/operations.h"
#include "bindings/points.h"

namespace otloss {
namespace {

constexpr int64_t kMostTraced = int64_t{1} << 32;  // beyond any memory

struct Start {
  Tensors f, g;  // per pair: where a warm start is on entry, the potentials on return
};

// A copy of the potentials to start from, f and g of each pair in turn, or memory for those to
// come.
Start start_from(const Tensors& init, const Problem& problem) {
  Start start;
  for (size_t k = 0; k < init.size(); ++k) (k % 2 ? start.g : start.f).push_back(init[k]);
  for (int64_t p = 0; p < problem.count() && init.empty(); ++p) {
    start.f.push_back(empty(problem.a(p), {problem.batch(), problem.a(p).size(1)}));
    start.g.push_back(empty(problem.b(p), {problem.batch(), problem.b(p).size(1)}));
  }
  problem.check_f(start.f, "init");
  problem.check_g(start.g, "init");
  for (Tensors* each : {&start.f, &start.g})
    for (Tensor& v : *each)
      if (!init.empty()) v = torch::stable::clone(v);
  return start;
}

// Memory for those of all pairs in one tensor, f and g of each pair in turn.
Start packed_start(const Problem& problem) {
  int64_t entries = 0;
  for (int64_t p = 0; p < problem.count(); ++p)
    entries += problem.a(p).numel() + problem.b(p).numel();
  return {{empty(problem.clouds.weights[0], {entries})}, {}};
}

template <typename T>
void solve_as(StableIValue* stack, const Device& device, const Problem& problem,
              const Tensors& init, const SolveOptions& options, bool trace, bool dense, bool pack,
              const std::optional<Tensor>& target) {
  const int64_t P = problem.count(), B = problem.batch();
  const Tensor& like = problem.clouds.weights[0];
  const bool from_points = !problem.clouds.points.empty();
  const bool made = dense && problem.costs.empty();
  const bool known = target && !device.is_cuda();  // kernels of a GPU solve it again
  Ints pairs = problem.clouds.pairs;
  if (known) pairs.resize(2 * P - 2);
  pack = pack && made && !trace && init.empty() && !device.is_cuda();
  const PackedCosts<T> packed(problem.clouds, pack ? pairs : Ints());
  pack = pack && packed.fit();
  const Prepared<T> clouds =
      problem.multiscale ? as_given<T>(problem.clouds)
                         : prepare<T>(device, problem.clouds, {}, pack ? packed.entries() : 0);
  if (pack) packed.make(device, clouds, pairs);
  const Tensors costs =
      made && !pack ? cost_matrices<T>(device, clouds, pairs, empty_rows) : problem.costs;
  const Start start = pack ? packed_start(problem) : start_from(init, problem);
  T* potentials = pack ? data<T>(start.f[0]) : nullptr;
  const Tensor loss = problem.clouds.single ? empty(like, {}) : empty(like, {B});
  const Tensor status = empty(like, {P, B, kStatusFields}, aoti_torch_dtype_float64());
  Tensors traces;
  std::vector<SolveGroup<T>> groups;
  for (int64_t p = 0; p < P; ++p) {
    const Tensor &a = problem.a(p), &b = problem.b(p);
    SolveGroup<T> group{};
    group.batch = B;
    group.n = a.size(1);
    group.m = b.size(1);
    group.dummies = problem.dummies;
    group.symmetric = problem.x(p) == problem.y(p);
    if (known && p + 1 == P)
      group.known = data<double>(*target);
    else if (pack)
      group.C = packed.matrix(clouds.memory, p).entries,
      group.stride = packed.matrix(clouds.memory, p).stride;
    else if (!costs.empty())
      group.C = data<T>(costs[p]), group.stride = row_stride(costs[p]),
      group.shared = is_shared(costs[p], B);
    if (from_points)
      group.points = clouds.pair(problem.x(p), problem.y(p), problem.tf32, problem.multiscale);
    group.a = data<T>(a);
    group.b = data<T>(b);
    group.f = pack ? potentials : data<T>(start.f[p]);
    group.g = pack ? potentials + a.numel() : data<T>(start.g[p]);
    if (pack) potentials = group.g + b.numel();
    if (trace) {
      traces.push_back(empty(like, {B, options.n_iters, group.n + group.m}));
      group.trace = data<T>(traces.back());
    }
    group.status = data<double>(status) + p * B * kStatusFields;
    group.coefficient = problem.coefficients[p];
    group.penalties = problem.penalties(p);
    groups.push_back(group);
  }
  OTLOSS_LAUNCH(device, solve, groups, options);
  OTLOSS_LAUNCH(device, combine_terms, P, B, data<double>(status), data<T>(loss));
  Tensors kept;
  const bool small = clouds.memory.defined() && clouds.memory.is_cpu() &&
                     clouds.memory.numel() * static_cast<int64_t>(sizeof(T)) <= kMostKept;
  if (pack || small) kept.push_back(clouds.memory);
  give_back(stack, loss, status, start.f, start.g, traces, made ? costs : Tensors(), kept);
}

}  // namespace

void solve(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  Problem problem(in);
  const Tensors init = in.next<Tensors>();
  const Tensor tol = in.next<Tensor>();
  SolveOptions options{};
  options.max_iters = in.next<int64_t>();
  options.n_iters = in.next<int64_t>();
  const bool trace = in.next<bool>(), dense = in.next<bool>(), pack = in.next<bool>();
  const auto target = in.next<std::optional<Tensor>>();
  problem.check();
  STD_TORCH_CHECK(!problem.costs.empty() || !problem.clouds.points.empty(),
                  "otloss: there must be costs or points");
  for (const Tensor& C : problem.costs)
    STD_TORCH_CHECK(C.is_contiguous(), "otloss: costs must be contiguous");
  STD_TORCH_CHECK(options.max_iters > 0, "otloss: max_iters must be > 0");
  STD_TORCH_CHECK(!problem.multiscale || (options.n_iters < 0 && !dense),
                  "otloss: multiscale has no fixed number of iterations and stores no costs");
  STD_TORCH_CHECK(problem.dummies == 0 || !dense || !problem.costs.empty(),
                  "otloss: costs of points with dummies are not stored");
  STD_TORCH_CHECK(!trace || (options.n_iters > 0 && options.n_iters < kMostTraced),
                  "otloss: a trace is of a number of iterations");
  if (!init.empty()) check_count(init.size(), 2 * problem.count(), "init");
  if (target) {
    const int64_t p = problem.count() - 1;
    STD_TORCH_CHECK(problem.x(p) == problem.y(p) && problem.costs.empty() && target->is_cpu() &&
                        options.n_iters < 0 && problem.objective == Objective::kRegularized,
                    "otloss: target is a cloud against itself, from points, for a regularized "
                    "value, without n_iters");
    check(*target, {problem.batch(), problem.a(p).size(1) + kStatusFields}, ScalarType::Double,
          "target");
  }
  options.eps = problem.eps.all;
  options.each_eps = problem.eps.each;
  options.tol = positive(tol, "tol");
  STD_TORCH_CHECK(!problem.multiscale || options.tol >= kMultiscaleTol,
                  "otloss: multiscale has a tol of at least 1e-5");
  options.objective = problem.objective;
  options.warm_start = !init.empty();
  const Device device(problem.clouds.weights[0],
                      {&problem.costs, &problem.clouds.points, &problem.clouds.weights, &init});
  problem.fit(device);
  dispatch_dtype(problem.clouds.weights[0], [&](auto zero) {
    solve_as<decltype(zero)>(stack, device, problem, init, options, trace, dense, pack, target);
  });
}

}  // namespace otloss
