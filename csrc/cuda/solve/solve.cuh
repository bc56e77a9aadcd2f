// The whole solve of a dense problem in one kernel: passes over C, column sums, quasi-Newton steps,
// the stopping test.
//
// A team of blocks has one problem; block `rank` has a contiguous part of the rows, whose part of C
// (its tile) it keeps in shared memory (resident) or reads from global memory in every pass
// (dense), and the same share of the columns' vectors.
//
// One pass is the one-exponential sweep of csrc/cpu/simd/sweep.cpp. A row team (1 to all warps of a
// block) takes kRows rows at once; lane l of its warp w has the columns
//     j = v * 32 W + 32 w + l,  v < kColumns      (W warps in the row team)
// so that kRows * kColumns entries e_ij = exp2(F_i + G_j - k C_ij) stand in registers while the row
// sums are made (a few shuffles, one exchange through shared memory) and are used a second time for
// the column sums, which stay in registers for the whole pass. Problems with more columns than that
// use two sweeps and two exponentials.
//
// After a pass: column sums are joined over row teams (shared memory) and blocks (global memory),
// each block makes its columns' update, and the scalars of the step (error, dual value) are one
// team reduction, after which every thread takes the same decision. Soft marginals take two more:
// the least potentials, so that no exponential overflows, and the soft means. Vectors of the solver
// are cut by columns: a thread only ever touches its own entries, except G, which everybody reads,
// and in the inner products, where a warp goes through those of its block.
//
// The solver is that of csrc/cpu/solve/solver.h as a state machine, so that there is one place that
// passes over C: each turn evaluates one point and decides which is next.
#pragma once

#include <algorithm>
#include <limits>

#include "core/lbfgs.h"
#include "core/math.h"
#include "core/penalty.h"
#include "core/rounding.h"
#include "core/step_control.h"
#include "cuda/device/block.cuh"
#include "cuda/device/reduce.cuh"
#include "cuda/device/team.cuh"
#include "cuda/pass/pack.cuh"
#include "cuda/pass/streamed.cuh"
#include "cuda/solve/plan.h"
#include "cuda/solve/start.h"

namespace otloss::cuda {

// Row sums outside [1 / kTrustedRow, kTrustedRow] are made again with the maximum subtracted. This
// is narrower than `trusted`, so that a row's share of clamped exponentials has a known bound: a
// column sum under kLeastColumn times the mass may owe digits to them and is made again, too.
constexpr double kTrustedRow = 1048576.0;  // 2^20

template <typename T>
OTLOSS_HOST_DEVICE double least_column() {
  // kTrustedRow * 2^-kExp2Limit / machine epsilon
  return sizeof(T) == 4 ? 0x1p-83 : 0x1p-54;
}
static_assert(kExp2Limit == 126.0 && kTrustedRow == 0x1p20, "least_column is derived from these");

template <typename T>
struct SolveArguments {
  Pack<SolveGroup<T>> groups;
  SolveOptions options;
  SharedLayout shared;
  Barrier barrier;
  int team_size;                     // blocks per problem
  TileKind tiles;                    // streamed
  int parts[2];                      // see SolvePlan, streamed
  int64_t teams;                     // team t solves problems t, t + teams, ...
  int64_t problems;                  // of all groups
  int64_t vector_length;             // at least every m, and a multiple of 32
  PackedPair<T> points[kMaxGroups];  // of the groups, streamed
  const T* starts[kMaxGroups];       // (B, m) to begin at, or null
  T* vectors;                        // (teams, kVectors, vector_length)
  T* streamed;                       // (teams, streamed_vectors, vector_length)
  T* column_parts;                   // (teams, 3, team_size, vector_length)
  double* team_parts;                // (teams, 2, team_size, kTeamValues)
  unsigned* counters;                // (teams, kCounterStride), 0
  unsigned* group_counters;          // (teams, 2, team_size, kCounterStride), 0, streamed
};

constexpr int64_t kCounterStride = 32;  // a line for each counter

// See Solver::place_streamed.
OTLOSS_HOST_DEVICE int streamed_vectors(const int (&parts)[2]) {
  return 5 + kSoftminVectors * (parts[0] > parts[1] ? parts[0] : parts[1]);
}

template <typename T, int kColumnsPerThread>
struct SolveKernel {
  static constexpr int kThreads = kSolveThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kColumns = kColumnsPerThread;
  static constexpr int kRows = kEntries<T> / kColumns;
  static_assert(kRows >= 1 && (kRows & (kRows - 1)) == 0, "scatter_reduce needs a power of two");
  static constexpr bool kStreamed = false;

  SolveArguments<T> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const;
};

// Without cost matrices.
template <typename T>
struct StreamedKernel {
  static constexpr int kThreads = kSolveThreads;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kColumns = kFewColumns;
  static constexpr int kRows = kEntries<T> / kColumns;
  static constexpr bool kStreamed = true;

  SolveArguments<T> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const;
};

template <typename T, class Kernel, class Block>
class Solver {
 public:
  OTLOSS_DEVICE Solver(Block& block, const SolveArguments<T>& arguments)
      : block_(block),
        args_(arguments),
        options_(arguments.options),
        thread_(block.thread()),
        lane_(block.thread() % kWarp),
        warp_(block.thread() / kWarp),
        team_index_(block.x() / arguments.team_size),
        team_(
            block,
            TeamState{arguments.barrier, static_cast<int>(block.x() % arguments.team_size),
                      arguments.team_size, 0, 0, arguments.counters + team_index_ * kCounterStride,
                      arguments.team_parts + team_index_ * 2 * arguments.team_size * kTeamValues,
                      at<double>(arguments.shared.team)}),
        sharing_rows_(block, sharing(0)),
        sharing_columns_(block, sharing(1)),
        gram_(*at<LbfgsGram>(arguments.shared.gram)),
        step_(*reinterpret_cast<Step*>(at<LbfgsGram>(arguments.shared.gram) + 1)),
        exchange_(at<T>(arguments.shared.exchange)),
        columns_(at<T>(arguments.shared.columns)),
        F_(at<T>(arguments.shared.F)),
        a_(at<T>(arguments.shared.a)),
        s_(at<T>(arguments.shared.s)) {
    if constexpr (kStreamed) place_streamed();
  }

  OTLOSS_DEVICE void run() {
    for (int64_t p = team_index_; p < args_.problems; p += args_.teams) {
      int64_t batch = p;
      int group = 0;
      while (batch >= args_.groups.items[group].batch) batch -= args_.groups.items[group++].batch;
      if constexpr (kStreamed) place_points(group, batch);
      const T* start = args_.starts[group];
      start_ = start ? start + batch * args_.groups.items[group].m : nullptr;
      solve(args_.groups.items[group], batch);
      team_.sync();  // before the next problem takes the buffers
    }
  }

 private:
  static constexpr int kThreads = Kernel::kThreads;
  static constexpr int kWarps = Kernel::kWarps;
  static constexpr int kColumns = Kernel::kColumns;
  static constexpr int kRows = Kernel::kRows;
  static constexpr int kLanes = kWarp / kRows;  // lanes that look after one row of a step
  static constexpr int kSlots = LbfgsGram::kSlots;
  static constexpr int kBasis = LbfgsGram::kBasis;
  static constexpr bool kStreamed = Kernel::kStreamed;
  // Blocks have whole pieces of so many rows and columns.
  static constexpr int kShare = kStreamed ? kTileRows : 1;

  // What is iterated: starts first, then Next says what the evaluated point is.
  enum class Phase { kFixed, kSymmetricFirst, kSymmetric, kStart, kSecondStart, kPair };

  // The scalars of one evaluated point, and <b, gt - g> over the mass.
  struct Scalars : PointScalars {
    double mean;

    OTLOSS_DEVICE Scalars(double value, double noise, double error, double mean)
        : PointScalars{value, noise, error}, mean(mean) {}
  };

  template <typename U>
  OTLOSS_DEVICE U* at(int64_t offset) const {
    return reinterpret_cast<U*>(block_.template shared<unsigned char>() + offset);
  }

  // ---------------------------------------------------------------------------------- a problem

  OTLOSS_DEVICE void solve(const SolveGroup<T>& p, int64_t batch) {
    place(p, batch);
    const double max_cost = load_rows(p);
    double* status = p.status + batch * kStatusFields;
    control_ = StepControl(options_.eps, options_.tol, options_.max_iters, mass_y_, points_);
    const bool finite = max_cost <= std::numeric_limits<double>::max();
    if (finite) {
      start(p);
      if (options_.n_iters != 0) do
          publish(evaluated_);
        while (turn(p, batch));
    }
    finish(p, batch, finite);
    if (team_.rank() == 0 && thread_ == 0) {
      status[kStatusIterations] = static_cast<double>(control_.passes());
      status[kStatusError] = control_.stop().final_error();
      status[kStatusConverged] = control_.stop().reached() ? 1.0 : 0.0;
      status[kStatusMaxCost] = max_cost;
    }
  }

  // Pointers and sizes of the problem.
  OTLOSS_DEVICE void place(const SolveGroup<T>& p, int64_t batch) {
    n_ = p.n, m_ = static_cast<int>(p.m);
    side_x_.rate = 1 / p.penalties.rho_x, side_y_.rate = 1 / p.penalties.rho_y;
    soft_ = !(side_x_.hard() && side_y_.hard());
    balanced_ = p.penalties.balanced;
    const int64_t rows = ceil_div(n_, team_.size() * kShare) * kShare;
    first_row_ = rows * team_.rank() < n_ ? rows * team_.rank() : n_;
    rows_ = static_cast<int>((first_row_ + rows < n_ ? first_row_ + rows : n_) - first_row_);
    const int share = static_cast<int>(ceil_div(m_, team_.size() * kShare) * kShare);
    first_column_ = share * team_.rank() < m_ ? share * team_.rank() : m_;
    column_count_ = (first_column_ + share < m_ ? first_column_ + share : m_) - first_column_;
    column_share_ = share;
    row_share_ = rows;
    row_offset_ = batch * n_ + first_row_;
    if constexpr (!kStreamed) {
      C_ = p.C + row_offset_ * m_;
      tile_ = args_.shared.tile >= 0 ? at<T>(args_.shared.tile) : C_;
    }
    b_ = p.b + batch * m_;
    row_weights_ = p.a + batch * n_;
    warps_ = 1;
    while (warps_ < kWarps && warps_ * kWarp * kColumns < m_) warps_ *= 2;
    row_teams_ = kWarps / warps_;
    wide_ = kThreads * kColumns < m_;
    const int64_t length = args_.vector_length;
    T* vectors = args_.shared.vectors >= 0 ? at<T>(args_.shared.vectors)
                                           : args_.vectors + team_index_ * kVectors * length;
    const auto next = [&] {
      T* v = vectors;
      vectors += length;
      return v;
    };
    g_ = next(), gt_ = next(), trial_g_ = next(), trial_gt_ = next(), q_ = next();
    w_ = next(), target_ = next(), r_ = next(), p_ = next(), G_ = next();
    if (!soft_) target_ = w_;
    pairs_ = vectors;
    parts_ = args_.column_parts + team_index_ * 3 * team_.size() * length;
    symmetric_ = p.symmetric && options_.n_iters < 0;
    if constexpr (kStreamed)
      F_ = all_F_ + first_row_, a_ = all_a_ + first_row_, s_ = all_s_ + first_row_;
  }

  // Loads weights and tile. Returns max |C_ij| over points of positive weight, or NaN.
  OTLOSS_NOINLINE double load_rows(const SolveGroup<T>& p) {
    const T* a = p.a + row_offset_;
    const T* f = p.f + row_offset_;
    // What is iterated on is damped to give f, but for a cloud against itself.
    const double damping = symmetric_ ? 1 : side_x_.damping(options_.eps);
    const T k = static_cast<T>(kLog2E / options_.eps / damping);
    double mass[4] = {0, 0, 0, 0};  // of x and y; sums of squares
    const auto weigh = [&mass](int side, T weight) {
      const double w = static_cast<double>(weight);
      mass[side] += w, mass[2 + side] += w * w;
    };
    for (int i = thread_; i < rows_; i += kThreads) {
      a_[i] = a[i];
      F_[i] = options_.warm_start && a[i] > T(0) ? k * f[i] : T(0);
      weigh(0, a[i]);
    }
    for (int j = first_column_ + thread_; j < first_column_ + column_count_; j += kThreads)
      weigh(1, b_[j]);
    double largest[2] = {0, 0};  // max |C|, and 1 where it is not finite
    if constexpr (kStreamed)
      bound_costs(largest);
    else
      load_costs(largest);
    team_.template reduce<Sum>(mass);
    team_.template reduce<Max>(largest);
    // b is scaled to the total of a: weights that were rounded differently must not keep the error
    // up.
    const double ratio = balanced_ ? mass[0] / mass[1] : 1.0;
    const double points_x = equal_points(mass[0], mass[2]);
    const double points_y = equal_points(mass[1], mass[3]);
    points_ = points_x < points_y ? points_x : points_y;
    mass_x_ = snapped_total(mass[0], roundoff());
    mass_y_ = balanced_ ? mass_x_ : snapped_total(mass[1], roundoff());
    for_columns([&](int j) { w_[j] = static_cast<T>(static_cast<double>(b_[j]) * ratio); });
    return largest[1] > 0 ? static_cast<double>(std::numeric_limits<T>::quiet_NaN()) : largest[0];
  }

  // The tile to where it is read from, and max |C|, or 1 in the second place.
  OTLOSS_DEVICE void load_costs(double (&largest)[2]) {
    if (args_.shared.tile >= 0) {
      T* tile = at<T>(args_.shared.tile);
      for (int64_t e = thread_; e < static_cast<int64_t>(rows_) * m_; e += kThreads)
        tile[e] = C_[e];
    }
    block_.sync();
    for (int i = warp_; i < rows_; i += kWarps) {
      if (!(a_[i] > T(0))) continue;
      for (int j = lane_; j < m_; j += kWarp) {
        if (!(b_[j] > T(0))) continue;
        const T c = cost(i, j);
        const T magnitude = c < T(0) ? -c : c;
        if (!(magnitude <= std::numeric_limits<T>::max())) largest[1] = 1;
        largest[0] = Max::join(largest[0], static_cast<double>(magnitude));
      }
    }
  }

  // The first point to evaluate.
  OTLOSS_DEVICE void start(const SolveGroup<T>& p) {
    set_eps(options_.eps);
    next_ = Next::kStage;
    if (thread_ == 0) {
      gram_.count = 0;
      step_.slot = 0;
    }
    const bool warm = options_.warm_start;
    if (symmetric_) {
      phase_ = warm ? Phase::kSymmetric : Phase::kSymmetricFirst;
      const T* f = p.f + row_offset_;
      for_columns([&](int j) { g_[j] = warm ? f[j - first_column_] : T(0); });
      evaluated_ = g_;
    } else {
      phase_ = options_.n_iters >= 0 ? Phase::kFixed : Phase::kStart;
      const T* g = p.g + (b_ - p.b);
      const T* from = warm ? g : start_;
      for_columns([&](int j) { trial_g_[j] = from ? from[j] : T(0); });
      evaluated_ = trial_g_;
    }
  }

  // Evaluates a point and chooses the next. False: done.
  OTLOSS_DEVICE bool turn(const SolveGroup<T>& p, int64_t batch) {
    if constexpr (kStreamed) {
      streamed_pass();
    } else {
      if (wide_)
        wide_pass();
      else
        pass();
    }
    control_.count_passes(1);
    if (phase_ == Phase::kSymmetricFirst) return begin_symmetric();
    if (symmetric_) {
      control_.observe(symmetric_scalars());
      return symmetric_turn();
    }
    const Scalars trial = update_columns();
    return phase_ == Phase::kFixed ? fixed_turn(p, batch, trial) : pair_turn(p, batch, trial);
  }

  // f and g out, and the value's part of the loss.
  OTLOSS_NOINLINE void finish(const SolveGroup<T>& p, int64_t batch, bool finite) {
    T* f = p.f + row_offset_;
    T* g = p.g + (b_ - p.b);
    double* status = p.status + batch * kStatusFields;
    double* term = team_.rank() == 0 && thread_ == 0 ? status + kStatusTerm : nullptr;
    if (!finite) {
      const T nan = std::numeric_limits<T>::quiet_NaN();
      for (int i = thread_; i < rows_; i += kThreads) f[i] = nan;
      for_columns([&](int j) { g[j] = nan; });
      const int64_t length = p.n + p.m;
      T* trace = p.trace != nullptr ? p.trace + batch * options_.n_iters * length : nullptr;
      for (int64_t l = 0; trace != nullptr && l < options_.n_iters; ++l, trace += length) {
        for (int i = thread_; i < rows_; i += kThreads) trace[first_row_ + i] = nan;
        for_columns([&](int j) { trace[p.n + j] = nan; });
      }
      if (term) *term = static_cast<double>(nan);
      return;
    }
    set_eps(options_.eps);
    const T damping = static_cast<T>(damping_);
    if (symmetric_) {  // a further step, which makes the value exact to second order
      const T last = static_cast<T>(SymmetricRule(damping_).last);
      for_rows([&](int i, T& old) {
        const T start = k_ * old;
        F_[i] = start + last * (damping * F_[i] - start);
      });
    } else {
      for (int i = thread_; i < rows_; i += kThreads) F_[i] *= damping;
    }
    for (int i = thread_; i < rows_; i += kThreads) f[i] = to_cost_ * F_[i];
    const T* last = options_.n_iters == 0 ? trial_g_ : gt_;
    for_columns([&](int j) { g[j] = symmetric_ ? f[j - first_column_] : last[j]; });
    const double result = value_of(f, g);
    if (term) *term = p.coefficient * result;
  }

  // f (rows,) and g (m,): the potentials, F_ = k f.
  OTLOSS_DEVICE double value_of(const T* f, const T* g) {
    double sums[1] = {0};
    if (options_.objective == Objective::kTransport) {
      publish(g);
      if constexpr (kStreamed)
        sums[0] = streamed_transport();
      else
        sums[0] = transport();
    } else if (!balanced_) {
      SoftMean mean_f, mean_g;
      find_least(f, g);
      soft_means(f, 1, g, &mean_f, &mean_g);
      return soft_value(side_x_, side_y_, mass_x_, mass_y_, eps_, mean_f.mean, mean_g.mean);
    } else {
      for (int i = thread_; i < rows_; i += kThreads)
        sums[0] += static_cast<double>(a_[i]) * static_cast<double>(f[i]);
      for_columns(
          [&](int j) { sums[0] += static_cast<double>(w_[j]) * static_cast<double>(g[j]); });
    }
    team_.template reduce<Sum>(sums);
    return sums[0];
  }

  // --------------------------------------------------------------------------------- small parts

  OTLOSS_DEVICE void set_eps(double eps) {
    eps_ = eps;
    k_ = static_cast<T>(kLog2E / eps);
    to_cost_ = static_cast<T>(eps / kLog2E);
    damping_ = side_x_.damping(eps);
    tilt_ = static_cast<T>(-eps * side_x_.rate * damping_);
  }

  OTLOSS_DEVICE static double roundoff() {
    return static_cast<double>(std::numeric_limits<T>::epsilon());
  }

  OTLOSS_DEVICE T cost(int i, int j) const { return tile_[static_cast<int64_t>(i) * m_ + j]; }

  template <typename F>
  OTLOSS_DEVICE void for_columns(F&& function) const {
    for (int j = first_column_ + thread_; j < first_column_ + column_count_; j += kThreads)
      function(j);
  }

  // G_j = k g_j + log2 b_j for the potential to be evaluated, for all blocks to see.
  OTLOSS_DEVICE void publish(const T* potential) {
    for_columns([&](int j) {
      const T w = w_[j];
      team_.store(G_ + j, w > T(0) ? k_ * potential[j] + fast_log2(w) : static_cast<T>(kLog2Zero));
    });
    team_.sync();
  }

  OTLOSS_DEVICE T warp_total(T value) const {
    for (int mask = kWarp / 2; mask > 0; mask /= 2) value += block_.shuffle_xor(value, mask);
    return value;
  }

  // -log2 sum_j exp2(G_j - k C_ij) of one row by one warp, with the maximum subtracted, and the row
  // sum that is left with it.
  OTLOSS_DEVICE T exact_row(int i, T* sum) const {
    T largest = std::numeric_limits<T>::lowest();
    for (int j = lane_; j < m_; j += kWarp) {
      const T t = team_.load(G_ + j) - k_ * cost(i, j);
      largest = t > largest ? t : largest;
    }
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      const T other = block_.shuffle_xor(largest, mask);
      largest = other > largest ? other : largest;
    }
    T total = 0;
    for (int j = lane_; j < m_; j += kWarp)
      total += fast_exp2(team_.load(G_ + j) - k_ * cost(i, j) - largest);
    const T exact = -(largest + fast_log2(warp_total(total)));
    total = 0;
    for (int j = lane_; j < m_; j += kWarp)
      total += fast_exp2(exact + team_.load(G_ + j) - k_ * cost(i, j));
    *sum = warp_total(total);
    return exact;
  }

  OTLOSS_DEVICE static bool trusted_row(T sum) {
    return sum > static_cast<T>(1.0 / kTrustedRow) && sum < static_cast<T>(kTrustedRow);
  }

  // ------------------------------------------------------------------------------------- the pass

  // F exact for G, s = row sums before, and this block's column sums to parts_, of the plan of F,
  // damped where rows are: a factor for each row is all that takes.
  OTLOSS_NOINLINE void pass() {
    const int row_team = warp_ / warps_, warp = warp_ % warps_;
    const int chunk = warps_ * kWarp;         // columns between v and v + 1
    const int column = warp * kWarp + lane_;  // of v = 0
    const int own = lane_ / kLanes;           // the row of a step that this lane looks after
    const T k = k_;
    T G[kColumns], sums[kColumns], e[kRows][kColumns];
#pragma unroll
    for (int v = 0; v < kColumns; ++v) {
      const int j = v * chunk + column;
      G[v] = j < m_ ? team_.load(G_ + j) : static_cast<T>(kLog2Zero);
      sums[v] = T(0);
    }
    const int steps = (rows_ + row_teams_ * kRows - 1) / (row_teams_ * kRows);
    for (int step = 0; step < steps; ++step) {
      const int base = (step * row_teams_ + row_team) * kRows;
      const int i = base + own;
      const T a = i < rows_ ? a_[i] : T(0);
      // A row that does not count must give finite entries.
      T F = a > T(0) ? F_[i] : static_cast<T>(kLog2Zero);
      T partial[kRows];
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const T Fr = block_.shuffle(F, r * kLanes);
        const T* row = tile_ + static_cast<int64_t>(base + r) * m_;
        partial[r] = T(0);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) {
          e[r][v] = T(0);
          if (v * chunk + warp * kWarp >= m_) continue;  // the same for all lanes
          const int j = v * chunk + column;
          const T c = j < m_ && base + r < rows_ ? row[j] : T(0);
          e[r][v] = fast_exp2(Fr + G[v] - k * c);
          partial[r] += e[r][v];
        }
      }
      const T joined = scatter_reduce<Sum>(block_, partial);
      T* exchange = exchange_ + exchange_parity_ * kWarps * kRows;
      exchange_parity_ ^= 1;
      if (lane_ % kLanes == 0) exchange[warp_ * kRows + own] = joined;
      if (warps_ > 1)
        block_.sync();
      else
        block_.warp_sync();
      T sum = T(0);
      for (int w = lane_ % kLanes; w < warps_; w += kLanes)
        sum += exchange[(row_team * warps_ + w) * kRows + own];
      for (int mask = kLanes / 2; mask > 0; mask /= 2) sum += block_.shuffle_xor(sum, mask);

      // From here on every lane knows all about its own row.
      const bool counts = a > T(0);
      const bool bad = counts && !trusted_row(sum);
      T before = counts ? sum : T(1);
      if (block_.any(bad)) {
#pragma unroll 1
        for (int r = 0; r < kRows; ++r) {
          if (!block_.shuffle(static_cast<int>(bad), r * kLanes)) continue;
          T rest;
          const T exact = exact_row(base + r, &rest);
          if (own != r) continue;
          before = fast_exp2(F - exact);
          F = exact;
          sum = rest;
        }
        block_.warp_sync();
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const T Fr = block_.shuffle(F, r * kLanes);
          if (!block_.shuffle(static_cast<int>(bad), r * kLanes)) continue;
          const T* row = tile_ + static_cast<int64_t>(base + r) * m_;
#pragma unroll
          for (int v = 0; v < kColumns; ++v) {
            const int j = v * chunk + column;
            if (j < m_) e[r][v] = fast_exp2(Fr + G[v] - k * row[j]);
          }
        }
      }
      if (warp == 0 && lane_ % kLanes == 0 && i < rows_) {
        F_[i] = counts ? F - fast_log2(sum) : T(0);
        s_[i] = before;
      }
      T weight = counts ? a / sum : T(0);
      if (counts && tilt_ != T(0)) weight *= fast_exp2(tilt_ * (F - fast_log2(sum)));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const T w = block_.shuffle(weight, r * kLanes);
#pragma unroll
        for (int v = 0; v < kColumns; ++v) sums[v] += w * e[r][v];
      }
    }
    if (symmetric_) {
      block_.sync();
      return;
    }
    if (row_teams_ == 1) {
#pragma unroll
      for (int v = 0; v < kColumns; ++v)
        if (v * chunk + column < m_) team_.store(part(0) + v * chunk + column, sums[v]);
      return;
    }
#pragma unroll
    for (int v = 0; v < kColumns; ++v)
      columns_[row_team * chunk * kColumns + v * chunk + column] = sums[v];
    block_.sync();
    for (int j = thread_; j < m_; j += kThreads) {
      T total = T(0);
      for (int t = 0; t < row_teams_; ++t) total += columns_[t * chunk * kColumns + j];
      team_.store(part(0) + j, total);
    }
  }

  // A pass for more columns than the registers of a block hold: rows first, a warp each, then
  // column sums, a panel of columns at a time.
  OTLOSS_NOINLINE void wide_pass() {
    for (int i = warp_; i < rows_; i += kWarps) {
      const T a = a_[i], F = F_[i];
      T sum = T(0);
      for (int j = lane_; j < m_; j += kWarp)
        sum += fast_exp2(F + team_.load(G_ + j) - k_ * cost(i, j));
      sum = warp_total(sum);
      T exact = F, before = sum;
      if (a > T(0) && !trusted_row(sum)) {
        exact = exact_row(i, &sum);
        before = fast_exp2(F - exact);
      }
      block_.warp_sync();
      if (lane_ == 0) {
        F_[i] = a > T(0) ? exact - fast_log2(sum) : T(0);
        s_[i] = a > T(0) ? before : T(1);
      }
    }
    block_.sync();
    if (symmetric_) return;
    const T damping = static_cast<T>(damping_);
    for (int j = thread_; j < m_; j += kThreads) {
      const T G = team_.load(G_ + j);
      T total = T(0);
      for (int i = 0; i < rows_; ++i)
        if (a_[i] > T(0)) total += a_[i] * fast_exp2(damping * F_[i] + G - k_ * cost(i, j));
      team_.store(part(0) + j, total);
    }
  }

  // ------------------------------------------------------------------------------ the streamed
  // pass

  // The blocks that share this one's rows, for the rows' update, or columns (side 1): neighbours.
  OTLOSS_DEVICE TeamState sharing(int side) const {
    TeamState group{Barrier::kBlock, 0, 1, 0, 0, nullptr, nullptr, nullptr};
    if (!kStreamed || args_.parts[side] == 1) return group;
    group.barrier = args_.barrier;
    group.size = args_.parts[side];
    group.rank = team_.rank() % group.size;
    group.counter =
        args_.group_counters +
        ((team_index_ * 2 + side) * team_.size() + team_.rank() - group.rank) * kCounterStride;
    return group;
  }

  // Where the blocks of the team keep what does not fit into shared memory.
  OTLOSS_DEVICE void place_streamed() {
    const int64_t length = args_.vector_length;
    T* vectors = args_.streamed + team_index_ * streamed_vectors(args_.parts) * length;
    const auto next = [&] {
      T* v = vectors;
      vectors += length;
      return v;
    };
    all_F_ = next(), all_a_ = next(), all_s_ = next(), A_ = next(), U_ = next();
    scratch_ = vectors;
    sweep_.sums = args_.shared.sums;
    sweep_.tiles.made_by = args_.tiles;
    sweep_.tiles.stages = args_.shared.tile;
    sweep_.tiles.room = args_.shared.bytes - args_.shared.tile;
  }

  OTLOSS_DEVICE void place_points(int group, int64_t batch) {
    const SolveGroup<T>& p = args_.groups.items[group];
    const PackedPair<T>& points = args_.points[group];
    sweep_.tiles.kind = points.kind;
    sweep_.tiles.d = points.d;
    sweep_.tiles.symmetric = p.symmetric;
    x_ = packed_cloud(points.x, batch, points.d, p.n);
    y_ = packed_cloud(points.y, batch, points.d, p.m);
    split_x_ = points.split_x.cloud(batch, points.d, p.n);
    split_y_ = points.split_y.cloud(batch, points.d, p.m);
  }

  // The sweep over columns for the rows of this block and those that share them, or over rows for
  // their columns: this block's part of it.
  OTLOSS_DEVICE RowSums<T> sweep(bool over_rows) const {
    const Team<Block, kThreads>& group = over_rows ? sharing_columns_ : sharing_rows_;
    RowSums<T> sweep = sweep_;
    RowTiles<T>& tiles = sweep.tiles;
    tiles.k = k_;
    tiles.rows = over_rows ? y_ : x_, tiles.columns = over_rows ? x_ : y_;
    tiles.split_rows = over_rows ? split_y_ : split_x_;
    tiles.split_columns = over_rows ? split_x_ : split_y_;
    const auto cut = [](int64_t count, int64_t share, int64_t from) {
      return share * from < count ? share * from : count;
    };
    const int64_t own = over_rows ? column_share_ : row_share_,
                  before = team_.rank() - group.rank();
    tiles.first = cut(tiles.rows.count, own, before);
    tiles.last = cut(tiles.rows.count, own, before + group.size());
    const int64_t part = ceil_div(tiles.columns.count, group.size() * kPackedAlign) * kPackedAlign;
    tiles.begin = cut(tiles.columns.count, part, group.rank());
    tiles.end = cut(tiles.columns.count, part, group.rank() + 1);
    tiles.G = over_rows ? A_ : G_;
    return sweep;
  }

  // F, s: (n,) or (m,).
  OTLOSS_DEVICE Softmin<T, Block> softmin(bool over_rows, const T* weight, T* F, T* s) {
    const RowSums<T> sums = sweep(over_rows);
    const int64_t first = sums.tiles.first;
    const int own = static_cast<int>((over_rows ? first_column_ : first_row_) - first);
    const int count = over_rows ? column_count_ : rows_;
    const SharedRows<T> rows{weight + first, F + first,        s + first,          own,
                             own + count,    scratch_ + first, args_.vector_length};
    return {block_, over_rows ? sharing_columns_ : sharing_rows_, sums, rows};
  }

  // F exact for G, s = row sums before; then gt and q = column sums over b, of the plan of F,
  // damped where rows are.
  OTLOSS_DEVICE void streamed_pass() {
    softmin(false, row_weights_, all_F_, all_s_).update();
    if (symmetric_) return;
    const T damping = static_cast<T>(damping_);
    for (int i = thread_; i < rows_; i += kThreads)
      team_.store(A_ + first_row_ + i, damping * F_[i] + log2_weight(a_[i]));
    for_columns([&](int j) { U_[j] = k_ * trial_g_[j]; });
    team_.sync();
    softmin(true, b_, U_, q_).update();
    for_columns([&](int j) { trial_gt_[j] = to_cost_ * U_[j]; });
  }

  // <P, C> over this thread's share, for the published G.
  OTLOSS_DEVICE double streamed_transport() {
    Softmin<T, Block> rows = softmin(false, row_weights_, all_F_, all_s_);
    const T* const costs = rows.costs();
    const RowTiles<T> tiles = sweep(false).tiles;
    double total = 0;
    for (int64_t i = tiles.first + thread_; i < tiles.last; i += kThreads)
      total += static_cast<double>(row_weights_[i]) * static_cast<double>(costs[i - tiles.first]);
    return total;
  }

  // A bound of max |C| from the largest norms, in the first place; 1 in the second if one is not
  // finite. Also fills what is read of the vectors beyond their ends.
  OTLOSS_DEVICE void bound_costs(double (&largest)[2]) {
    double norms[3] = {0, 0, 0};
    const auto look = [&](T weight, T norm, double& most) {
      if (!(weight > T(0))) return;
      if (!(norm <= std::numeric_limits<T>::max())) norms[2] = 1;
      most = Max::join(most, static_cast<double>(norm));
    };
    for (int i = thread_; i < rows_; i += kThreads) look(a_[i], x_.norm[first_row_ + i], norms[0]);
    for_columns([&](int j) { look(b_[j], y_.norm[j], norms[1]); });
    if (team_.rank() == 0) {
      for (int64_t i = x_.count + thread_; i < x_.stride; i += kThreads) team_.store(A_ + i, T(0));
      for (int64_t j = y_.count + thread_; j < y_.stride; j += kThreads) team_.store(G_ + j, T(0));
    }
    team_.template reduce<Max>(norms);
    largest[0] = cost_bound(sweep_.tiles.kind, norms[0], norms[1]);
    largest[1] = norms[2];
  }

  OTLOSS_DEVICE T point_cost(int64_t i, int64_t j) const {
    return pair_cost(sweep_.tiles.kind, sweep_.tiles.d, sweep_.tiles.symmetric, x_, i, y_, j);
  }

  // Row `which` of this block's column parts: 0 column sums, 1 and 2 guarded ones.
  OTLOSS_DEVICE T* part(int which) const { return part_of(which, team_.rank()); }
  OTLOSS_DEVICE T* part_of(int which, int rank) const {
    return parts_ + (which * team_.size() + rank) * args_.vector_length;
  }

  // Value of the transport objective over this thread's share, for the published G.
  OTLOSS_DEVICE double transport() const {
    double total = 0;
    for (int i = warp_; i < rows_; i += kWarps) {
      if (!(a_[i] > T(0))) continue;
      T sum = T(0);
      for (int j = lane_; j < m_; j += kWarp) {
        const T c = cost(i, j), t = F_[i] + team_.load(G_ + j) - k_ * c;
        if (t > static_cast<T>(-kExp2Limit)) sum += fast_exp2(t) * c;
      }
      total += static_cast<double>(a_[i]) * static_cast<double>(sum);
    }
    return total;
  }

  // ------------------------------------------------------------------------------- after the pass

  // Of a cloud against itself, whose f stands in g_.
  OTLOSS_DEVICE PointScalars symmetric_scalars() {
    SoftMean mean{0, 0};
    if (soft_) {
      SoftMean same;
      find_least(g_ + first_column_, g_);
      soft_means(g_ + first_column_, 1, g_, &same, &mean);
    }
    const TargetMarginal<T> target(side_x_, eps_, 0, mean.mean);
    double sums[2] = {0, 0};  // marginal error, size of f
    for_rows([&](int i, T& f) {
      if (!(a_[i] > T(0))) return;
      const T w = soft_ ? target.of(a_[i], f) : a_[i];
      const T q = soft_ ? target.ratio(s_[i], f, to_cost_ * F_[i]) : s_[i];
      const double off = static_cast<double>(q) - 1;
      sums[0] += static_cast<double>(w) * (off < 0 ? -off : off);
      sums[1] += static_cast<double>(w) * static_cast<double>(f < T(0) ? -f : f);
    });
    team_.template reduce<Sum>(sums);
    return {0, 8 * roundoff() * sums[1], sums[0] / mass_x_};
  }

  // The least potentials of points that count: of f, in its units, and of g. Also a barrier.
  OTLOSS_DEVICE void find_least(const T* f, const T* g) {
    double least[2] = {Max::identity(), Max::identity()};
    for (int i = thread_; i < rows_; i += kThreads)
      if (a_[i] > T(0)) least[0] = Max::join(least[0], -static_cast<double>(f[i]));
    for_columns([&](int j) {
      if (w_[j] > T(0)) least[1] = Max::join(least[1], -static_cast<double>(g[j]));
    });
    team_.template reduce<Max>(least);
    least_f_ = -least[0], least_g_ = -least[1];
  }

  // The soft means of unit * f and of g; also sums up `count`.
  OTLOSS_NOINLINE double soft_means(const T* f, double unit, const T* g, SoftMean* mean_f,
                                    SoftMean* mean_g, double count = 0) {
    SoftSums x, y;
    for (int i = thread_; i < rows_; i += kThreads)
      if (a_[i] > T(0))
        x.add(side_x_, unit, least_f_, static_cast<double>(a_[i]), static_cast<double>(f[i]));
    for_columns([&](int j) {
      if (w_[j] > T(0))
        y.add(side_y_, 1, least_g_, static_cast<double>(w_[j]), static_cast<double>(g[j]));
    });
    double sums[7] = {x.lost, x.kept, x.size, y.lost, y.kept, y.size, count};
    team_.template reduce<Sum>(sums);
    *mean_f = SoftSums{sums[0], sums[1], sums[2]}.mean(side_x_, unit, least_f_, mass_x_);
    *mean_g = SoftSums{sums[3], sums[4], sums[5]}.mean(side_y_, 1, least_g_, mass_y_);
    return sums[6];
  }

  // gt and q of the evaluated point from the column sums of all blocks, and its scalars. Before
  // they are joined a barrier tells that the parts are there.
  OTLOSS_DEVICE Scalars update_columns() {
    if constexpr (kStreamed) {
      if (!soft_) return hard_scalars();
      find_least(F_, trial_g_);
      return soft_scalars();
    }
    least_column_ = least_column<T>() * mass_x_;
    if (!soft_) {
      team_.sync();
      join_columns();
      return hard_scalars();
    }
    block_.sync();  // F is there
    find_least(F_, trial_g_);
    // Rows count by their factors; none is large enough if one overflows.
    const double largest = static_cast<double>(tilt_) * least_f_;
    least_column_ *= largest > kExp2Limit ? std::numeric_limits<double>::infinity()
                                          : fast_exp2(largest > 0 ? largest : 0.0);
    join_columns();
    return soft_scalars();
  }

  OTLOSS_DEVICE bool untrusted_column(T b, T c) const {
    return b > T(0) && !(trusted(c / b) && static_cast<double>(c) > least_column_);
  }

  OTLOSS_DEVICE void set_column(int j, T c) {
    const T b = w_[j];
    const T q = b > T(0) ? c / b : T(1);
    q_[j] = untrusted_column(b, c) ? static_cast<T>(-1) : q;
    trial_gt_[j] = b > T(0) ? trial_g_[j] - to_cost_ * fast_log2(q) : T(0);
  }

  // Sums over blocks: with fewer columns than threads, several threads share the blocks' parts.
  OTLOSS_DEVICE void join_columns() {
    if (team_.size() == 1) {
      for_columns([&](int j) { set_column(j, part(0)[j]); });
      return;
    }
    int width = kThreads;
    while (width > kWarp && width / 2 >= column_share_) width /= 2;
    const int groups = kThreads / width, group = thread_ / width;
    for (int begin = 0; begin < column_share_; begin += width) {
      const int local = begin + thread_ % width;
      const bool mine = local < column_count_;
      const int j = first_column_ + local;
      T total = T(0);
      if (mine)
        for (int rank = group; rank < team_.size(); rank += groups)
          total += team_.load(part_of(0, rank) + j);
      columns_[thread_] = total;
      block_.sync();
      if (mine && group == 0) {
        for (int other = 1; other < groups; ++other) total += columns_[other * width + thread_];
        set_column(j, total);
      }
      block_.sync();
    }
  }

  // Sums: marginal error, dual value, its absolute size, <b, gt - g>, columns not to be trusted.
  OTLOSS_DEVICE Scalars hard_scalars() {
    double sums[5];
#pragma unroll 1
    for (bool guarded = false;; guarded = true) {
      for (double& sum : sums) sum = 0;
      for_columns([&](int j) {
        const double b = static_cast<double>(w_[j]), q = static_cast<double>(q_[j]);
        const double g = static_cast<double>(trial_g_[j]);
        sums[0] += b * (q < 1 ? 1 - q : q - 1);
        sums[1] += b * g;
        sums[2] += b * (g < 0 ? -g : g);
        sums[3] += b * (static_cast<double>(trial_gt_[j]) - g);
        sums[4] += q < 0 ? 1 : 0;
      });
      for (int i = thread_; i < rows_; i += kThreads) {
        const double f = (eps_ / kLog2E) * static_cast<double>(F_[i]);
        const double term = static_cast<double>(a_[i]) * f;
        sums[1] += term;
        sums[2] += term < 0 ? -term : term;
      }
      team_.template reduce<Sum>(sums);
      if (guarded || !(sums[4] > 0)) break;
      guard_columns();
    }
    return {sums[1], 4 * roundoff() * sums[2], sums[0] / mass_y_, sums[3] / mass_y_};
  }

  // Where a side is soft the point is moved to its best translation first (see Translation), but
  // not in iterations of a fixed number.
  OTLOSS_NOINLINE Scalars soft_scalars() {
    SoftMean f, g;
    double untrusted = 0;
    for_columns([&](int j) { untrusted += q_[j] < T(0) ? 1 : 0; });
    if (soft_means(F_, damping_ * eps_ / kLog2E, trial_g_, &f, &g, untrusted) > 0) guard_columns();
    Translation best(side_x_, side_y_, mass_x_, mass_y_, eps_, roundoff(), f, g);
    if (phase_ == Phase::kFixed) best.t = 0, best.mean_g = g.mean;
    const TargetMarginal<T> target(side_y_, eps_, -kLog2E * side_x_.rate * damping_ * best.t,
                                   best.mean_g);
    const T on_F = static_cast<T>(best.t * kLog2E / eps_), on_g = static_cast<T>(best.t);
    const T on_gt = static_cast<T>(damping_ * best.t), damp = static_cast<T>(side_y_.damping(eps_));
    for (int i = thread_; i < rows_; i += kThreads)
      if (a_[i] > T(0)) F_[i] += on_F;
    double sums[2] = {0, 0};  // marginal error, <target, gt - g>
    for_columns([&](int j) {
      target_[j] = T(0);
      if (!(w_[j] > T(0))) return;
      const T v = trial_g_[j] -= on_g, next = trial_gt_[j] - on_gt;
      target_[j] = target.of(w_[j], v);
      q_[j] = target.ratio(q_[j], v, next);
      trial_gt_[j] = damp * next;
      const double w = static_cast<double>(target_[j]), off = static_cast<double>(q_[j]) - 1;
      sums[0] += w * (off < 0 ? -off : off);
      sums[1] += w * static_cast<double>(trial_gt_[j] - v);
    });
    team_.template reduce<Sum>(sums);
    return {best.value, best.noise, sums[0] / mass_y_, sums[1] / mass_y_};
  }

  // Columns whose sums cannot be trusted (q < 0), again with the maximum subtracted: each block for
  // its rows, then joined.
  OTLOSS_NOINLINE void guard_columns() {
    const T damping = static_cast<T>(damping_);
    const auto exponent = [&](int i, int j) {
      return damping * F_[i] + log2_weight(a_[i]) - k_ * cost(i, j);
    };
    for (int j = thread_; j < m_; j += kThreads) {
      T largest = static_cast<T>(2 * kLog2Zero), sum = T(0);
      for (int i = 0; i < rows_; ++i) {
        const T t = exponent(i, j);
        largest = t > largest ? t : largest;
      }
      for (int i = 0; i < rows_; ++i) sum += fast_exp2(exponent(i, j) - largest);
      team_.store(part(1) + j, largest);
      team_.store(part(2) + j, sum);
    }
    team_.sync();
    for_columns([&](int j) {
      if (!(q_[j] < T(0))) return;
      OnlineLse<T> lse;
      for (int rank = 0; rank < team_.size(); ++rank) {
        OnlineLse<T> other;
        other.max = team_.load(part_of(1, rank) + j);
        other.sum = team_.load(part_of(2, rank) + j);
        lse.merge(other);
      }
      trial_gt_[j] = -to_cost_ * lse.value();
      const T t = k_ * (trial_g_[j] - trial_gt_[j]);
      q_[j] = fast_exp2(t < static_cast<T>(kExp2Limit) ? t : static_cast<T>(kExp2Limit));
    });
  }

  // ------------------------------------------------------------------------------------ the solver

  OTLOSS_DEVICE bool fixed_turn(const SolveGroup<T>& p, int64_t batch, const Scalars& trial) {
    control_.observe(trial);
    if (p.trace != nullptr) {
      T* trace = p.trace + (batch * options_.n_iters + control_.passes() - 1) * (p.n + p.m);
      const T to_cost = to_cost_ * static_cast<T>(damping_);
      for (int i = thread_; i < rows_; i += kThreads) trace[first_row_ + i] = to_cost * F_[i];
      for_columns([&](int j) { trace[p.n + j] = trial_gt_[j]; });
    }
    swap_points();  // the result is read from gt_
    for_columns([&](int j) { trial_g_[j] = gt_[j]; });
    if (control_.passes() == options_.n_iters) return false;
    evaluated_ = trial_g_;
    return true;
  }

  // A cloud against itself, see SymmetricRule. f stands in g_.
  OTLOSS_DEVICE bool begin_symmetric() {
    double mean[1] = {0};
    for (int i = thread_; i < rows_; i += kThreads)
      mean[0] += static_cast<double>(a_[i]) * static_cast<double>(F_[i]);
    team_.template reduce<Sum>(mean);
    const T part = static_cast<T>(SymmetricRule(damping_).centre * mean[0] / mass_x_);
    const T to_cost = to_cost_ * static_cast<T>(damping_);
    for_rows([&](int i, T& f) { f = a_[i] > T(0) ? to_cost * (F_[i] - part) : T(0); });
    phase_ = Phase::kSymmetric;
    return evaluate_symmetric();
  }

  OTLOSS_DEVICE bool symmetric_turn() {
    if (control_.stop().ends() || control_.passes() >= options_.max_iters) return false;
    const T step = static_cast<T>(SymmetricRule(damping_).relaxation);
    const T to_cost = to_cost_ * static_cast<T>(damping_);
    for_rows([&](int i, T& f) { f += step * (to_cost * F_[i] - f); });
    return evaluate_symmetric();
  }

  OTLOSS_DEVICE bool evaluate_symmetric() {
    for_rows([&](int i, T& f) { F_[i] = k_ * f; });
    evaluated_ = g_;
    return true;
  }

  // Rows and columns are cut alike when a cloud is against itself.
  template <typename F>
  OTLOSS_DEVICE void for_rows(F&& function) {
    for (int i = thread_; i < rows_; i += kThreads) function(i, g_[first_column_ + i]);
  }

  OTLOSS_DEVICE static void exchange(T*& x, T*& y) {
    T* const z = x;
    x = y, y = z;
  }

  OTLOSS_DEVICE void swap_points() { exchange(g_, trial_g_), exchange(gt_, trial_gt_); }

  // The point in trial_* was evaluated.
  OTLOSS_DEVICE bool pair_turn(const SolveGroup<T>& p, int64_t batch, Scalars trial) {
    if (phase_ != Phase::kPair) {
      T* const kept_F = p.f + batch * p.n + first_row_;
      bool near = near_enough(trial);
      if (start_ != nullptr && phase_ == Phase::kStart && control_.wants_other_start(near))
        return try_other_start(trial, kept_F);
      if (phase_ == Phase::kSecondStart && !is_better_start(&trial, kept_F)) near = false;
      phase_ = Phase::kPair;
      if (control_.begin_stages(near, near ? 0.0 : sigma())) return start_stage();
    } else if (next_ == Next::kStep && !control_.accepts(trial)) {
      next_ = control_.shorten();
      return evaluate_next();
    }
    move(trial);
    next_ = control_.move_to(trial);
    if (control_.stop().keeps()) keep(p);
    if (next_ == Next::kDone && control_.stop().returns_kept()) return_kept(p);
    if (next_ == Next::kStep) {
      control_.aim(step_.slope, step_.first);
      for_columns([&](int j) {
        T p = T(0);
        for (int v = 0; v < kBasis; ++v)
          if (step_.on[v] != 0) p += static_cast<T>(step_.on[v]) * basis(v)[j];
        p_[j] = has_mass(static_cast<double>(target_[j]), mass_y_) ? p : r_[j];
      });
    }
    return evaluate_next();
  }

  // Sets the point that next_ asks for. False: done.
  OTLOSS_DEVICE bool evaluate_next() {
    if (next_ == Next::kDone) return false;
    evaluated_ = trial_g_;
    if (next_ == Next::kStep) {
      const T t = static_cast<T>(control_.length());
      for_columns([&](int j) { trial_g_[j] = g_[j] + t * p_[j]; });
      return true;
    }
    for_columns([&](int j) { trial_g_[j] = gt_[j]; });
    if (next_ == Next::kStage) return start_stage();
    forget();
    return true;
  }

  // The outputs keep the point; it becomes the one that is returned.
  OTLOSS_NOINLINE void keep(const SolveGroup<T>& p) {
    for (int i = thread_; i < rows_; i += kThreads) p.f[row_offset_ + i] = F_[i];
    for_columns([&](int j) { p.g[b_ - p.b + j] = gt_[j]; });
  }

  OTLOSS_NOINLINE void return_kept(const SolveGroup<T>& p) {
    for (int i = thread_; i < rows_; i += kThreads) F_[i] = p.f[row_offset_ + i];
    for_columns([&](int j) { gt_[j] = p.g[b_ - p.b + j]; });
  }

  OTLOSS_DEVICE void forget() {
    block_.sync();
    if (thread_ == 0) gram_.count = 0;
    block_.sync();
  }

  // Whether the iterations can start at the point under evaluation.
  OTLOSS_DEVICE bool near_enough(const Scalars& trial) {
    double residual[1] = {0};
    for_columns([&](int j) {
      const double r = static_cast<double>(trial_gt_[j] - trial_g_[j]);
      residual[0] = Max::join(residual[0], r < 0 ? -r : r);
    });
    team_.template reduce<Max>(residual);
    return is_near(trial.error, residual[0], eps_);
  }

  // They cannot start at the point that was proposed: it is put aside, and 0 is next. kept_F:
  // (rows,), where f will be. r_ and p_ are not used yet.
  OTLOSS_NOINLINE bool try_other_start(const Scalars& trial, T* kept_F) {
    kept_ = trial;
    exchange_starts();
    for (int i = thread_; i < rows_; i += kThreads) kept_F[i] = F_[i], F_[i] = T(0);
    for_columns([&](int j) { trial_g_[j] = T(0); });
    phase_ = Phase::kSecondStart;
    evaluated_ = trial_g_;
    return true;
  }

  // Whether 0 is better than the point put aside, which otherwise takes its place.
  OTLOSS_NOINLINE bool is_better_start(Scalars* trial, const T* kept_F) {
    if (trial->value > kept_.value) return true;
    *trial = kept_;
    exchange_starts();
    for (int i = thread_; i < rows_; i += kThreads) F_[i] = kept_F[i];
    return false;
  }

  OTLOSS_DEVICE void exchange_starts() {
    swap_points();
    exchange(q_, r_);
    if (soft_) exchange(target_, p_);
  }

  // Evaluates trial_g_ at the eps of the stage.
  OTLOSS_DEVICE bool start_stage() {
    const double eps = control_.eps();
    const T scale = static_cast<T>(eps_ / eps);
    block_.sync();
    for (int i = thread_; i < rows_; i += kThreads) F_[i] *= scale;
    set_eps(eps);
    forget();
    next_ = Next::kStage;
    evaluated_ = trial_g_;
    return true;
  }

  // The vectors that LbfgsGram numbers. p_ holds the gradient over the weights until the direction
  // takes its place.
  OTLOSS_DEVICE T* basis(int number) const {
    if (number == LbfgsGram::kResidual) return r_;
    if (number == LbfgsGram::kGradient) return p_;
    return pairs_ + number * args_.vector_length;
  }

  // Makes the trial point the point: its residual and, after a step that was taken, the new pair;
  // all inner products that the next step needs, and that step.
  OTLOSS_DEVICE void move(const Scalars& trial) {
    const bool paired = next_ == Next::kStep;
    const int slot = step_.slot;
    const T middle = static_cast<T>(trial.mean);
    for_columns([&](int j) {
      const bool counts = w_[j] > T(0);
      const T r = counts ? trial_gt_[j] - trial_g_[j] - middle : T(0);
      if (paired) {
        basis(slot)[j] = counts ? trial_g_[j] - g_[j] : T(0);
        basis(LbfgsGram::change(slot))[j] = r_[j] - r;
      }
      r_[j] = r;
      p_[j] = T(1) - q_[j];
    });
    swap_points();
    make_products(paired, slot);
    if (warp_ == 0) {
      if (lane_ == 0) {
        learn(paired, slot);
        gram_.direction(step_.on);
        step_.slot = gram_.free_slot();
      }
      block_.warp_sync();
      measure();
    }
    block_.sync();
  }

  // Inner products weighted by the target column sums: those of the new pair, the residual and
  // the gradient with all vectors; where the weights are new, all. A warp for each.
  OTLOSS_DEVICE void make_products(bool paired, int slot) {
    const unsigned used = gram_.in_use() | (paired ? LbfgsGram::bits_of(slot) : 0u);
    unsigned fresh = soft_ ? used : 1u << LbfgsGram::kResidual;
    if (paired) fresh |= LbfgsGram::bits_of(slot);
    block_.sync();  // the vectors are there
    for_products(used, fresh, [&](int left, int right) {
      const T *u = basis(left), *v = basis(right);
      double sum = 0;
      for (int j = first_column_ + lane_; j < first_column_ + column_count_; j += kWarp)
        sum +=
            static_cast<double>(target_[j]) * static_cast<double>(u[j]) * static_cast<double>(v[j]);
      sum = warp_join<Sum>(block_, sum, kWarp);
      if (lane_ != 0) return;
      if (team_.size() == 1)
        gram_.set(left, right, sum);
      else
        team_.show(left * kBasis + right, sum);
    });
    if (team_.size() == 1) return block_.sync();
    team_.sync();
    for_products(used, fresh, [&](int left, int right) {
      const double sum = team_.total(left * kBasis + right);
      if (lane_ == 0) gram_.set(left, right, sum);
    });
    team_.flip();
    block_.sync();
  }

  // Calls function(left, right) for the products of this warp, each once.
  template <typename F>
  OTLOSS_DEVICE void for_products(unsigned used, unsigned fresh, F&& function) const {
    int number = 0;
#pragma unroll 1
    for (int left = 0; left < LbfgsGram::kVectors; ++left) {
      const bool gradient = left == LbfgsGram::kGradient;
      if (!gradient && (fresh >> left & 1u) == 0) continue;
#pragma unroll 1
      for (int right = 0; right < kBasis; ++right) {
        if ((used >> right & 1u) == 0) continue;
        if (!gradient && right > left && (fresh >> right & 1u) != 0) continue;
        if (number++ % kWarps == warp_) function(left, right);
      }
    }
  }

  // What the last step tells, by one thread: how long the next may be, and the pair.
  OTLOSS_DEVICE void learn(bool paired, int slot) {
    const double residual = product(LbfgsGram::kResidual, LbfgsGram::kResidual);
    if (paired) {
      const int change = LbfgsGram::change(slot);
      const double changed = product(change, change);
      // In the weights of the new point: the residual before was r + y.
      const double before = residual + 2 * product(LbfgsGram::kResidual, change) + changed;
      step_.length.accepted(product(slot, slot), changed, before);
      if (soft_) gram_.sift();
      if (changed > least_change(control_.point().noise, mass_y_, roundoff(), eps_))
        gram_.keep(slot);
    } else {
      gram_.count = 0;
      if (next_ == Next::kPlain)
        step_.length.plain(step_.residual);
      else
        step_.length = StepLength();
    }
    step_.residual = residual;
  }

  // Slope along the direction and its length, by one warp; a direction that descends is replaced by
  // the residual.
  OTLOSS_DEVICE void measure() {
    double slope = 0, squared = 0;
    if (lane_ < kBasis && step_.on[lane_] != 0) {
      for (int v = 0; v < kBasis; ++v)
        if (step_.on[v] != 0) squared += step_.on[v] * product(lane_, v);
      squared *= step_.on[lane_];
      slope = step_.on[lane_] * product(LbfgsGram::kGradient, lane_);
    }
    slope = warp_join<Sum>(block_, slope, kWarp);
    squared = warp_join<Sum>(block_, squared, kWarp);
    if (lane_ != 0) return;
    if (!(slope > 0)) {
      gram_.count = 0;
      gram_.direction(step_.on);
      slope = product(LbfgsGram::kGradient, LbfgsGram::kResidual);
      squared = step_.residual;
    }
    step_.slope = slope;
    step_.first = step_.length.first(squared);
  }

  OTLOSS_DEVICE double product(int left, int right) const { return gram_.product[left][right]; }

  // Standard deviation of C_ij - mean_i - mean_j + mean over at most 256 x 256 points of positive
  // weight. Every block computes it for itself, from global memory.
  OTLOSS_NOINLINE double sigma() {
    const int r = n_ < kSample ? static_cast<int>(n_) : kSample, c = m_ < kSample ? m_ : kSample;
    const auto entry = [&](int64_t i, int64_t j) {
      if constexpr (kStreamed)
        return static_cast<double>(point_cost(i, j));
      else
        return static_cast<double>(C_[(i - first_row_) * m_ + j]);
    };
    const auto row = [&](int i) { return static_cast<int64_t>(i) * n_ / r; };
    const auto column = [&](int j) { return static_cast<int64_t>(j) * m_ / c; };
    double sums[6] = {};  // of C, C^2, squares of row sums, of column sums; rows, columns
    for (int i = team_.rank() * kWarps + warp_; i < r; i += team_.size() * kWarps) {
      if (!(row_weights_[row(i)] > T(0))) continue;
      double sum[2] = {0, 0};
      for (int j = lane_; j < c; j += kWarp) {
        if (!(b_[column(j)] > T(0))) continue;
        const double value = entry(row(i), column(j));
        sum[0] += value, sum[1] += value * value;
      }
      warp_sum(block_, sum);
      if (lane_ != 0) continue;
      sums[0] += sum[0], sums[1] += sum[1], sums[2] += sum[0] * sum[0], sums[4] += 1;
    }
    for (int j = team_.rank() * kThreads + thread_; j < c; j += team_.size() * kThreads) {
      if (!(b_[column(j)] > T(0))) continue;
      double sum = 0;
      for (int i = 0; i < r; ++i)
        if (row_weights_[row(i)] > T(0)) sum += entry(row(i), column(j));
      sums[3] += sum * sum, sums[5] += 1;
    }
    team_.template reduce<Sum>(sums);
    const double rows = sums[4], columns = sums[5], mean = sums[0] / (rows * columns);
    if (rows < 2 || columns < 2) return 0;
    const double variance = sums[1] / (rows * columns) - sums[2] / (rows * columns * columns) -
                            sums[3] / (columns * rows * rows) + mean * mean;
    return variance > 0 ? sqrt(variance) : 0;
  }

  static constexpr int kSample = 256;

  Block& block_;
  const SolveArguments<T>& args_;
  const SolveOptions& options_;
  const int thread_, lane_, warp_;
  const int64_t team_index_;
  Team<Block, kThreads> team_;
  Team<Block, kThreads> sharing_rows_, sharing_columns_;  // streamed: those with the same
  LbfgsGram& gram_;
  Step& step_;
  T* const exchange_;  // (2, kWarps, kRows)
  T* const columns_;   // (row_teams, columns of a row team), or (kThreads,)
  T* F_;               // (rows,) k f
  T* a_;               // (rows,)
  T* s_;               // (rows,) row sums before the update, over a

  int64_t n_, first_row_;
  int64_t row_offset_;  // of the first row, in (B, n)
  int64_t row_share_;   // rows of each block but the last
  int m_, rows_, first_column_, column_count_, column_share_;
  const T* C_;            // (rows, m) of this block, global
  const T* tile_;         // (rows, m) of this block, where passes read it
  const T* b_;            // (m,)
  const T* start_;        // (m,) to begin at, or null
  const T* row_weights_;  // (n,)
  int warps_, row_teams_;
  bool wide_, symmetric_;
  Penalty side_x_, side_y_;
  bool soft_;               // one of them
  bool balanced_;           // every marginal of the call is a constraint
  T *g_, *gt_;              // (m,) the point
  T *trial_g_, *trial_gt_;  // (m,) the point under evaluation
  T* q_;                    // (m,) its column sums over their targets
  T* w_;                    // (m,) the weights b that the problem is solved with
  T* target_;               // (m,) the target column sums, of the total of w
  T *r_, *p_;               // (m,) residual, direction
  const T* evaluated_;      // (m,) g_ or trial_g_
  T* G_;                    // (m,) k g + log2 b of the point under evaluation
  T* pairs_;                // (2, kSlots, m)
  T* parts_;                // (3, team_size, m)
  // Streamed:
  RowSums<T> sweep_;      // what is the same for all sweeps
  PackedCloud<T> x_, y_;  // the points
  SplitCloud split_x_, split_y_;
  T *all_F_, *all_a_, *all_s_;  // (n,) of all blocks
  T* A_;                        // (n,) F + log2 a, for all blocks to see
  T* U_;                        // (m,) k g, then k gt
  T* scratch_;                  // (kSoftminVectors, parts, max(n, m))
  double mass_x_, mass_y_;      // total weights
  double points_;               // see rounding_share
  double least_f_, least_g_;    // of the last find_least
  double least_column_;         // sums that are smaller may owe digits to clamped exponentials
  double eps_, damping_;        // damping of the rows
  T k_, to_cost_, tilt_;        // tilt: damping - 1
  int exchange_parity_ = 0;

  StepControl control_;
  Phase phase_;
  Next next_;                 // what the point under evaluation is
  Scalars kept_{0, 0, 0, 0};  // a start put aside
};

}  // namespace otloss::cuda

namespace otloss::cuda {

template <typename T, int kColumnsPerThread>
template <class Block>
OTLOSS_DEVICE void SolveKernel<T, kColumnsPerThread>::operator()(Block& block) const {
  Solver<T, SolveKernel, Block> solver(block, arguments);
  solver.run();
}

template <typename T>
template <class Block>
OTLOSS_DEVICE void StreamedKernel<T>::operator()(Block& block) const {
  Solver<T, StreamedKernel, Block> solver(block, arguments);
  solver.run();
}

// ------------------------------------------------------------------------------------- launching

// The arguments of a launch but for the points: workspace and layout by the plan.
template <typename T>
SolveArguments<T> solve_arguments(const Context& context, const Pack<SolveGroup<T>>& pack,
                                  const SolveOptions& options, const Shape& shape,
                                  const SolvePlan& plan) {
  const int64_t length = plan.vector_length;
  SolveArguments<T> arguments{};
  arguments.groups = pack;
  arguments.options = options;
  arguments.shared = plan.shared;
  arguments.barrier = plan.barrier;
  arguments.team_size = plan.team_size;
  arguments.teams = plan.teams;
  arguments.problems = shape.problems;
  arguments.vector_length = length;
  if (plan.shared.vectors < 0)
    arguments.vectors = context.scratch<T>(plan.teams * (kVectors)*length);
  if (plan.regime != Regime::kStreamed)
    arguments.column_parts = context.scratch<T>(plan.teams * 3 * plan.team_size * length);
  arguments.team_parts = context.scratch<double>(plan.teams * 2 * plan.team_size * kTeamValues);
  const auto counters = [&](int64_t of_team) {
    const int64_t count = plan.teams * of_team * kCounterStride;
    unsigned* const made = context.scratch<unsigned>(count);
    if (plan.barrier == Barrier::kGrid)
      clear(context, made, count * static_cast<int64_t>(sizeof(unsigned)));
    return made;
  };
  arguments.counters = counters(1);
  if (plan.regime == Regime::kStreamed) {
    arguments.tiles = plan.tiles;
    std::copy(plan.parts, plan.parts + 2, arguments.parts);
    arguments.group_counters = counters(2 * plan.team_size);
    arguments.streamed = context.scratch<T>(plan.teams * streamed_vectors(plan.parts) * length);
  }
  propose_starts(context, pack, options, plan, arguments.starts);
  return arguments;
}

inline Grid solve_grid(const SolvePlan& plan) {
  Grid grid;
  grid.x = plan.teams * plan.team_size;
  grid.shared = static_cast<size_t>(plan.shared.bytes);
  grid.cluster = plan.barrier == Barrier::kCluster ? plan.team_size : 1;
  grid.cooperative = plan.barrier == Barrier::kGrid;
  return grid;
}

}  // namespace otloss::cuda
