// Operations cost and cost_backward.
#include "bindings/operations.h"
#include "bindings/points.h"

namespace otloss {
namespace {

void require_points(const Clouds& clouds) {
  STD_TORCH_CHECK(!clouds.points.empty(), "otloss: there must be points");
  clouds.check();
}

}  // namespace

void cost(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Clouds clouds(in);
  require_points(clouds);
  const Device device(clouds.points[0], {&clouds.points, &clouds.weights});
  dispatch_dtype(clouds.points[0], [&](auto zero) {
    using T = decltype(zero);
    give_back(stack,
              cost_matrices<T>(device, prepare<T>(device, clouds), clouds.pairs, empty_matrices));
  });
}

void cost_backward(StableIValue* stack, uint64_t, uint64_t) {
  Arguments in(stack);
  const Tensors grad_costs = in.next<Tensors>(), costs = in.next<Tensors>();
  const Clouds clouds(in);
  const Ints wanted = in.next<Ints>();
  const Tensors& points = clouds.points;
  require_points(clouds);
  check_indices(wanted, points.size(), "want_points");
  check_count(costs.size(), clouds.count(), "costs");
  check_count(grad_costs.size(), clouds.count(), "grad_costs");
  for (int64_t p = 0; p < clouds.count(); ++p)
    for (const auto& [C, name] : {std::pair(&costs[p], "costs"), {&grad_costs[p], "grad_costs"}})
      check(*C,
            {clouds.shape(0)[0], clouds.shape(clouds.pairs[2 * p])[1],
             clouds.shape(clouds.pairs[2 * p + 1])[1]},
            points[0].scalar_type(), name);
  const Device device(points[0], {&points, &clouds.weights, &costs, &grad_costs});
  dispatch_dtype(points[0], [&](auto zero) {
    using T = decltype(zero);
    const Prepared<T> prepared = prepare<T>(device, clouds);
    PointGradients<T> grads(device, prepared, wanted);
    for (int64_t p = 0; p < clouds.count(); ++p) {
      PlanWeightGroup<T> group{};
      group.W = data<T>(grad_costs[p]);
      grads.add_pair(clouds.pairs[2 * p], clouds.pairs[2 * p + 1], as_matrix<T>(costs[p]), group,
                     {});
    }
    give_back(stack, grads.result());
  });
}

}  // namespace otloss
