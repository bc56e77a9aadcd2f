// A solve between two clouds in few dimensions, of the pairs of leaves that hold something of the
// plan: sums.cuh makes the sums, and a control after each takes them and says which are next, as in
// launched.cu. Potentials are in double.
#pragma once

#include "cuda/multiscale/sums.cuh"
#include "cuda/solve/launched_costs.cuh"
#include "cuda/solve/solver.cuh"

namespace otloss::cuda::multiscale {

struct ListedArguments {
  SolveArguments<double> solve;
  ListedProblem problem;
  double* vectors;  // (kListedVectors, vector_length)
  float* log_w;     // (vector_length,)
  bool exact;       // all sums are over all pairs, in double
  double left_out;  // bound of the part of the plan that sums of a side may leave out
  int64_t* passes;  // of the finest level's stages before, in and out, or null
  bool last;        // stage
};

constexpr int kListedVectors = 5;

struct ListedState {
  double* U;      // (m,) k g, then k gt
  double* guess;  // the potentials of a sum
  float threshold;
  int attempts;        // of better guesses
  double left_out[2];  // of the last sums of either side, over the total mass
  double rounding;     // of the last sums
};

template <int kD, class Block>
class ListedCosts {
 public:
  using Team = ControlTeam<Block>;

  OTLOSS_DEVICE ListedCosts(Block& block, const ListedArguments& arguments, Team& team,
                            SolverState<double>& state, ListedState& listed)
      : block_(block), args_(arguments), team_(team), s_(state), state_(listed) {}

  // By one thread.
  OTLOSS_DEVICE void place(const SolveGroup<double>&, int64_t) {
    if (args_.passes) {
      s_.max_iters -= *args_.passes;
      if (!args_.last) s_.max_iters = stage_passes(s_.max_iters);
    }
    double* vectors = args_.vectors;
    for (double** const v : {&s_.F, &s_.a, &s_.s, &state_.U, &state_.guess})
      *v = vectors, vectors += args_.solve.vector_length;
    state_.threshold = static_cast<float>(fast_log2(kFirst * args_.left_out));
    state_.left_out[0] = state_.left_out[1] = state_.rounding = 0;
  }

  // The largest squared distance, at most; 1 in the second place if a coordinate is not finite.
  OTLOSS_DEVICE void load(double (&largest)[2]) {
    constexpr double kMost = std::numeric_limits<double>::max();
#pragma unroll 1
    for (int c = 0; c < kD; ++c) {
      double ends[3] = {-kMost, -kMost, 0};
      for (const ListedSide& side : args_.problem.sides) {
        const Nodes& leaf = side.cloud.leaf;
        for (int64_t I = block_.thread(); I < side.cloud.leaves(); I += kControlThreads) {
          if (!(leaf.mass[I] > 0)) continue;
          const double at = leaf.at[c * leaf.stride + I];
          const double half = static_cast<double>(leaf.half[c * leaf.stride + I]);
          ends[0] = Max::join(ends[0], half - at), ends[1] = Max::join(ends[1], half + at);
          if (!(half <= kMost)) ends[2] = 1;
        }
      }
      team_.template reduce<Max>(ends);
      const double extent = ends[0] + ends[1];
      largest[0] += extent * extent, largest[1] = Max::join(largest[1], ends[2]);
    }
  }

  static constexpr bool kJoins = false;
  OTLOSS_DEVICE void join(const LargeEntries<double>&) {}

  // The next sums, of a side (0: rows) at its potentials.
  OTLOSS_DEVICE void ask(int side, RowSum what) {
    team_.for_side(side, [&](int i) { state_.guess[i] = potentials(side)[i]; });
    block_.sync();  // nobody reads the order before any more
    if (block_.thread() != 0) return;
    ListedOrder& order = *args_.problem.order;
    state_.attempts = 0;
    order.what = what, order.side = side, order.some = false, order.exact = args_.exact;
    order.k = kLog2E / s_.eps;
    order.threshold = state_.threshold;
    order.single = static_cast<float>(args_.left_out / (8 * kTermRounding));
    order.of[side] = {state_.guess, 1};
    order.log_w = nullptr;
    order.of[1 - side] = side == 0 ? Potential{s_.evaluated, order.k} : Potential{s_.F, s_.damping};
  }

  // The sums over what columns have too much, of the point.
  OTLOSS_DEVICE void ask_proof() {
    const int padded = static_cast<int>(ceil_div(team_.m(), kLeaf)) * kLeaf;
    for (int j = block_.thread(); j < padded; j += kControlThreads) {
      const double w = j < team_.m() ? s_.w[j] : 0.0, excess = w > 0 ? w - w / s_.q[j] : 0.0;
      args_.log_w[j] = excess > 0 ? static_cast<float>(fast_log2(excess)) : kNone;
    }
    ask(0, RowSum::kPlan);
    if (block_.thread() == 0) order().log_w = args_.log_w, order().exact = false;
  }

  // Of rows, u_i what they send there: u_i (mean cost to what columns lack - f_i) + eps u_i log(u_i
  // / a_i). Costs from moments; lacking: the total.
  OTLOSS_DEVICE double sent_and_far(double lacking) {
    const Cloud &x = args_.problem.sides[0].cloud, &y = args_.problem.sides[1].cloud;
    const auto lacks = [&](int j) { return s_.q[j] < 1 ? s_.w[j] * (1 - s_.q[j]) / lacking : 0.0; };
    double mean[kD], square[1] = {0}, result = 0;
#pragma unroll 1
    for (int c = 0; c < kD; ++c) {
      double sum[1] = {0};
      team_.for_columns([&](int j) { sum[0] += lacks(j) * y.X[offset<kD>(j, c)]; });
      team_.sum(sum);
      mean[c] = sum[0];
      team_.for_columns([&](int j) {
        const double delta = y.X[offset<kD>(j, c)] - sum[0];
        square[0] += lacks(j) * delta * delta;
      });
    }
    team_.sum(square);
    team_.for_rows([&](int i) {
      double far = square[0];
      for (int c = 0; c < kD; ++c) {
        const double delta = x.X[offset<kD>(i, c)] - mean[c];
        far += delta * delta;
      }
      result += sent(s_.a[i], args_.problem.sides[0].sum[i], far - f_of(s_, i), s_.eps);
    });
    return result;
  }

  // By completes_pass().
  OTLOSS_DEVICE void columns() {}
  OTLOSS_DEVICE void guard() {}
  OTLOSS_DEVICE bool proven() const { return true; }
  OTLOSS_DEVICE void rows_are_exact() {}

  OTLOSS_DEVICE double left_out() const { return state_.left_out[0] + state_.left_out[1]; }
  OTLOSS_DEVICE double rounding() const { return state_.rounding; }

  // Only regularized values are asked for.
  OTLOSS_DEVICE double transport() const { return 0; }

  OTLOSS_DEVICE double entry(int i, int j) const {
    const Cloud &x = args_.problem.sides[0].cloud, &y = args_.problem.sides[1].cloud;
    const int64_t row = sample(i, x.n), column = sample(j, y.n);
    double square = 0;
    for (int c = 0; c < kD; ++c) {
      const double delta = x.X[offset<kD>(row, c)] - y.X[offset<kD>(column, c)];
      square += delta * delta;
    }
    return square;
  }

  OTLOSS_DEVICE ListedOrder& order() const { return *args_.problem.order; }
  OTLOSS_DEVICE double* potentials(int side) const { return side == 0 ? s_.F : state_.U; }

  // Exact potentials from the guess, F_i -= log2 of the sum, and the sums at the potentials before,
  // s. False: other sums are needed first.
  OTLOSS_DEVICE bool update(int side) {
    const ListedSide& own = args_.problem.sides[side];
    const double* const weight = own.cloud.w;
    const bool all_exact = args_.exact;
    if (!order().exact) {
      double lost[2] = {0, 0}, found[2] = {0, 0};  // a poor guess; one whose sum tells a better one
      for (int64_t I = block_.thread(); I < own.cloud.leaves(); I += kControlThreads) {
        if (I * kLeaf >= own.cloud.n) break;
        lost[0] += own.left_out[I], lost[1] += own.rounding[I];
      }
      team_.for_side(side, [&](int i) {
        if (!poor(weight[i], own.sum[i])) return;
        found[0] = 1;
        if (tells(own.sum[i])) found[1] = 1;
      });
      team_.sum(lost);
      team_.template reduce<Max>(found);
      const double mass = side == 0 ? s_.mass_x : s_.mass_y;
      const bool first = !order().some;
      if (first && lost[0] > args_.left_out * mass && state_.threshold > kLeastLog2)
        return repeat([&](ListedOrder& again) {
          again.threshold = state_.threshold -= static_cast<float>(fast_log2(kLess));
        });
      if (block_.thread() == 0)
        state_.left_out[side] = lost[0] / mass, state_.rounding = lost[1] / mass;
      if (found[0] > 0) {
        constexpr int kAttempts = 2;
        const bool better = found[1] > 0 && state_.attempts < kAttempts;
        team_.for_side(side, [&](int i) {
          if (better && poor(weight[i], own.sum[i]) && tells(own.sum[i]))
            state_.guess[i] -= fast_log2(own.sum[i]);
        });
        return repeat([&](ListedOrder& again) {
          again.some = true, again.exact = !better, ++state_.attempts;
        });
      }
    }
    double* const s = side == 0 ? s_.s : s_.q;
    team_.for_side(side, [&](int i) {
      double& F = potentials(side)[i];
      if (!(weight[i] > 0)) {
        F = 0, s[i] = 1;
        return;
      }
      const double before = F;
      F = all_exact || poor(weight[i], own.sum[i]) ? -own.exact[i]
                                                   : state_.guess[i] - fast_log2(own.sum[i]);
      s[i] = fast_exp2(before - F);
    });
    block_.sync();
    return true;
  }

 private:
  // What one pair of leaves may hold of a row at first, over what a side may leave out: as on the
  // CPU, where both sides' sums leave out the same.
  static constexpr double kFirst = 8 * kShare;
  static constexpr float kLeastLog2 = -40;  // of kLeastThreshold

  // The same sums once more; set(order) by one thread.
  template <typename F>
  OTLOSS_DEVICE bool repeat(F&& set) {
    block_.sync();
    if (block_.thread() == 0) set(order());
    return false;
  }

  // Whether a sum that is not good tells a better guess.
  OTLOSS_DEVICE static bool tells(double sum) {
    constexpr double kSome = 1e-30, kMost = std::numeric_limits<float>::max();
    return sum > kSome && sum < kMost;
  }

  Block& block_;
  const ListedArguments& args_;
  Team& team_;
  SolverState<double>& s_;
  ListedState& state_;
};

// Solves of one problem, see run_controls.
template <int kD>
struct ListedSolve : ListedArguments {
  struct State {
    SolverState<double> solver;
    ListedState listed;
  };
  struct {
    ListedOrder* of;  // (1,)
  } orders;
  bool* doubtful;  // out

  OTLOSS_DEVICE const Pack<SolveGroup<double>>& groups() const { return solve.groups; }

  template <class Block>
  OTLOSS_DEVICE bool advance(Block& block, ControlTeam<Block>& team, State& state,
                             const SolveGroup<double>& p, int64_t batch, bool first) const {
    using Costs = ListedCosts<kD, Block>;
    Costs costs(block, *this, team, state.solver, state.listed);
    Solver<double, Block, Costs> solver(block, solve, costs, team, state.solver);
    if (first && passes && !last && stage_passes(solve.options.max_iters - *passes) == 0)
      return true;
    if (!launched_turn(costs, solver, state.solver, team, p, batch, first)) return false;
    if (block.thread() != 0) return true;
    *doubtful = state.solver.doubtful;
    if (passes)
      p.status[kStatusIterations] = static_cast<double>(*passes += state.solver.control.passes());
    return true;
  }
};

}  // namespace otloss::cuda::multiscale
