#include "cpu/multiscale/levels.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "core/math.h"
#include "cpu/multiscale/all_pairs.h"

namespace otloss::cpu::multiscale {
namespace {

constexpr int64_t kWidePasses = 50;  // of the last stage, with leaves of moments: see solve_narrow
constexpr double kMostEffort = 0.4;  // see Engine::effort; otherwise all pairs take less time

// Clouds from fine to coarse; spread: mean squared distance of the points to those of a level.
struct Levels {
  std::vector<Cloud> clouds;
  std::vector<double> spread{0.0};

  Levels(Cloud cloud, int64_t count) {
    clouds.push_back(std::move(cloud));
    while (static_cast<int64_t>(clouds.size()) < count) {
      double more = 0;
      clouds.push_back(clouds.back().coarser(kPoints, more));
      spread.push_back(spread.back() + more);
    }
  }
};

void build(Cloud& X, Cloud& Y, double eps, const Precision& precision) {
  const int64_t L = leaf_size(X, Y, eps, precision);
  if (X.L != L) X.build(L, precision.split);
  if (Y.L != L) Y.build(L, precision.split);
}

std::vector<double> times(std::vector<double> v, double factor) {
  for (double& value : v) value *= factor;
  return v;
}

// The mean over a cloud's points of function(v), which is 0 where v is.
template <typename F>
double mean(const Cloud& cloud, const std::vector<double>& v, F&& function) {
  double sum = 0, mass = 0;
  for (int64_t i = 0; i < cloud.n; ++i) sum += cloud.w[i] * function(v[i]), mass += cloud.w[i];
  return sum / mass;
}

// Of (f + t, g - t), all solutions, the one of equal means: here, where potentials have all digits.
void centre(const Cloud& X, std::vector<double>& f, const Cloud& Y, std::vector<double>& g) {
  const auto same = [](double value) { return value; };
  const double shift = (mean(Y, g, same) - mean(X, f, same)) / 2;
  for (double& value : f) value += shift;
  for (double& value : g) value -= shift;
}

// Potentials are rounded to single precision for return, and again where they are brought to the
// totals of a caller. What that adds at most to the error of a plan whose potentials are `to_cost`
// v, before these are known to all digits: half of the distance to the next number each time, which
// is half of kUnit or more of the number.
double expected_rounding(const Cloud& cloud, const std::vector<double>& v, double to_cost,
                         double eps) {
  constexpr double kUnit = std::numeric_limits<float>::epsilon();
  return 0.5 * kUnit * to_cost / eps * mean(cloud, v, [](double value) { return std::abs(value); });
}

// What it adds at most, by the first rounding as it is: entries of the plan change by the part that
// those of their row and column do, and so do the masses that a penalty allows.
double rounding_error(const Cloud& cloud, const std::vector<double>& v, double eps,
                      const Penalties& penalties) {
  const double per_cost = 1 / eps + 1 / std::min(penalties.rho_x, penalties.rho_y);
  return per_cost * mean(cloud, v, [](double value) {
           const float rounded = static_cast<float>(std::abs(value));
           const float next = std::nextafter(rounded, std::numeric_limits<float>::infinity());
           return std::abs(std::abs(value) - static_cast<double>(rounded)) +
                  0.5 * static_cast<double>(next - rounded);
         });
}

// The tolerance of a solve whose error this is added to.
double tolerance(double tol, double rounding) {
  constexpr double kLeast = 0.25;
  return std::max(tol - 1.1 * rounding, kLeast * tol);
}

void add_rounding(Solution& solution, double rounding, double tol) {
  Outcome& outcome = solution.outcome;
  outcome.error += rounding;
  outcome.converged = outcome.converged && outcome.error <= tol;
}

SolveOptions stage(const SolveOptions& options, double eps, bool finest, double tol) {
  SolveOptions result = options;
  result.eps = eps;
  result.warm_start = true;
  result.tol = finest ? tol : std::max(options.tol, kStageTol);
  if (!finest) result.max_iters = kStagePasses;
  return result;
}

Precision precision(double tol, bool symmetric, bool split) { return {tol / 4, symmetric, split}; }

// From the potentials of a level at `at` to those of the next finer one: F to first order, g by an
// exact update from the coarser F.
struct Finer {
  std::vector<double> F, g;
  double left_out_rate;  // of the update

  Finer(Cloud& fine_x, Cloud& fine_y, Cloud& x, Cloud& y, const Penalties& penalties, double at,
        const std::vector<double>& coarse_F, const std::vector<double>& coarse_g, bool split) {
    const double k = kLog2E / at;
    const Precision loose = precision(kStageTol, false, split);
    build(x, y, at, loose);
    std::vector<double> V = coarse_F;
    Planes planes;
    V.resize(x.size), planes.fit(x, k, V.data(), split);
    F = extended(fine_x, x, planes, k, kPoints);
    V = times(coarse_g, k / Penalty{1 / penalties.rho_y}.damping(at));
    V.resize(y.size), planes.fit(y, k, V.data(), split);
    std::vector<double> G = extended(fine_y, y, planes, k, kPoints);
    build(fine_y, x, at, loose);
    Engine up(fine_y, x, penalties.rho_y, penalties.rho_x, at, loose);
    const std::vector<double> f = padded(times(coarse_F, up.y.damping(at) / k), up.y.count);
    G.resize(fine_y.size);
    std::vector<double> sums(fine_y.size);
    up.update_rows(at, f.data(), G.data(), sums.data());
    left_out_rate = up.left_out_rate();
    g = times(G, up.x.damping(at) / k);
    F.resize(fine_x.n), g.resize(fine_y.n);
  }

  static std::vector<double> padded(std::vector<double> v, int64_t count) {
    v.resize(count);
    return v;
  }
};

// A level's solve at one eps after the other, from `at` to `target`, which `at` is then.
Outcome run_stages(Engine& engine, const SolveOptions& options, double target, bool finest,
                   double tol, double& at, std::vector<double>& F, std::vector<double>& g) {
  const int stages = std::max(1, static_cast<int>(std::ceil(std::log2(at / target) / kLog2Ratio)));
  const double from = at;
  const int64_t last = engine.X.L >= kLeastMoments ? kWidePasses : options.max_iters;
  Outcome outcome;
  int64_t passes = 0;
  for (int s = 1; s <= stages; ++s) {
    const int64_t left = options.max_iters - passes;
    if (finest && stage_passes(left) == 0) s = stages;
    const double next = s == stages ? target : from * std::pow(target / from, double(s) / stages);
    F = times(std::move(F), at / next);
    at = next;
    SolveOptions one = stage(options, at, finest && s == stages, tol);
    if (finest) one.max_iters = s == stages ? std::min(left, last) : stage_passes(left);
    outcome = cpu::solve_pair(engine, one, F.data(), g.data());
    passes += outcome.iterations;
  }
  if (finest) outcome.iterations = passes;
  return outcome;
}

// Goes on with leaves of few points, where those of moments led nowhere. A leaf is then a group of
// Newton's step as well, and what few of its points send far away stands out of it: between groups
// of points many eps apart, mass comes from the points on the near side alone.
void solve_narrow(Cloud& X, Cloud& Y, const Penalties& penalties, const SolveOptions& options,
                  Precision wanted, double tol, std::optional<Engine>& engine, Outcome& outcome,
                  std::vector<double>& F, std::vector<double>& g) {
  if (outcome.converged || X.L < kLeastMoments || outcome.iterations >= options.max_iters) return;
  wanted.narrow = true;
  build(X, Y, options.eps, wanted);
  F.resize(X.size), g.resize(Y.size);
  engine.emplace(X, Y, penalties.rho_x, penalties.rho_y, options.eps, wanted);
  SolveOptions rest = stage(options, options.eps, true, tol);
  rest.max_iters -= outcome.iterations;
  const int64_t before = outcome.iterations;
  outcome = cpu::solve_pair(*engine, rest, F.data(), g.data());
  outcome.iterations += before;
}

// A few more passes, where the error is not well below `tol`: that of a gradient can be twice as
// large, as in clouds of many clusters. Kept where they bring it down.
void polish(Engine& engine, const SolveOptions& options, double tol, Outcome& outcome,
            std::vector<double>& F, std::vector<double>& g) {
  constexpr double kWell = 0.3;
  constexpr int64_t kPasses = 6;
  SolveOptions further = stage(options, options.eps, true, kWell * tol);
  further.max_iters = std::min(kPasses, options.max_iters - outcome.iterations);
  if (!outcome.converged || outcome.error <= further.tol || further.max_iters < 1) return;
  std::vector<double> next_F = F, next_g = g;
  const Outcome next = cpu::solve_pair(engine, further, next_F.data(), next_g.data());
  outcome.iterations += next.iterations;
  if (!(next.error < outcome.error)) return;
  outcome.error = next.error;
  F.swap(next_F), g.swap(next_g);
}

double transport(const Engine& engine, const Penalties& penalties, const SolveOptions& options,
                 const Solution& solved) {
  constexpr double kHard = std::numeric_limits<double>::infinity();
  const double eps = options.eps;
  Cloud X = engine.X, Y = engine.Y;
  const Penalty on_x{1 / penalties.rho_x}, on_y{1 / penalties.rho_y};
  set_marginal(X, on_x, solved.f), set_marginal(Y, on_y, solved.g);
  const bool split = engine.workers().size() > 1;
  X.build(X.L, split), Y.build(Y.L, split);
  Engine fixed(X, Y, kHard, kHard, eps, precision(options.tol, false, split));
  return fixed.transport(eps, times(solved.f, kLog2E / eps / on_x.damping(eps)).data(),
                         times(solved.g, 1 / on_y.damping(eps)).data());
}

Solution finished(Engine& engine, const SolveOptions& options, const Penalties& penalties,
                  const Outcome& outcome, const std::vector<double>& F,
                  const std::vector<double>& g) {
  Solution result;
  result.outcome = outcome;
  result.f = times(F, engine.x.damping(options.eps) * options.eps / kLog2E);
  result.g = g;
  result.value =
      options.objective == Objective::kTransport
          ? transport(engine, penalties, options, result)
          : value_of(engine, options, penalties.balanced, result.f.data(), result.g.data());
  result.f.resize(engine.X.n), result.g.resize(engine.Y.n);
  if (penalties.balanced) centre(engine.X, result.f, engine.Y, result.g);
  return result;
}

// Potentials to go on from by all pairs.
Solution unfinished(const Engine& engine, double eps, const std::vector<double>& F,
                    std::vector<double> g) {
  Solution result;
  result.finished = false;
  result.f = times(F, engine.x.damping(eps) * eps / kLog2E);
  result.g = std::move(g);
  result.f.resize(engine.X.n), result.g.resize(engine.Y.n);
  return result;
}

}  // namespace

void set_marginal(Cloud& cloud, const Penalty& penalty, const std::vector<double>& v) {
  constexpr double kLeast = 1e-290;  // points without weight are none; their sums are in range
  for (int64_t i = 0; i < cloud.n; ++i)
    cloud.w[i] = std::max(kLeast, cloud.w[i] * penalty.share(v[i]));
}

template <typename T>
Clouds::Clouds(const PointPair<T>& points, int64_t problem, int64_t n, const T* a, int64_t m,
               const T* b, bool one, bool split)
    : scale(points.kind == CostKind::kCosine ? std::sqrt(0.5) : 1.0) {
  const int64_t d = points.d;
  const double radius = points.kind == CostKind::kCosine ? scale : 0;
  const auto ordered = [&](int64_t count, const T* z, const T* weight, std::vector<int32_t>& in) {
    return ordered_cloud(count, d, z, weight, radius, split, in);
  };
  x = ordered(n, points.zx + problem * n * d, a, in_x);
  if (!one) y = ordered(m, points.zy + problem * m * d, b, in_y);
}

void Clouds::set_masses(double mass_x, double mass_y) {
  const auto set = [](Cloud& cloud, double mass) {
    double sum = 0;
    for (const double w : cloud.w) sum += w;
    for (double& w : cloud.w) w *= mass / sum;
  };
  set(x, mass_x), set(y, mass_y);
}

Solution solve_pair(Clouds clouds, const Penalties& penalties, const SolveOptions& options,
                    Solution start, bool single, bool split) {
  const double eps = options.eps;
  const int64_t count = options.warm_start ? 1 : level_count(std::max(clouds.x.n, clouds.y.n));
  Levels xs(std::move(clouds.x), count), ys(std::move(clouds.y), count);
  std::vector<double> F, g;  // F of the level's row update, g half a step on
  double at = eps, left_out_rate = 0;
  if (options.warm_start) {
    F = times(std::move(start.f), kLog2E / eps / Penalty{1 / penalties.rho_x}.damping(eps));
    g = std::move(start.g);
  }
  for (int64_t level = count - 1; level >= 0 && !interrupted(); --level) {
    Cloud &X = xs.clouds[level], &Y = ys.clouds[level];
    const double target = std::max(eps, kPerSpread * std::max(xs.spread[level], ys.spread[level]));
    const bool finest = level == 0, first = level == count - 1 && !options.warm_start;
    if (first) {
      at = target;
      AllPairs pairs(X, Y, X.n, Y.n, penalties);
      F.assign(X.n, 0), g.assign(Y.n, 0);
      cpu::Engine<double> engine(pairs.x, pairs.y, pairs.group, 0, options.eps, split);
      SolveOptions coarse = stage(options, at, finest, options.tol);
      coarse.warm_start = false;
      coarse.max_iters = options.max_iters;
      cpu::solve_pair(engine, coarse, F.data(), g.data());
      if (!finest) continue;
    }
    if (!first && level + 1 < count) {
      Finer finer(X, Y, xs.clouds[level + 1], ys.clouds[level + 1], penalties, at, F, g, split);
      F = std::move(finer.F), g = std::move(finer.g), left_out_rate = finer.left_out_rate;
      xs.clouds.pop_back(), ys.clouds.pop_back();
    }
    const double rounding =
        single ? expected_rounding(X, F, at / kLog2E, eps) + expected_rounding(Y, g, 1, eps) : 0;
    const double tol = finest ? tolerance(options.tol, rounding) : kStageTol;
    const Precision wanted = precision(tol, false, split);
    build(X, Y, target, wanted);
    F.resize(X.size), g.resize(Y.size);
    std::optional<Engine> engine;
    engine.emplace(X, Y, penalties.rho_x, penalties.rho_y, target, wanted);
    engine->expect(left_out_rate);
    if (finest && rounding <= tol / 2 &&
        engine->effort(target, times(F, at / target).data(), g.data()) > kMostEffort)
      return unfinished(*engine, at, F, std::move(g));
    Outcome outcome = run_stages(*engine, options, target, finest, tol, at, F, g);
    if (finest) {
      solve_narrow(X, Y, penalties, options, wanted, tol, engine, outcome, F, g);
      polish(*engine, options, tol, outcome, F, g);
      Solution result = finished(*engine, options, penalties, outcome, F, g);
      if (single)
        add_rounding(result,
                     rounding_error(X, result.f, eps, penalties) +
                         rounding_error(Y, result.g, eps, penalties),
                     options.tol);
      return result;
    }
    F.resize(X.n), g.resize(Y.n);
  }
  return {};
}

Solution solve_self(Clouds clouds, const Penalties& penalties, const SolveOptions& options,
                    Solution start, bool single, bool split) {
  const double eps = options.eps, k = kLog2E / eps;
  Levels levels(std::move(clouds.x), options.warm_start ? 1 : level_count(clouds.x.n));
  const double damping = Penalty{1 / penalties.rho_x}.damping(eps);
  int64_t level = static_cast<int64_t>(levels.clouds.size()) - 1;
  while (kSelfPerSpread * levels.spread[level] > eps) --level;
  levels.clouds.resize(level + 1);
  std::vector<double> F;  // k f
  const bool small = levels.clouds[level].n <= kCoarsest && !options.warm_start;
  if (small) {
    const Cloud& X = levels.clouds[level];
    AllPairs pairs(X, X, X.n, X.n, penalties);
    F.assign(X.n, 0);
    cpu::Engine<double> engine(pairs.x, pairs.y, pairs.group, 0, eps, split);
    SolveOptions coarse = options;
    if (level > 0) coarse.tol = std::max(options.tol, kStageTol);
    cpu::solve_symmetric(engine, coarse, F.data());
  } else if (options.warm_start) {
    F = times(std::move(start.f), k);
  } else {  // where eps does not reach the neighbours sum is that of the point itself
    const Cloud& X = levels.clouds[level];
    F.resize(X.n);
    for (int64_t i = 0; i < X.n; ++i) F[i] = -0.5 * damping * std::log2(X.w[i]);
  }
  for (int64_t at = small && level > 0 ? level - 1 : level; at >= 0 && !interrupted(); --at) {
    Cloud& X = levels.clouds[at];
    if (at < static_cast<int64_t>(levels.clouds.size()) - 1) {
      Cloud& coarse = levels.clouds[at + 1];
      const Precision loose = precision(kStageTol, false, split);
      build(X, coarse, eps, loose);
      Engine up(X, coarse, penalties.rho_x, penalties.rho_y, eps, loose);
      std::vector<double> finer(X.size), sums(X.size), f = times(std::move(F), 1 / k);
      f.resize(coarse.size);
      for (int64_t i = 0; i < X.n; ++i) finer[i] = k / damping * f[i / kPoints];
      up.update_rows(eps, f.data(), finer.data(), sums.data());
      F = times(std::move(finer), damping);
      levels.clouds.pop_back();
    }
    const double rounding = single ? expected_rounding(X, F, 2 / k, eps) : 0;
    const double tol = at ? std::max(options.tol, kStageTol) : tolerance(options.tol, rounding);
    const Precision wanted = precision(tol, true, split);
    build(X, X, eps, wanted);
    F.resize(X.size);
    Engine engine(X, X, penalties.rho_x, penalties.rho_y, eps, wanted);
    const Outcome outcome =
        cpu::solve_symmetric(engine, stage(options, eps, at == 0, tol), F.data());
    if (at == 0) {
      const std::vector<double> f = times(F, 1 / k);
      Solution result = finished(engine, options, penalties, outcome, times(F, 1 / damping), f);
      if (single)
        add_rounding(result, 2 * rounding_error(X, result.f, eps, penalties), options.tol);
      return result;
    }
    F.resize(X.n);
  }
  return {};
}

template Clouds::Clouds(const PointPair<float>&, int64_t, int64_t, const float*, int64_t,
                        const float*, bool, bool);
template Clouds::Clouds(const PointPair<double>&, int64_t, int64_t, const double*, int64_t,
                        const double*, bool, bool);

}  // namespace otloss::cpu::multiscale
