// The quasi-Newton step of a solve whose vectors are cut by columns: a thread touches its own
// entries, but in the inner products, where a warp goes through those of its block. All products
// that a step needs are made at once and cost one barrier of the team; the two-loop recursion then
// runs on them (LbfgsGram), by one warp whose lanes have a vector each.
#pragma once

#include "cuda/solve/state.cuh"

namespace otloss::cuda {

template <typename T, class Block, class Team>
class QuasiNewton {
 public:
  OTLOSS_DEVICE QuasiNewton(Block& block, Team& team, SolverState<T>& state, int64_t vector_length)
      : block_(block), team_(team), s_(state), length_(vector_length) {}

  // Makes the trial point the point: its residual and, after a step that was taken, the new pair;
  // all inner products that the next step needs, and that step.
  OTLOSS_NOINLINE void move() {
    const bool paired = s_.next == Next::kStep;
    const int slot = s_.step.slot;
    const T middle = static_cast<T>(s_.trial.mean);
    T* const step = vector(slot);
    T* const change = vector(LbfgsGram::change(slot));
    const T *w = s_.w, *trial_g = s_.trial_g, *trial_gt = s_.trial_gt, *g = s_.g, *q = s_.q;
    T *const residual = s_.r, *const gradient = s_.p;
    team_.for_columns([&](int j) {
      const bool counts = w[j] > T(0);
      const T r = counts ? trial_gt[j] - trial_g[j] - middle : T(0);
      if (paired) {
        step[j] = counts ? trial_g[j] - g[j] : T(0);
        change[j] = residual[j] - r;
      }
      residual[j] = r;
      gradient[j] = T(1) - q[j];
    });
    make_products(paired, slot);
    if (block_.thread() == 0) {
      s_.swap_points();
      learn(paired, slot);
    }
    block_.sync();
    if (block_.thread() < kWarp) {
      find_direction();
      measure();
    }
    block_.sync();
  }

  // p from the step that move() made; points of next to no mass move along the residual.
  OTLOSS_NOINLINE void set_direction() {
    T* const p = s_.p;
    const T *target = s_.target, *r = s_.r;
    team_.for_columns([&](int j) {
      T sum = T(0);
      for (int v = 0; v < kBasis; ++v)
        if (s_.step.on[v] != 0) sum += static_cast<T>(s_.step.on[v]) * vector(v)[j];
      p[j] = has_mass(static_cast<double>(target[j]), s_.mass_y) ? sum : r[j];
    });
  }

 private:
  static constexpr int kWarps = Team::kWarps, kBasis = LbfgsGram::kBasis;

  // The vectors that LbfgsGram numbers. p holds the gradient over the weights until the direction
  // takes its place.
  OTLOSS_DEVICE T* vector(int number) const {
    if (number == LbfgsGram::kResidual) return s_.r;
    if (number == LbfgsGram::kGradient) return s_.p;
    return s_.pairs + number * length_;
  }

  // Inner products weighted by the target column sums: those of the new pair, the residual and
  // the gradient with all vectors; where the weights are new, all. A warp for each.
  OTLOSS_DEVICE void make_products(bool paired, int slot) {
    const unsigned used = s_.gram.in_use() | (paired ? LbfgsGram::bits_of(slot) : 0u);
    unsigned fresh = s_.soft ? used : 1u << LbfgsGram::kResidual;
    if (paired) fresh |= LbfgsGram::bits_of(slot);
    fresh |= 1u << LbfgsGram::kGradient;
    const bool alone = team_.size() == 1, first_lane = block_.thread() % kWarp == 0;
    block_.sync();  // the vectors are there
    for_products(used, fresh, [&](int left, int right) {
      const T *u = vector(left), *v = vector(right), *target = s_.target;
      const int begin = team_.first_column(), end = begin + team_.columns();
      const int first = begin + block_.thread() % kWarp;
      double sum = join_over<Sum>(first, kWarp, end, 0.0, [&](int j) {
        return static_cast<double>(target[j]) * static_cast<double>(u[j]) *
               static_cast<double>(v[j]);
      });
      sum = warp_join<Sum>(block_, sum);
      if (!first_lane) return;
      if (alone)
        s_.gram.set(left, right, sum);
      else
        team_.show(left * kBasis + right, sum);
    });
    if (!alone) {
      team_.sync();
      for_products(used, fresh, [&](int left, int right) {
        const double sum = team_.total(left * kBasis + right);
        if (first_lane) s_.gram.set(left, right, sum);
      });
    }
    block_.sync();
    if (!alone) team_.flip();
  }

  // Calls function(left, right) for the products of this warp, each once.
  template <typename F>
  OTLOSS_DEVICE void for_products(unsigned used, unsigned fresh, F&& function) const {
    int number = 0;
#pragma unroll 1
    for (int left = 0; left < LbfgsGram::kVectors; ++left) {
      if ((fresh >> left & 1u) == 0) continue;
#pragma unroll 1
      for (int right = 0; right < kBasis; ++right) {
        if ((used >> right & 1u) == 0) continue;
        if (right > left && (fresh >> right & 1u) != 0) continue;
        if (number++ % kWarps == block_.thread() / kWarp) function(left, right);
      }
    }
  }

  // What the last step tells, by one thread: how long the next may be, and the pair.
  OTLOSS_DEVICE void learn(bool paired, int slot) {
    Step& step = s_.step;
    LbfgsGram& gram = s_.gram;
    const double residual = gram.product[LbfgsGram::kResidual][LbfgsGram::kResidual];
    if (paired) {
      const int change = LbfgsGram::change(slot);
      const double changed = gram.product[change][change];
      // In the weights of the new point: the residual before was r + y.
      const double before = residual + 2 * gram.product[LbfgsGram::kResidual][change] + changed;
      const double noise = s_.control.point().noise;
      const double least = least_change(noise, s_.mass_y, roundoff<T>(), s_.eps);
      step.length.accepted(gram.product[slot][slot], changed, before, least);
      if (s_.soft) gram.sift();
      if (changed > least) gram.keep(slot);
    } else {
      gram.count = 0;
      if (s_.next == Next::kPlain)
        step.length.plain(step.residual);
      else
        step.length = StepLength();
    }
    step.residual = residual;
    step.slot = gram.free_slot();
  }

  // The two-loop recursion, by one warp: lane v has the factor of vector v.
  OTLOSS_DEVICE void find_direction() {
    const LbfgsGram& gram = s_.gram;
    const int lane = block_.thread() % kWarp, count = gram.count;
    const auto along = [&](double factor, int number) {
      // Products with vectors that are not in use are whatever is there.
      const double term = factor != 0 ? factor * gram.product[number][lane] : 0.0;
      return warp_join<Sum>(block_, term);
    };
    const auto change = [&](int i) { return LbfgsGram::change(gram.order[i]); };
    // Lane i: 1 / <s_i, y_i>.
    const double inverse = lane < count ? 1 / gram.product[gram.order[lane]][change(lane)] : 0.0;
    double on = lane == LbfgsGram::kResidual ? 1.0 : 0.0;
    double own = 0;  // lane i: the factor alpha_i
    for (int i = count - 1; i >= 0; --i) {
      const double alpha = along(on, gram.order[i]) * block_.shuffle(inverse, i);
      if (lane == change(i)) on -= alpha;
      if (lane == i) own = alpha;
    }
    if (count > 0) {
      const int newest = count - 1, y = change(newest);
      on *= gram.product[gram.order[newest]][y] / gram.product[y][y];
    }
    for (int i = 0; i < count; ++i) {
      const double beta = along(on, change(i)) * block_.shuffle(inverse, i);
      const double alpha = block_.shuffle(own, i);
      if (lane == gram.order[i]) on += alpha - beta;
    }
    if (lane < kBasis) s_.step.on[lane] = on;
    block_.warp_sync();
  }

  // Slope along the direction and its length, by one warp; a direction that descends is replaced by
  // the residual.
  OTLOSS_DEVICE void measure() {
    const int lane = block_.thread() % kWarp;
    Step& step = s_.step;
    const LbfgsGram& gram = s_.gram;
    double slope = 0, squared = 0;
    if (lane < kBasis && step.on[lane] != 0) {
      for (int v = 0; v < kBasis; ++v)
        if (step.on[v] != 0) squared += step.on[v] * gram.product[lane][v];
      squared *= step.on[lane];
      slope = step.on[lane] * gram.product[LbfgsGram::kGradient][lane];
    }
    slope = warp_join<Sum>(block_, slope);
    squared = warp_join<Sum>(block_, squared);
    if (lane != 0) return;
    if (!(slope > 0)) {
      s_.gram.count = 0;
      for (int v = 0; v < kBasis; ++v) step.on[v] = v == LbfgsGram::kResidual ? 1 : 0;
      slope = gram.product[LbfgsGram::kGradient][LbfgsGram::kResidual];
      squared = step.residual;
    }
    step.slope = slope;
    step.first = step.length.first(squared);
  }

  Block& block_;
  Team& team_;
  SolverState<T>& s_;
  const int64_t length_;
};

}  // namespace otloss::cuda
