// A solve by launches (launched.cu): sweeps over the rows and then over the columns in place of the
// pass over a tile, and between them a block for each problem, which takes the sums, updates the
// potentials and says which sums it needs next.
//
// As in the resident pass no maximum is subtracted. Points whose sums leave the trusted range get
// their maximum from a second sweep and their sum from a third.
#pragma once

#include "cuda/pass/pack.cuh"
#include "cuda/pass/sweeps.cuh"
#include "cuda/solve/state.cuh"

namespace otloss::cuda {

// Whether the sums that were made complete the pass: F is exact for G, s has the row sums before,
// gt and q the column sums over b, of the plan of F, damped where rows are. Else others are asked
// for.
template <typename T, class Costs>
OTLOSS_DEVICE bool completes_pass(Costs& costs, SolverState<T>& s, typename Costs::Team& team) {
  if (s.work == FarWork::kProof) return costs.proven();
  if (s.work == FarWork::kJoin) return true;
  const int side = costs.order().side;
  if (!costs.update(side)) return false;
  T* const U = costs.potentials(1);
  if (side == 1) team.for_columns([&](int j) { s.trial_gt[j] = s.to_cost * U[j]; });
  if (side == 1 || s.symmetric || s.work == FarWork::kGroup) return true;
  costs.rows_are_exact();
  const T k = s.k;
  team.for_columns([&](int j) { U[j] = k * s.trial_g[j]; });
  return costs.ask(1, RowSum::kPlan), false;
}

// A turn of a solve whose sums are made by launches, here and in ../multiscale. True: done. Costs
// has order(), what was asked for last; ask(side, what), the sums of a side (0: rows) at its
// potentials(side); update(side), whether they suffice for exact ones; rows_are_exact(), before the
// columns; and for a proof ask_proof() and proven(), whether its sums are there.
template <typename T, class Costs, class Solver>
OTLOSS_DEVICE bool launched_turn(Costs& costs, Solver& solver, SolverState<T>& s,
                                 typename Costs::Team& team, const SolveGroup<T>& p, int64_t batch,
                                 bool first) {
  const bool of_value = !first && s.work == FarWork::kNone && costs.order().what == RowSum::kCost;
  team.one([&] { s.group = &p; });  // another address in every launch
  if (!of_value) {
    if (!first && !completes_pass(costs, s, team)) return false;
    if (first ? solver.open(p, batch) : solver.turn()) {
      if (s.work == FarWork::kProof)
        costs.ask_proof();
      else if (s.work == FarWork::kJoin)
        costs.join(solver.large_entries());
      else
        costs.ask(0, RowSum::kPlan);
      return false;
    }
    solver.write_potentials();
    if (solver.is_transport()) {
      solver.publish_result();
      return costs.ask(0, RowSum::kCost), false;
    }
  }
  solver.write_status();
  return true;
}

template <typename T>
struct LaunchedArguments {
  SolveArguments<T> solve;
  Sweeps<T> orders;
  PackedPair<T> points[kMaxGroups];  // of the groups
  const T* samples;                  // (problems, kSample, kSample) costs
  T* largest;                        // (problems, vector_length) of rows, if costs are stored
  T* vectors;                        // (problems, kLaunchedVectors, vector_length)
};

constexpr int kLaunchedVectors = 6;

// What the sums are that a sweep makes of a side.
enum class Sums { kFirst, kLargest, kAgain };

template <typename T>
struct LaunchedState {
  T* A;      // (n,) F + log2 a, damped
  T* U;      // (m,) k g, then k gt
  T* guess;  // the potentials of a sweep
  Sums sums;
};

template <typename T, class Block>
class LaunchedCosts {
 public:
  using Team = ControlTeam<Block>;

  OTLOSS_DEVICE LaunchedCosts(Block& block, const LaunchedArguments<T>& arguments, Team& team,
                              SolverState<T>& state, LaunchedState<T>& launched)
      : block_(block), args_(arguments), team_(team), s_(state), state_(launched) {}

  // By one thread.
  OTLOSS_DEVICE void place(const SolveGroup<T>& p, int64_t batch) {
    const int64_t length = args_.solve.vector_length;
    T* vectors = args_.vectors + team_.index() * kLaunchedVectors * length;
    for (T** const v : {&s_.F, &s_.a, &s_.s, &state_.A, &state_.U, &state_.guess})
      *v = vectors, vectors += length;
    const PackedPair<T>& points = args_.points[&p - args_.solve.groups.items];
    args_.orders.place(team_.index(), points.tiles(batch, p.n, p.m, p.symmetric, T(0)), state_.A,
                       s_.G);
  }

  // max |C|, or a bound of it from the largest norms, in the first place; 1 in the second if one is
  // not finite. Also fills what is read of the vectors beyond their ends.
  OTLOSS_DEVICE void load(double (&largest)[2]) {
    double norms[3] = {0, 0, 0};
    const auto look = [&](T weight, T norm, double& most) {
      if (!(weight > T(0))) return;
      if (!(norm <= std::numeric_limits<T>::max())) norms[2] = 1;
      most = Max::join(most, static_cast<double>(norm));
    };
    const bool stored = args_.largest != nullptr;
    const T* const of_rows = args_.largest + team_.index() * args_.solve.vector_length;
    const T *const x = order().tiles.rows.norm, *const y = order().tiles.columns.norm;
    team_.for_rows([&](int i) { look(s_.a[i], stored ? of_rows[i] : x[i], norms[0]); });
    if (!stored) team_.for_columns([&](int j) { look(s_.b[j], y[j], norms[1]); });
    order().pad(block_);
    team_.template reduce<Max>(norms);
    const CostKind kind = args_.points[s_.group - args_.solve.groups.items].kind;
    if (block_.thread() == 0) {
      const double k = kLog2E / args_.solve.options.eps;
      order().tiles.repair = sizeof(T) > 4 || needs_repair(kind, k, norms[0], norms[1]);
    }
    largest[0] = stored ? norms[0] : cost_bound(kind, norms[0], norms[1]);
    largest[1] = norms[2];
  }

  // Sums of rows over what columns have too much, of the point; then, see complete(), of costs
  // times what they lack: what sent_and_far() takes.
  OTLOSS_DEVICE void ask_proof() {
    team_.for_columns([&](int j) {
      const T w = s_.w[j], q = s_.q[j];
      s_.G[j] = s_.k * s_.g[j] + log2_weight(w > T(0) && q > T(1) ? w - w / q : T(0));
      state_.U[j] = w > T(0) && q < T(1) ? w * (T(1) - q) : T(0);
    });
    ask(0, RowSum::kPlan);
  }

  // Asks for the components of the plan of the published G.
  static constexpr bool kJoins = true;
  OTLOSS_DEVICE void join(const LargeEntries<T>& large) {
    team_.for_columns([&](int j) { state_.U[j] = s_.w[j] * s_.q[j]; });
    team_.one([&] {
      order().ask(0, RowSum::kJoin, state_.U, s_.F);
      order().large = large, order().weights = s_.a, order().tiles.k = s_.k;
    });
  }

  // See FarMass::gap.
  OTLOSS_DEVICE double sent_and_far(double lacking) const {
    double result = 0;
    team_.for_rows([&](int i) {
      const double sum = static_cast<double>(state_.guess[i]);
      const double far = joined(RowSum::kCost, i) / lacking;
      result += sent(static_cast<double>(s_.a[i]), sum, far - f_of(s_, i), s_.eps);
    });
    return result;
  }

  // The next sweep: sums of a side (0: rows) at its potentials.
  OTLOSS_DEVICE void ask(int side, RowSum what) {
    team_.for_side(side, [&](int i) { state_.guess[i] = potentials(side)[i]; });
    ask(side, what, Sums::kFirst);
  }

  OTLOSS_DEVICE bool proven() {
    if (order().what == RowSum::kCost) return true;
    team_.for_rows([&](int i) {
      state_.guess[i] = static_cast<T>(joined(RowSum::kPlan, i)), state_.A[i] = T(0);
    });
    team_.for_columns([&](int j) { s_.G[j] = T(0); });
    team_.one([&] { order().ask(0, RowSum::kCost, state_.U), order().tiles.k = T(0); });
    return false;
  }

  OTLOSS_DEVICE void rows_are_exact() {
    const T damping = static_cast<T>(s_.damping);
    team_.for_rows([&](int i) { state_.A[i] = damping * s_.F[i] + log2_weight(s_.a[i]); });
  }

  // By completes_pass().
  OTLOSS_DEVICE void columns() {}
  OTLOSS_DEVICE void guard() {}

  OTLOSS_DEVICE double left_out() const { return 0; }
  OTLOSS_DEVICE double rounding() const { return 0; }

  // <P, C> over this thread's share, after a sweep of the rows for kCost.
  OTLOSS_DEVICE double transport() const {
    double total = 0;
    team_.for_rows(
        [&](int i) { total += static_cast<double>(s_.weights[i]) * joined(RowSum::kCost, i); });
    return total;
  }

  OTLOSS_DEVICE T entry(int i, int j) const {
    return args_.samples[(team_.index() * kSample + i) * kSample + j];
  }

  OTLOSS_DEVICE SweepOrder<T>& order() const { return args_.orders.of[team_.index()]; }
  OTLOSS_DEVICE T* potentials(int side) const { return side == 0 ? s_.F : state_.U; }

  // Exact potentials from the guess, F_i -= log2 sum_j exp2(F_i + G_j - k C_ij), and those sums, s.
  // Points of weight 0 get F = 0, s = 1. False: other sums are needed first.
  OTLOSS_DEVICE bool update(int side) {
    const T* const weight = side == 0 ? s_.weights : s_.b;
    T* const s = side == 0 ? s_.s : s_.q;
    const auto untrusted = [&](int i) { return weight[i] > T(0) && !trusted(s[i]); };
    if (state_.sums == Sums::kFirst) {
      double again[1] = {0};
      team_.for_side(side, [&](int i) {
        s[i] = static_cast<T>(joined(RowSum::kPlan, i));
        if (untrusted(i)) again[0] = 1;
      });
      team_.template reduce<Max>(again);
      if (again[0] > 0) return ask(side, RowSum::kLargest, Sums::kLargest), false;
    } else if (state_.sums == Sums::kLargest) {
      team_.for_side(side, [&](int i) {
        if (untrusted(i)) state_.guess[i] -= static_cast<T>(joined(RowSum::kLargest, i));
      });
      return ask(side, RowSum::kPlan, Sums::kAgain), false;
    }
    team_.for_side(side, [&](int i) {
      T& F = potentials(side)[i];
      if (!(weight[i] > T(0))) {
        F = T(0), s[i] = T(1);
      } else if (trusted(s[i])) {
        F -= fast_log2(s[i]);
      } else {
        const T before = F, limit = static_cast<T>(kExp2Limit);
        F = state_.guess[i] - fast_log2(static_cast<T>(joined(RowSum::kPlan, i)));
        const T t = before - F;
        s[i] = fast_exp2(t < limit ? t : limit);
      }
    });
    return true;
  }

 private:
  OTLOSS_DEVICE void ask(int side, RowSum what, Sums sums) {
    team_.one([&] {
      state_.sums = sums;
      order().ask(side, what, nullptr, state_.guess);
      order().tiles.k = s_.k;
    });
  }

  OTLOSS_DEVICE double joined(RowSum what, int i) const {
    return args_.orders.sum(team_.index(), i, what);
  }

  Block& block_;
  const LaunchedArguments<T>& args_;
  Team& team_;
  SolverState<T>& s_;
  LaunchedState<T>& state_;
};

// Queues a sweep of all problems, see solve_sweeps.cu; tiles: who makes their costs.
template <typename T>
void queue_solve_sweep(Queue& queue, const Sweeps<T>& sweeps, const PackedPair<T>& points,
                       TileKind tiles);

}  // namespace otloss::cuda
