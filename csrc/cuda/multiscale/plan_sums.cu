// The plan of a multiscale solve at fixed potentials, times the points of the other side: what the
// gradient of the points needs.
#include <limits>
#include <type_traits>

#include "core/penalty.h"
#include "cuda/multiscale/multiscale.h"
#include "cuda/multiscale/sums.cuh"

namespace otloss::cuda {
namespace multiscale {
namespace {

// A potential of the caller's points, in order. An unbalanced plan is taken as the balanced one of
// its marginals, w exp(-v / rho) for w, (1 + eps / rho) v for v: what is left out is then little of
// these, however little is transported.
template <typename T>
struct GatherKernel {
  static constexpr int kThreads = 256;

  int64_t n;
  const int32_t* index;
  const T* given;
  double eps;
  Penalty penalty;
  double *v, *w;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    constexpr double kLeast = std::numeric_limits<double>::min();  // points without weight are none
    const int64_t i = block.x() * kThreads + block.thread();
    if (i >= n) return;
    const double value = w[i] > 0 ? static_cast<double>(given[index[i]]) : 0.0;
    v[i] = value / penalty.damping(eps);
    if (w[i] > 0) w[i] = Max::join(w[i] * penalty.share(value), kLeast);
  }
};

struct OrderKernel {
  static constexpr int kThreads = kWarp;

  ListedOrder value;
  ListedOrder* order;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    if (block.thread() == 0) *order = value;
  }
};

// One side's product, of V = scale P and the differences to the row's own point: to these its sum
// of V adds 0. What cancels has done so in double.
template <int kD, typename T>
struct PutKernel {
  static constexpr int kThreads = 256;

  int64_t n, d;
  const int32_t* index;
  const double* displacement;  // (leaves, kD, kLeaf)
  const T* grad;               // (1,) of the loss
  double scale;
  T *sum, *product;  // (n,), (n, d)

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t i = block.x() * kThreads + block.thread();
    if (i >= n) return;
    const int64_t point = index[i];
    sum[point] = T(0);
    for (int c = 0; c < d; ++c)
      product[point * d + c] =
          static_cast<T>(scale * static_cast<double>(*grad) * displacement[offset<kD>(i, c)]);
  }
};

template <int kD, typename T>
class PlanSums {
 public:
  PlanSums(const Context& context, const PlanSumsGroup<T>& group, int64_t p, double eps)
      : context_(context), group_(group), p_(p), eps_(eps) {}

  void run() {
    const MadeCost<T>& made = group_.made;
    double* const masses = context_.scratch<double>(2);
    const auto side = [&](int s, int64_t n, const T* points, const T* weights, const T* v,
                          double rho) {
      ordered_[s] =
          ordered_cloud<kD>(context_, made.points.kind, n, made.points.d,
                            points + p_ * n * made.points.d, weights + p_ * n, nullptr, masses + s);
      prepare(s, v + p_ * n, rho);
    };
    side(0, group_.n, made.points.zx, group_.a, group_.f, group_.penalties.rho_x);
    side(1, group_.m, made.points.zy, group_.b, group_.g, group_.penalties.rho_y);
    problem_.order = context_.scratch<ListedOrder>(1);
    if (made.x.sum) sum(0, made.x);
    if (made.y.sum) sum(1, made.y);
  }

 private:
  void prepare(int s, const T* given, double rho) {
    const Ordered& own = ordered_[s];
    const Cloud& cloud = own.cloud;
    const int64_t leaves = cloud.leaves(), size = leaves * kLeaf;
    double* const v = context_.scratch<double>(cloud.n);
    using Kernel = GatherKernel<T>;
    launch(context_, Kernel{cloud.n, own.index, given, eps_, Penalty{1 / rho}, v, cloud.w},
           Grid{ceil_div(cloud.n, Kernel::kThreads)});
    launch(context_, NodesKernel<kD>{cloud}, Grid{cloud.supers});
    const double k = kLog2E / eps_;
    const Planes planes = make_planes<kD>(context_, cloud);
    potentials_[s] = {v, k};
    launch(context_, FitKernel<kD>{cloud, planes, potentials_[s], k}, Grid{cloud.supers});
    double* const memory = context_.scratch<double>((1 + kD) * size + 2 * leaves);
    problem_.sides[s] = {cloud,  planes,          memory + 2 * leaves,       nullptr,
                         memory, memory + leaves, memory + 2 * leaves + size};
  }

  // The columns are the rows of the same sums with the sides exchanged.
  void sum(int s, const PointSums<T>& out) {
    const Ordered& own = ordered_[s];
    const int64_t n = own.cloud.n, d = group_.made.points.d;
    ListedOrder order{};
    order.what = RowSum::kPlan, order.side = s;
    order.k = kLog2E / eps_;
    order.threshold = static_cast<float>(fast_log2(4 * kShare * kLeftOut));
    order.single = static_cast<float>(kLeftOut / (2 * kTermRounding));
    order.of[0] = potentials_[0], order.of[1] = potentials_[1];
    launch(context_, OrderKernel{order, problem_.order}, Grid{});
    Grid grid{ceil_div(n, kLeaf)};
    grid.shared = LeafSums<kD, true, int>::kShared;
    launch(context_, ListedSumsKernel<kD, true>{problem_}, grid);
    using Put = PutKernel<kD, T>;
    const CostKind kind = group_.made.points.kind;
    double scale = static_cast<double>(group_.coefficient) / scale_of(kind);
    if (kind == CostKind::kSqEuclidean) scale *= 2;
    if (group_.made.symmetric) scale *= 2;  // both sides are x
    launch(context_,
           Put{n, d, own.index, problem_.sides[s].product, group_.grad + p_, scale,
               out.sum + p_ * n, out.product + p_ * n * d},
           Grid{ceil_div(n, Put::kThreads)});
  }

  const Context& context_;
  const PlanSumsGroup<T>& group_;
  const int64_t p_;
  const double eps_;
  Ordered ordered_[2];
  Potential potentials_[2];
  ListedProblem problem_{};
};

}  // namespace
}  // namespace multiscale

template <typename T>
void plan_sums(const Context& context, const std::vector<PlanSumsGroup<T>>& groups, double eps) {
  for (const PlanSumsGroup<T>& group : groups)
    for (int64_t p = 0; p < group.batch; ++p)
      multiscale::dispatch_dims(group.made.points.d, [&](auto dims) {
        multiscale::PlanSums<decltype(dims)::value, T>(context, group, p, eps).run();
      });
}

template void plan_sums(const Context&, const std::vector<PlanSumsGroup<float>>&, double);
template void plan_sums(const Context&, const std::vector<PlanSumsGroup<double>>&, double);

}  // namespace otloss::cuda
