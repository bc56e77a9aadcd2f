// A multiscale solve on a GPU, csrc/cpu/multiscale/levels.h: from a few centroids of the clouds, at
// an eps that these resolve, to the points themselves. What a solve is told depends on how far the
// centroids are from the points, which the host reads once; after that nothing waits for it.
#include <algorithm>
#include <cmath>
#include <limits>
#include <type_traits>

#include "cuda/multiscale/listed_costs.cuh"
#include "cuda/multiscale/multiscale.h"

namespace otloss::cuda::multiscale {
namespace {

// Where a solve begins: at potentials that are given, or for a cloud against itself at those of an
// eps that does not reach the neighbours, where a row's sum is that of the point itself.
template <typename T>
struct StartKernel {
  static constexpr int kThreads = 256;

  int64_t n;
  const int32_t* index;
  const T* given;         // of the caller's points, or null
  const double* weights;  // in order
  double half_eps;        // damped, for log2
  double* v;              // (n,) out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const int64_t i = block.x() * kThreads + block.thread();
    if (i >= n) return;
    v[i] = given            ? static_cast<double>(given[index[i]])
           : weights[i] > 0 ? -half_eps * fast_log2(weights[i])
                            : 0.0;
  }
};

// Potentials back to the caller's points, and the status, with what rounding adds; one block.
template <typename T>
struct ReturnKernel {
  static constexpr int kThreads = 256;

  struct Side {
    int64_t n;
    const int32_t* index;
    const double *w, *v;  // in order
    T* out;
  };
  Side sides[2];
  bool balanced;
  double tol, per_cost, coefficient;
  const double* solved;  // the status of the last level
  const bool* doubtful;
  double* status;  // out

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    Team<Block, kThreads> team(block, TeamArguments{1, nullptr});
    double sums[3] = {0, 0, 0};  // means of f and g; the mass
    for (int s = 0; s < 2; ++s)
      for_points(block, s, [&](double w, double v, int32_t) {
        sums[s] += w * v;
        if (s == 0) sums[2] += w;
      });
    team.sum(sums);
    // Of (f + t, g - t), all solutions, the one of equal means: here, where they have all digits.
    const double shift = balanced ? 0.5 * (sums[1] - sums[0]) / sums[2] : 0.0;
    const bool failed = !(solved[kStatusMaxCost] <= std::numeric_limits<double>::max());
    constexpr double kUnit = static_cast<double>(std::numeric_limits<T>::epsilon());
    double rounded[1] = {0};
    for (int s = 0; s < 2; ++s)
      for_points(block, s, [&](double w, double v, int32_t i) {
        const double exact = s == 0 ? v + shift : v - shift;
        const T value = w > 0 || failed ? static_cast<T>(exact) : T(0);
        sides[s].out[i] = value;
        if (sizeof(T) < sizeof(double) && w > 0)
          rounded[0] += w * (fabs(exact - static_cast<double>(value)) + 0.5 * kUnit * fabs(exact));
      });
    team.sum(rounded);
    if (block.thread() != 0) return;
    for (int field = 0; field < kStatusFields; ++field) status[field] = solved[field];
    const double error = status[kStatusError] += per_cost * rounded[0] / sums[2];
    status[kStatusConverged] = error <= tol && !*doubtful ? 1.0 : 0.0;
    status[kStatusTerm] *= coefficient;
  }

 private:
  template <class Block, typename F>
  OTLOSS_DEVICE void for_points(Block& block, int s, F&& function) const {
    const Side& side = sides[s];
    for (int64_t i = block.thread(); i < side.n; i += kThreads)
      function(side.w[i], side.v[i], side.index[i]);
  }
};

template <int kD, typename T>
class ProblemSolve {
 public:
  ProblemSolve(const Context& context, const SolveGroup<T>& group, int64_t p,
               const SolveOptions& options)
      : context_(context), group_(group), p_(p), options_(options) {}

  void run() {
    const int64_t n = group_.n, m = group_.m, d = group_.points.d;
    const CostKind kind = group_.points.kind;
    one_ = group_.symmetric;
    const int64_t count = options_.warm_start ? 1 : level_count(std::max(n, m));
    double *const found = context_.scratch<double>(2 * count + 2), *masses = found + 2 * count;
    clear(context_, found, (2 * count + 2) * static_cast<int64_t>(sizeof(double)));
    x_ = ordered_cloud<kD>(context_, kind, n, d, group_.points.zx + p_ * n * d, group_.a + p_ * n,
                           nullptr, masses);
    y_ = one_ ? x_
              : ordered_cloud<kD>(context_, kind, m, d, group_.points.zy + p_ * m * d,
                                  group_.b + p_ * m, balanced() ? masses : nullptr, masses + 1);
    const Levels xs = levels(x_.cloud, count, found);
    const Levels ys = one_ ? xs : levels(y_.cloud, count, found + count);
    measure(count, found);
    make_room(ceil_div(std::max(n, m), kWarp) * kWarp);
    one_ ? solve_self(xs) : solve_pair(xs, ys);
    give_back();
  }

 private:
  using Levels = std::vector<Cloud>;  // from fine to coarse

  struct Told {
    double eps, tol;
    int64_t passes;
    bool exact = false, warm = true;
    bool counts = false, last = false;  // a stage of the finest level, the last one
  };

  bool balanced() const { return group_.penalties.balanced; }

  // Of the finest level: so far below tol that a gradient, whose error can be twice as large, is
  // within it, and that what rounding adds does not matter.
  double finest_tol() const {
    constexpr double kWell = 0.4;
    return kWell * options_.tol;
  }
  double stage_tol() const { return std::max(options_.tol, kStageTol); }

  // found: of each level the mass times the mean squared distance to the finer points, out.
  Levels levels(const Cloud& cloud, int64_t count, double* found) const {
    Levels result{cloud};
    launch(context_, NodesKernel<kD>{cloud}, Grid{cloud.supers});
    while (static_cast<int64_t>(result.size()) < count) {
      const Cloud fine = result.back(),
                  coarse = make_cloud<kD>(context_, ceil_div(fine.n, kPoints));
      double* const parts = context_.scratch<double>(coarse.n);
      using Kernel = CoarserKernel<kD>;
      launch(context_, Kernel{fine, coarse, parts}, Grid{ceil_div(coarse.n, Kernel::kThreads)});
      Grid grid;
      grid.shared = sizeof(TeamScratch);
      launch(context_, TotalKernel{parts, coarse.n, found + result.size()}, grid);
      launch(context_, NodesKernel<kD>{coarse}, Grid{coarse.supers});
      result.push_back(coarse);
    }
    return result;
  }

  // The mean squared distance of the points to the centroids of each level.
  void measure(int64_t count, const double* found) {
    spread_.assign(count, 0);
    if (count == 1) return;
    std::vector<double> sums(2 * count + 2);
    read(context_, sums.data(), found, (2 * count + 2) * static_cast<int64_t>(sizeof(double)));
    double* const mass = sums.data() + 2 * count;
    if (one_ || balanced()) mass[1] = mass[0];
    double of_x = 0, of_y = 0;
    for (int64_t level = 1; level < count; ++level) {
      of_x += sums[level] / mass[0], of_y += sums[count + level] / mass[1];
      spread_[level] = std::max(of_x, of_y);
    }
  }

  // What all solves have in common, for so many points.
  void make_room(int64_t length) {
    SolveArguments<double>& arguments = work_.solve;
    arguments.team.size = 1;
    arguments.shared.vectors = -1;
    arguments.vector_length = length;
    arguments.vectors = context_.scratch<double>(kVectors * length);
    work_.vectors = context_.scratch<double>(kListedVectors * length);
    work_.log_w = context_.scratch<float>(length);
    work_.problem.order = work_.orders.of = context_.scratch<ListedOrder>(1);
    work_.doubtful = context_.scratch<bool>(1);
    passes_ = context_.scratch<int64_t>(1);
    clear(context_, passes_, sizeof(int64_t));
    status_ = context_.scratch<double>(kStatusFields);
  }

  // The clouds of a level.
  void enter(const Cloud& x, const Cloud& y) {
    work_.problem.sides[0] = side(x), work_.problem.sides[1] = side(y);
  }

  // Solves at one eps, from f and g if it is a warm start, to f and g.
  void solve_at(const Told& told) {
    const Cloud &x = work_.problem.sides[0].cloud, &y = work_.problem.sides[1].cloud;
    SolveGroup<double> group{};
    group.batch = 1, group.n = x.n, group.m = y.n, group.symmetric = one_;
    group.points.zx = x.X;
    group.a = x.w, group.b = y.w, group.f = f_, group.g = g_;
    group.status = status_, group.coefficient = 1, group.penalties = group_.penalties;
    work_.solve.groups = {1, {group}};
    SolveOptions& options = work_.solve.options = options_;
    options.eps = told.eps, options.tol = told.tol;
    options.warm_start = told.warm;
    if (!told.counts) options.max_iters = told.passes;
    work_.passes = told.counts ? passes_ : nullptr, work_.last = told.last;
    work_.exact = told.exact;
    work_.left_out = told.tol / 8;
    const Grid planes{x.supers + y.supers};
    Grid sums{ceil_div(std::max(x.n, y.n), kLeaf)};
    using Sums = ListedSumsKernel<kD, false>;
    sums.shared = LeafSums<kD, false, int>::kShared;
    constexpr int64_t kTurns = 8, kRepeats = 40;  // of a pass; of all, with less left out
    run_controls(context_, work_, 1, kTurns * told.passes + kRepeats, [&](Queue& queue) {
      queue(PlanesKernel<kD>{work_.problem}, planes);
      queue(Sums{work_.problem}, sums);
    });
  }

  ListedSide side(const Cloud& cloud) const {
    const int64_t leaves = cloud.leaves(), size = leaves * kLeaf;
    double* const memory = context_.scratch<double>(2 * (size + leaves));
    return {cloud,
            make_planes<kD>(context_, cloud),
            memory,
            memory + size,
            memory + 2 * size,
            memory + 2 * size + leaves,
            nullptr};
  }

  // v of the coarser points to first order, at eps.
  double* extended(const Cloud& fine, const Cloud& coarse, const double* v, double eps) const {
    const double k = kLog2E / eps;
    const Planes planes = make_planes<kD>(context_, coarse);
    double* const out = context_.scratch<double>(fine.n);
    launch(context_, FitKernel<kD>{coarse, planes, {v, k}, k}, Grid{coarse.supers});
    using Kernel = ExtendKernel<kD>;
    launch(context_, Kernel{fine, coarse, planes, k, 1 / k, out},
           Grid{ceil_div(fine.n, Kernel::kThreads)});
    return out;
  }

  double* started(const Ordered& cloud, const T* given) const {
    double* const v = context_.scratch<double>(cloud.cloud.n);
    const double damping = Penalty{1 / group_.penalties.rho_x}.damping(options_.eps);
    using Kernel = StartKernel<T>;
    launch(context_,
           Kernel{cloud.cloud.n, cloud.index, given, cloud.cloud.w,
                  0.5 * damping * options_.eps / kLog2E, v},
           Grid{ceil_div(cloud.cloud.n, Kernel::kThreads)});
    return v;
  }

  void solve_pair(const Levels& xs, const Levels& ys) {
    const int64_t coarsest = static_cast<int64_t>(xs.size()) - 1;
    double at = options_.eps;
    if (options_.warm_start)
      f_ = started(x_, group_.f + p_ * group_.n), g_ = started(y_, group_.g + p_ * group_.m);
    for (int64_t level = coarsest; level >= 0; --level) {
      const Cloud &x = xs[level], &y = ys[level];
      const double target = std::max(options_.eps, kPerSpread * spread_[level]);
      const double tol = level > 0 ? stage_tol() : finest_tol();
      if (level == coarsest && !options_.warm_start) {
        f_ = context_.scratch<double>(x.n), g_ = context_.scratch<double>(y.n);
        enter(x, y);
        solve_at({at = target, tol, options_.max_iters, true, false});
        continue;
      }
      if (level < coarsest) {
        f_ = extended(x, xs[level + 1], f_, at);
        g_ = extended(y, ys[level + 1], g_, at);
      }
      enter(x, y);
      const double from = at;
      const int stages =
          std::max(1, static_cast<int>(std::ceil(std::log2(from / target) / kLog2Ratio)));
      for (int s = 1; s <= stages; ++s) {
        const bool last = s == stages, counts = level == 0, finest = last && counts;
        at = last ? target : from * std::pow(target / from, double(s) / stages);
        solve_at({at, finest ? tol : stage_tol(), finest ? options_.max_iters : kStagePasses, false,
                  true, counts, last});
      }
    }
  }

  // From the coarsest level that eps allows.
  void solve_self(const Levels& levels) {
    const double eps = options_.eps;
    int64_t level = static_cast<int64_t>(levels.size()) - 1;
    while (kSelfPerSpread * spread_[level] > eps) --level;
    const auto told = [&](bool exact, bool warm) {
      const int64_t passes = exact || level == 0 ? options_.max_iters : kStagePasses;
      return Told{eps, level > 0 ? stage_tol() : finest_tol(), passes, exact, warm};
    };
    const Cloud& first = levels[level];
    const bool small = first.n <= kCoarsest && !options_.warm_start;
    const Ordered start{first, x_.index};
    f_ = started(start, options_.warm_start ? group_.f + p_ * group_.n : nullptr);
    g_ = context_.scratch<double>(first.n);
    enter(first, first);
    solve_at(told(small, !small));
    while (level-- > 0) {
      const Cloud& x = levels[level];
      f_ = extended(x, levels[level + 1], f_, eps);
      g_ = context_.scratch<double>(x.n);
      enter(x, x);
      solve_at(told(false, true));
    }
  }

  void give_back() const {
    const Penalties& held = group_.penalties;
    ReturnKernel<T> kernel{};
    kernel.sides[0] = {group_.n, x_.index, x_.cloud.w, f_, group_.f + p_ * group_.n};
    kernel.sides[1] = {group_.m, y_.index, y_.cloud.w, g_, group_.g + p_ * group_.m};
    kernel.balanced = balanced();
    kernel.tol = options_.tol, kernel.coefficient = group_.coefficient;
    kernel.per_cost = 1 / options_.eps + 1 / std::min(held.rho_x, held.rho_y);
    kernel.solved = status_, kernel.doubtful = work_.doubtful;
    kernel.status = group_.status + p_ * kStatusFields;
    Grid grid;
    grid.shared = sizeof(TeamScratch);
    launch(context_, kernel, grid);
  }

  const Context& context_;
  const SolveGroup<T>& group_;
  const int64_t p_;
  const SolveOptions& options_;
  bool one_ = false;
  Ordered x_{}, y_{};
  std::vector<double> spread_;
  double *f_ = nullptr, *g_ = nullptr;  // of the level's points
  double* status_ = nullptr;
  int64_t* passes_ = nullptr;  // of the finest level's stages
  ListedSolve<kD> work_{};
};

}  // namespace

template <typename T>
void solve(const Context& context, const std::vector<SolveGroup<T>>& groups,
           const SolveOptions& options) {
  for (const SolveGroup<T>& group : groups)
    for (int64_t p = 0; p < group.batch; ++p)
      dispatch_dims(group.points.d, [&](auto dims) {
        ProblemSolve<decltype(dims)::value, T>(context, group, p, options).run();
      });
}

template void solve(const Context&, const std::vector<SolveGroup<float>>&, const SolveOptions&);
template void solve(const Context&, const std::vector<SolveGroup<double>>&, const SolveOptions&);

}  // namespace otloss::cuda::multiscale
