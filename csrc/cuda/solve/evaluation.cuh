// What a solve measures of a problem and of a point: weights, the scalars of an evaluated point,
// the value of the potentials. All threads of the team call together, and see the results.
//
// After a pass each block makes its columns' update, and the scalars of the step are one reduction
// over the team; soft marginals take two more. Vectors are cut by columns: a thread only ever
// touches its own entries, but for G, which everybody reads.
//
// Costs (resident_costs.cuh, launched_costs.cuh) tells where costs are: place() by one thread,
// load(), pass() from G and F, columns() and guard() for the update of the columns, transport(),
// entry() of two samples; left_out(), a bound of the part of the plan that the pass left out, and
// rounding(), by how much that of its sums changes marginals beside roundoff; sent_and_far(), what
// of a duality gap takes sums over the plan; and join() of the components of the plan,
// where there is one (kJoins).
#pragma once

#include <limits>

#include "cuda/solve/state.cuh"

namespace otloss::cuda {

template <typename T, class Block, class Costs>
class Evaluation {
 public:
  using Team = typename Costs::Team;

  OTLOSS_DEVICE Evaluation(Block& block, const SolveArguments<T>& arguments, const Costs& costs,
                           Team& team, SolverState<T>& state)
      : block_(block), args_(arguments), team_(team), costs_(costs), s_(state) {}

 protected:
  OTLOSS_DEVICE int64_t row_offset() const {  // of the first row, in (B, n)
    return s_.batch * s_.group->n + team_.first_row();
  }
  OTLOSS_DEVICE const SolveOptions& options() const { return args_.options; }

  // Pointers and sizes of the problem.
  OTLOSS_DEVICE void place(const SolveGroup<T>& p, int64_t batch) {
    s_.group = &p, s_.batch = batch;
    s_.x.rate = 1 / p.penalties.rho_x, s_.y.rate = 1 / p.penalties.rho_y;
    s_.soft = !(s_.x.hard() && s_.y.hard());
    s_.balanced = p.penalties.balanced;
    s_.max_iters = options().max_iters;
    s_.symmetric = p.symmetric && options().n_iters < 0;
    s_.weights = p.a + batch * p.n, s_.b = p.b + batch * p.m;
    const T* const start = args_.starts[&p - args_.groups.items];
    s_.start = start ? start + batch * p.m : nullptr;
    const int64_t length = args_.vector_length;
    T* vectors = args_.shared.vectors >= 0 ? team_.template at<T>(args_.shared.vectors)
                                           : args_.vectors + team_.index() * kVectors * length;
    for (T** const v : {&s_.g, &s_.gt, &s_.trial_g, &s_.trial_gt, &s_.q, &s_.w, &s_.target, &s_.r,
                        &s_.p, &s_.G, &s_.pairs})
      *v = vectors, vectors += length;
    if (!s_.soft) s_.target = s_.w;
    costs_.place(p, batch);
  }

  // Loads weights and costs. Returns max |C_ij| over points of positive weight, or NaN.
  OTLOSS_NOINLINE double load() {
    const SolveGroup<T>& p = *s_.group;
    const T *const a = p.a + row_offset(), *const f = p.f + row_offset();
    // What is iterated on is damped to give f, but for a cloud against itself.
    const double damping = s_.symmetric ? 1 : s_.x.damping(options().eps);
    const T k = static_cast<T>(kLog2E / options().eps / damping);
    double mass[4] = {0, 0, 0, 0};  // of x and y; sums of squares
    const auto weigh = [&mass](int side, T weight) {
      const double w = static_cast<double>(weight);
      mass[side] += w, mass[2 + side] += w * w;
    };
    team_.for_rows([&](int i) {
      s_.a[i] = a[i];
      s_.F[i] = options().warm_start && a[i] > T(0) ? k * f[i] : T(0);
      weigh(0, a[i]);
    });
    team_.for_columns([&](int j) { weigh(1, s_.b[j]); });
    double largest[2] = {0, 0};  // max |C|, and 1 where it is not finite
    costs_.load(largest);
    team_.template reduce<Sum>(mass);
    team_.template reduce<Max>(largest);
    // b is scaled to the total of a: weights that were rounded differently must not keep the error
    // up.
    const double ratio = s_.balanced ? mass[0] / mass[1] : 1.0;
    team_.for_columns(
        [&](int j) { s_.w[j] = static_cast<T>(static_cast<double>(s_.b[j]) * ratio); });
    team_.one([&] {
      const double points_x = equal_points(mass[0], mass[2]);
      const double points_y = equal_points(mass[1], mass[3]);
      s_.mass_x = snapped_total(mass[0], roundoff<T>());
      s_.mass_y = s_.balanced ? s_.mass_x : snapped_total(mass[1], roundoff<T>());
      s_.control = StepControl(options().eps, options().tol, s_.max_iters, s_.mass_y,
                               points_x < points_y ? points_x : points_y);
      s_.set_eps(options().eps);
    });
    return largest[1] > 0 ? static_cast<double>(std::numeric_limits<T>::quiet_NaN()) : largest[0];
  }

  // G_j = k g_j + log2 b_j for the potential to be evaluated, for all blocks to see.
  OTLOSS_NOINLINE void publish(const T* potential) {
    const T* const weights = s_.w;
    T* const G = s_.G;
    const T k = s_.k;
    team_.for_columns([&](int j) {
      const T w = weights[j];
      team_.store(G + j, w > T(0) ? k * potential[j] + fast_log2(w) : static_cast<T>(kLog2Zero));
    });
    team_.sync();
  }

  // f (rows,) and g (m,): the potentials, F = k f.
  OTLOSS_DEVICE double value_of(const T* f, const T* g) {
    double sums[1] = {0};
    if (options().objective == Objective::kTransport) {
      publish(g);
      sums[0] = costs_.transport();
    } else if (!s_.balanced) {
      SoftMean mean_f, mean_g;
      find_least(f, g);
      soft_means(f, 1, g, &mean_f, &mean_g);
      return soft_value(s_.x, s_.y, s_.mass_x, s_.mass_y, s_.eps, mean_f.mean, mean_g.mean);
    } else {
      const TwoSums terms = team_.sums(
          [&](int i) { return static_cast<double>(s_.a[i]) * static_cast<double>(f[i]); },
          [&](int j) { return static_cast<double>(s_.w[j]) * static_cast<double>(g[j]); });
      return terms.first + terms.second;
    }
    team_.sum(sums);
    return sums[0];
  }

  // ------------------------------------------------------------------------------- after the pass

  // The least potentials of points that count: of f, in its units, and of g. Also a barrier.
  OTLOSS_DEVICE void find_least(const T* f, const T* g) {
    double least[2] = {Max::identity(), Max::identity()};
    team_.for_rows([&](int i) {
      if (s_.a[i] > T(0)) least[0] = Max::join(least[0], -static_cast<double>(f[i]));
    });
    team_.for_columns([&](int j) {
      if (s_.w[j] > T(0)) least[1] = Max::join(least[1], -static_cast<double>(g[j]));
    });
    team_.template reduce<Max>(least);
    team_.one([&] { s_.least_f = -least[0], s_.least_g = -least[1]; });
  }

  // The soft means of unit * f and of g; also sums up `count`.
  OTLOSS_NOINLINE double soft_means(const T* f, double unit, const T* g, SoftMean* mean_f,
                                    SoftMean* mean_g, double count = 0) {
    SoftSums x, y;
    team_.for_rows([&](int i) {
      if (s_.a[i] > T(0))
        x.add(s_.x, unit, s_.least_f, static_cast<double>(s_.a[i]), static_cast<double>(f[i]));
    });
    team_.for_columns([&](int j) {
      if (s_.w[j] > T(0))
        y.add(s_.y, 1, s_.least_g, static_cast<double>(s_.w[j]), static_cast<double>(g[j]));
    });
    double sums[7] = {x.lost, x.kept, x.size, y.lost, y.kept, y.size, count};
    team_.sum(sums);
    *mean_f = SoftSums{sums[0], sums[1], sums[2]}.mean(s_.x, unit, s_.least_f, s_.mass_x);
    *mean_g = SoftSums{sums[3], sums[4], sums[5]}.mean(s_.y, 1, s_.least_g, s_.mass_y);
    return sums[6];
  }

  // gt and q of the evaluated point from the column sums of all blocks, and its scalars.
  OTLOSS_DEVICE void update_columns() {
    if (s_.soft)
      find_least(s_.F, s_.trial_g);  // after a pass its reduction is the barrier, too
    else
      team_.sync();
    costs_.columns();
    s_.soft ? soft_scalars() : hard_scalars();
  }

  // Sums: marginal error, dual value, its absolute size, <b, gt - g>, columns not to be trusted;
  // and, of d = b (1 - q), what is lacking and <d, g>.
  OTLOSS_DEVICE void hard_scalars() {
    double sums[7];
#pragma unroll 1
    for (bool guarded = false;; guarded = true) {
      for (double& sum : sums) sum = 0;
      team_.for_columns([&](int j) {
        const double b = static_cast<double>(s_.w[j]), q = static_cast<double>(s_.q[j]);
        const double g = static_cast<double>(s_.trial_g[j]);
        sums[0] += b * (q < 1 ? 1 - q : q - 1);
        sums[1] += b * g;
        sums[2] += b * (g < 0 ? -g : g);
        sums[3] += b * (static_cast<double>(s_.trial_gt[j]) - g);
        sums[4] += q < 0 ? 1 : 0;
        sums[5] += q < 1 ? b * (1 - q) : 0;
        sums[6] += b * (1 - q) * g;
      });
      team_.for_rows([&](int i) {
        const double f = (s_.eps / kLog2E) * static_cast<double>(s_.F[i]);
        const double term = static_cast<double>(s_.a[i]) * f;
        sums[1] += term;
        sums[2] += term < 0 ? -term : term;
      });
      team_.sum(sums);
      if (guarded || !(sums[4] > 0)) break;
      costs_.guard();
    }
    // What is lacking could go as far as two points are apart; rounding may make four units of it
    // out of nothing. Costs that are given may be negative.
    const double lacking = sums[5] - 4 * roundoff<T>() * s_.mass_y;
    const double range = (s_.group->points.zx ? 1 : 2) * s_.max_cost;
    team_.one([&] {
      measure(sums[1], 4 * roundoff<T>() * sums[2], sums[0], sums[3]);
      s_.trial.bound = (lacking > 0 ? lacking : 0.0) * range - sums[6];
    });
  }

  // Where a side is soft the point is moved to its best translation first (see Translation), but
  // not in iterations of a fixed number.
  OTLOSS_NOINLINE void soft_scalars() {
    SoftMean f, g;
    double untrusted = 0;
    team_.for_columns([&](int j) { untrusted += s_.q[j] < T(0) ? 1 : 0; });
    if (soft_means(s_.F, s_.damping * s_.eps / kLog2E, s_.trial_g, &f, &g, untrusted) > 0)
      costs_.guard();
    Translation best(s_.x, s_.y, s_.mass_x, s_.mass_y, s_.eps, roundoff<T>(), f, g);
    if (s_.phase == Phase::kFixed) best.t = 0, best.mean_g = g.mean;
    const TargetMarginal<T> target(s_.y, s_.eps, -kLog2E * s_.x.rate * s_.damping * best.t,
                                   best.mean_g);
    const T on_F = static_cast<T>(best.t * kLog2E / s_.eps), on_g = static_cast<T>(best.t);
    const T on_gt = static_cast<T>(s_.damping * best.t);
    const T damp = static_cast<T>(s_.y.damping(s_.eps));
    team_.for_rows([&](int i) {
      if (s_.a[i] > T(0)) s_.F[i] += on_F;
    });
    double sums[2] = {0, 0};  // marginal error, <target, gt - g>
    team_.for_columns([&](int j) {
      s_.target[j] = T(0);
      if (!(s_.w[j] > T(0))) return;
      const T v = s_.trial_g[j] -= on_g, next = s_.trial_gt[j] - on_gt;
      s_.target[j] = target.of(s_.w[j], v);
      s_.q[j] = target.ratio(s_.q[j], v, next);
      s_.trial_gt[j] = damp * next;
      const double w = static_cast<double>(s_.target[j]), off = static_cast<double>(s_.q[j]) - 1;
      sums[0] += w * (off < 0 ? -off : off);
      sums[1] += w * static_cast<double>(s_.trial_gt[j] - v);
    });
    team_.sum(sums);
    team_.one([&] { measure(best.value, best.noise, sums[0], sums[1]); });
  }

  // The scalars of the evaluated point, from sums over the columns; by one thread.
  OTLOSS_DEVICE void measure(double value, double noise, double off, double moved) {
    const double sums = costs_.rounding();
    s_.trial = Scalars(value, noise + sums * s_.eps * s_.mass_y,
                       off / s_.mass_y + costs_.left_out(), moved / s_.mass_y);
    s_.trial.sums = sums;
  }

  // A cloud against itself, see SymmetricRule: function(i, f_i) for the block's rows, by who has
  // column i of its own. Rows and columns are cut alike, and f stands in g.
  template <typename F>
  OTLOSS_DEVICE void for_own(F&& function) {
    T* const f = s_.g + team_.first_column();
    team_.for_rows([&](int i) { function(i, f[i]); });
  }

  OTLOSS_DEVICE void observe_symmetric() {
    SoftMean mean{0, 0};
    if (s_.soft) {
      SoftMean same;
      block_.sync();
      find_least(s_.g + team_.first_column(), s_.g);
      soft_means(s_.g + team_.first_column(), 1, s_.g, &same, &mean);
    }
    const TargetMarginal<T> target(s_.x, s_.eps, 0, mean.mean);
    double sums[2] = {0, 0};  // marginal error, size of f
    for_own([&](int i, T& f) {
      const T a = s_.a[i];
      if (!(a > T(0))) return;
      const T w = s_.soft ? target.of(a, f) : a;
      const T q = s_.soft ? target.ratio(s_.s[i], f, s_.to_cost * s_.F[i]) : s_.s[i];
      const double off = static_cast<double>(q) - 1;
      sums[0] += static_cast<double>(w) * (off < 0 ? -off : off);
      sums[1] += static_cast<double>(w) * static_cast<double>(f < T(0) ? -f : f);
    });
    team_.sum(sums);
    team_.one([&] {
      s_.control.observe({0, 8 * roundoff<T>() * sums[1], sums[0] / s_.mass_x + costs_.left_out(),
                          costs_.rounding()});
    });
  }

  // Standard deviation of C_ij - mean_i - mean_j + mean over the samples of positive weight, a part
  // of them for each block.
  OTLOSS_NOINLINE double sigma() {
    constexpr int kWarps = Team::kWarps;
    const int64_t n = s_.group->n, m = s_.group->m;
    const int r = sample_size(n), c = sample_size(m);
    const int lane = block_.thread() % kWarp, warp = block_.thread() / kWarp;
    const int rank = team_.rank(), size = team_.size();
    const auto row = [&](int i) { return sample(i, n); };
    const auto column = [&](int j) { return sample(j, m); };
    double sums[6] = {};  // of C, C^2, squares of row sums, of column sums; rows, columns
    for (int i = rank * kWarps + warp; i < r; i += size * kWarps) {
      if (!(s_.weights[row(i)] > T(0))) continue;
      double sum = 0, squares = 0;
      for (int j = lane; j < c; j += kWarp) {
        if (!(s_.b[column(j)] > T(0))) continue;
        const double value = static_cast<double>(costs_.entry(i, j));
        sum += value, squares += value * value;
      }
      sum = warp_join<Sum>(block_, sum), squares = warp_join<Sum>(block_, squares);
      if (lane != 0) continue;
      sums[0] += sum, sums[1] += squares, sums[2] += sum * sum, sums[4] += 1;
    }
    for (int j = rank * Team::kThreads + block_.thread(); j < c; j += size * Team::kThreads) {
      if (!(s_.b[column(j)] > T(0))) continue;
      double sum = 0;
      for (int i = 0; i < r; ++i)
        if (s_.weights[row(i)] > T(0)) sum += static_cast<double>(costs_.entry(i, j));
      sums[3] += sum * sum, sums[5] += 1;
    }
    team_.sum(sums);
    const double rows = sums[4], columns = sums[5], mean = sums[0] / (rows * columns);
    if (rows < 2 || columns < 2) return 0;
    const double variance = sums[1] / (rows * columns) - sums[2] / (rows * columns * columns) -
                            sums[3] / (columns * rows * rows) + mean * mean;
    return variance > 0 ? sqrt(variance) : 0;
  }

  Block& block_;
  const SolveArguments<T>& args_;
  Team& team_;
  Costs costs_;
  SolverState<T>& s_;
};

}  // namespace otloss::cuda
