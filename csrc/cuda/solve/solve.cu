// Launches the dense solve. The cost model and the layout of shared memory: plan.cpp.
#include "cuda/solve/solve.cuh"

#include <algorithm>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cuda/solve/describe.h"
#include "cuda/solve/plan.h"
#include "cuda/solve/streamed.h"

namespace otloss::cuda {
namespace {

// Calls function(kernel) with the instance that a plan asks for. float64 has one, whose two-sweep
// pass serves any number of columns.
template <typename T, typename F>
void dispatch_kernel(const SolvePlan& plan, F&& function) {
  if constexpr (sizeof(T) == 4)
    if (plan.columns_per_thread == kManyColumns) return function(SolveKernel<T, kManyColumns>{});
  function(SolveKernel<T, kFewColumns>{});
}

// loss_k = sum_p coefficient_p value_pk; a thread per k.
template <typename T>
struct CombineKernel {
  static constexpr int kThreads = 128;

  int64_t batch;
  int count;  // of coefficients
  bool add;   // to what is in loss
  T coefficients[kMaxGroups];
  const T* values;  // (count, B)
  T* loss;          // (B,)

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t k = block.x() * kThreads + block.thread();
    if (k >= batch) return;
    T sum = add ? loss[k] : T(0);
    for (int p = 0; p < count; ++p) sum += coefficients[p] * values[p * batch + k];
    loss[k] = sum;
  }
};

template <typename T>
SolvePlan stored_plan(const Context& context, const Shape& shape) {
  const auto fits = [&](const SolvePlan& plan) {
    bool result = false;
    dispatch_kernel<T>(plan, [&](auto kernel) {
      result = cluster_fits<decltype(kernel)>(context, plan.team_size,
                                              static_cast<size_t>(plan.shared.bytes));
    });
    return result;
  };
  return choose_plan(shape, limits(context.device), forced_regime(), fits);
}

}  // namespace

template <typename T>
void solve(const Context& context, const std::vector<SolveGroup<T>>& groups,
           const SolveOptions& options) {
  if (!groups.empty() && groups.front().C == nullptr)
    return solve_streamed(context, groups, options);
  for_each_pack(groups, [&](const Pack<SolveGroup<T>>& pack) {
    const Shape shape = shape_of<T>(pack);
    if (shape.problems == 0) return;
    const SolvePlan plan = stored_plan<T>(context, shape);
    const SolveArguments<T> arguments = solve_arguments(context, pack, options, shape, plan);
    const Grid grid = solve_grid(plan);
    dispatch_kernel<T>(plan, [&](auto kernel) {
      kernel.arguments = arguments;
      launch(context, kernel, grid);
    });
  });
}

template <typename T>
std::string describe_plan(const Context& context, int64_t problems, int64_t n, int64_t m,
                          int64_t d) {
  SolveGroup<T> group{};
  group.batch = problems, group.n = n, group.m = m, group.points.d = d;
  const Shape shape = shape_of<T>(Pack<SolveGroup<T>>{1, {group}});
  const SolvePlan plan =
      d > 0 ? choose_streamed_plan(shape, d, limits(context.device), forced_regime(),
                                   tiles_of(context, group.points))
            : stored_plan<T>(context, shape);
  return plan.describe();
}

template <typename T>
void combine_values(const Context& context, const std::vector<double>& coefficients,
                    const T* values, int64_t batch, T* loss) {
  for (size_t first = 0; first < coefficients.size(); first += kMaxGroups) {
    CombineKernel<T> kernel{batch, 0, first > 0, {}, values + first * batch, loss};
    for (size_t p = first; p < coefficients.size() && kernel.count < kMaxGroups; ++p)
      kernel.coefficients[kernel.count++] = static_cast<T>(coefficients[p]);
    Grid grid;
    grid.x = ceil_div(batch, CombineKernel<T>::kThreads);
    launch(context, kernel, grid);
  }
}

template void combine_values(const Context&, const std::vector<double>&, const float*, int64_t,
                             float*);
template void combine_values(const Context&, const std::vector<double>&, const double*, int64_t,
                             double*);
template std::string describe_plan<float>(const Context&, int64_t, int64_t, int64_t, int64_t);
template std::string describe_plan<double>(const Context&, int64_t, int64_t, int64_t, int64_t);
template void solve(const Context&, const std::vector<SolveGroup<float>>&, const SolveOptions&);
template void solve(const Context&, const std::vector<SolveGroup<double>>&, const SolveOptions&);

}  // namespace otloss::cuda
