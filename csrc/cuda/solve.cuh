// The whole solve of a dense problem in one kernel: passes over C, column sums, quasi-Newton steps,
// the stopping test.
//
// A team of blocks has one problem; block `rank` has a contiguous part of the rows, whose part of C
// (its tile) it keeps in shared memory (resident) or reads from global memory in every pass
// (dense), and the same share of the columns' vectors.
//
// One pass is the one-exponential sweep of csrc/cpu/sweep.cpp. A row team (1 to all warps of a
// block) takes kRows rows at once; lane l of its warp w has the columns
//     j = v * 32 W + 32 w + l,  v < kColumns      (W warps in the row team)
// so that kRows * kColumns entries e_ij = exp2(F_i + G_j - k C_ij) stand in registers while the row
// sums are made (a few shuffles, one exchange through shared memory) and are used a second time for
// the column sums, which stay in registers for the whole pass. Problems with more columns than that
// use two sweeps and two exponentials.
//
// After a pass: column sums are joined over row teams (shared memory) and blocks (global memory),
// each block makes its columns' update, and the scalars of the step (error, dual value) are one
// team reduction, after which every thread takes the same decision. Vectors of the solver are cut
// by columns: a thread only ever touches its own entries, except G, which everybody reads.
//
// The solver is that of csrc/cpu/solver.h as a state machine, so that there is one place that
// passes over C: each turn evaluates one point and decides which is next.
#pragma once

#include <limits>

#include "block.cuh"
#include "lbfgs.h"
#include "math.h"
#include "plan.h"
#include "reduce.cuh"
#include "streamed.cuh"
#include "team.cuh"

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

// The points of a problem's group, where costs are made from them.
template <typename T>
struct PackedPair {
  CostKind kind;
  int64_t d;   // coordinates
  const T* x;  // (B, d + 1, packed_stride(n)) points, then their norms
  const T* y;  // (B, d + 1, packed_stride(m))
};

template <typename T>
struct SolveArguments {
  Pack<SolveGroup<T>> groups;
  SolveOptions options;
  SharedLayout shared;
  Barrier barrier;
  int team_size;                     // blocks per problem
  int64_t teams;                     // team t solves problems t, t + teams, ...
  int64_t problems;                  // of all groups
  int64_t vector_length;             // at least every m, and a multiple of 32
  PackedPair<T> points[kMaxGroups];  // of the groups, streamed
  T* vectors;                        // (teams, kVectors + 1, vector_length)
  T* streamed;                       // (teams, kStreamedVectors, vector_length)
  T* column_parts;                   // (teams, 3, team_size, vector_length)
  double* team_parts;                // (teams, 2, team_size, kTeamValues)
  unsigned* counters;                // (teams, kCounterStride), 0
};

constexpr int64_t kCounterStride = 32;  // a line for each counter
constexpr int kStreamedVectors = 7;     // see Solver::place_streamed

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

// The same without cost matrices.
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
  static constexpr bool kStreamed = Kernel::kStreamed;
  // Blocks have whole pieces of so many rows and columns.
  static constexpr int kShare = kStreamed ? kTileRows : 1;
  // As in csrc/cpu/solver.h.
  static constexpr int kTries = 5;
  static constexpr double kShrink = 0.3, kSufficient = 1e-4, kStageTol = 0.01;

  // What the point that was just evaluated is.
  enum class Phase { kFixed, kSymmetricFirst, kSymmetric, kStart, kTrial, kPlain };

  // The scalars of one evaluated point.
  struct Scalars {
    double value, noise, error, mean;
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
    iterations_ = 0;
    error_ = static_cast<double>(std::numeric_limits<T>::quiet_NaN());
    const bool finite = max_cost <= std::numeric_limits<double>::max();
    if (finite) {
      start(p);
      if (options_.n_iters != 0) do
          publish(evaluated_);
        while (turn(p, batch));
    }
    finish(p, batch, finite);
    if (team_.rank() == 0 && thread_ == 0) {
      status[kStatusIterations] = static_cast<double>(iterations_);
      status[kStatusError] = error_;
      status[kStatusConverged] = error_ <= options_.tol ? 1.0 : 0.0;
      status[kStatusMaxCost] = max_cost;
    }
  }

  // Pointers and sizes of the problem.
  OTLOSS_DEVICE void place(const SolveGroup<T>& p, int64_t batch) {
    n_ = p.n, m_ = static_cast<int>(p.m);
    const int64_t rows = ceil_div(n_, team_.size() * kShare) * kShare;
    first_row_ = rows * team_.rank() < n_ ? rows * team_.rank() : n_;
    rows_ = static_cast<int>((first_row_ + rows < n_ ? first_row_ + rows : n_) - first_row_);
    const int share = static_cast<int>(ceil_div(m_, team_.size() * kShare) * kShare);
    first_column_ = share * team_.rank() < m_ ? share * team_.rank() : m_;
    column_count_ = (first_column_ + share < m_ ? first_column_ + share : m_) - first_column_;
    column_share_ = share;
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
                                           : args_.vectors + team_index_ * (kVectors + 1) * length;
    const auto next = [&] {
      T* v = vectors;
      vectors += length;
      return v;
    };
    g_ = next(), gt_ = next(), q_ = next();
    trial_g_ = next(), trial_gt_ = next(), trial_q_ = next();
    r_ = next(), p_ = next(), G_ = next();
    pairs_ = vectors;
    parts_ = args_.column_parts + team_index_ * 3 * team_.size() * length;
    symmetric_ = p.symmetric && options_.n_iters < 0;
    if constexpr (kStreamed)
      F_ = all_F_ + first_row_, a_ = all_a_ + first_row_, s_ = all_s_ + first_row_;
  }

  // Loads weights and tile. Returns max |C_ij| over points of positive weight, or NaN.
  OTLOSS_DEVICE double load_rows(const SolveGroup<T>& p) {
    const T* a = p.a + row_offset_;
    const T* f = p.f + row_offset_;
    const T k = factor(options_.eps);
    double mass[2] = {0, 0};
    for (int i = thread_; i < rows_; i += kThreads) {
      a_[i] = a[i];
      F_[i] = options_.warm_start && a[i] > T(0) ? k * f[i] : T(0);
      mass[0] += static_cast<double>(a[i]);
    }
    for (int j = first_column_ + thread_; j < first_column_ + column_count_; j += kThreads)
      mass[1] += static_cast<double>(b_[j]);
    double largest[2] = {0, 0};  // max |C|, and 1 where it is not finite
    if constexpr (kStreamed)
      bound_costs(largest);
    else
      load_costs(largest);
    team_.template reduce<Sum>(mass);
    team_.template reduce<Max>(largest);
    mass_ = mass[0], ratio_ = mass[0] / mass[1];
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
    stages_ = {0, options_.eps, options_.eps};
    stage_ = -1;
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
      for_columns([&](int j) { trial_g_[j] = warm ? g[j] : T(0); });
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
    ++iterations_;
    double sums[6];
    if (symmetric_)
      row_sums(sums);
    else if constexpr (kStreamed)
      scalars(sums);
    else
      update_columns(sums);
    error_ = sums[0] / mass_;
    if (phase_ == Phase::kFixed) return fixed_turn(p, batch);
    if (symmetric_) return symmetric_turn(sums[1]);
    const Scalars scalars{sums[1],
                          4 * static_cast<double>(std::numeric_limits<T>::epsilon()) * sums[2],
                          error_, sums[3] / mass_};
    return pair_turn(scalars);
  }

  // f and g out, value.
  OTLOSS_DEVICE void finish(const SolveGroup<T>& p, int64_t batch, bool finite) {
    T* f = p.f + row_offset_;
    T* g = p.g + (b_ - p.b);
    T* value = team_.rank() == 0 && thread_ == 0 ? p.value + batch : nullptr;
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
      if (value) *value = nan;
      return;
    }
    set_eps(options_.eps);
    double sums[1] = {0};
    if (symmetric_)  // the mean of f and T(f)
      for_rows([&](int i, T& old) { F_[i] = T(0.5) * (F_[i] + k_ * old); });
    for (int i = thread_; i < rows_; i += kThreads) {
      f[i] = to_cost_ * F_[i];
      sums[0] += static_cast<double>(a_[i]) * static_cast<double>(f[i]);
    }
    const T* last = options_.n_iters == 0 ? trial_g_ : gt_;
    for_columns([&](int j) {
      g[j] = symmetric_ ? f[j - first_column_] : last[j];
      sums[0] += static_cast<double>(weight(j)) * static_cast<double>(g[j]);
    });
    if (options_.objective == Objective::kTransport) {
      publish(g);
      if constexpr (kStreamed)
        sums[0] = streamed_transport();
      else
        sums[0] = transport();
    }
    team_.template reduce<Sum>(sums);
    if (value) *value = static_cast<T>(sums[0]);
  }

  // --------------------------------------------------------------------------------- small parts

  OTLOSS_DEVICE static T factor(double eps) { return static_cast<T>(kLog2E / eps); }

  OTLOSS_DEVICE void set_eps(double eps) {
    eps_ = eps;
    k_ = factor(eps);
    to_cost_ = static_cast<T>(eps / kLog2E);
  }

  // b_j, scaled to the total of a: weights that were rounded differently must not keep the error
  // up.
  OTLOSS_DEVICE T weight(int j) const {
    return static_cast<T>(static_cast<double>(b_[j]) * ratio_);
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
      const T b = weight(j);
      team_.store(G_ + j, b > T(0) ? k_ * potential[j] + fast_log2(b) : static_cast<T>(kLog2Zero));
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

  // F exact for G, s = row sums before, and this block's column sums of the plan to parts_.
  OTLOSS_DEVICE void pass() {
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
      const T weight = counts ? a / sum : T(0);
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

  // The same for more columns than the registers of a block hold: rows first, a warp each, then
  // column sums, a panel of columns at a time.
  OTLOSS_DEVICE void wide_pass() {
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
    for (int j = thread_; j < m_; j += kThreads) {
      const T G = team_.load(G_ + j);
      T total = T(0);
      for (int i = 0; i < rows_; ++i)
        if (a_[i] > T(0)) total += a_[i] * fast_exp2(F_[i] + G - k_ * cost(i, j));
      team_.store(part(0) + j, total);
    }
  }

  // ------------------------------------------------------------------------------ the streamed
  // pass

  // Where the blocks of the team keep what does not fit into shared memory.
  OTLOSS_DEVICE void place_streamed() {
    const int64_t length = args_.vector_length;
    T* vectors = args_.streamed + team_index_ * kStreamedVectors * length;
    const auto next = [&] {
      T* v = vectors;
      vectors += length;
      return v;
    };
    all_F_ = next(), all_a_ = next(), all_s_ = next(), A_ = next(), U_ = next();
    scratch_ = vectors;  // (2, length)
    sweep_.sums = args_.shared.sums;
    sweep_.tiles.stages = args_.shared.tile;
    sweep_.tiles.stage = args_.shared.stage;
  }

  OTLOSS_DEVICE void place_points(int group, int64_t batch) {
    const SolveGroup<T>& p = args_.groups.items[group];
    const PackedPair<T>& points = args_.points[group];
    sweep_.tiles.kind = points.kind;
    sweep_.tiles.d = points.d;
    sweep_.tiles.symmetric = p.symmetric;
    x_ = packed_cloud(points.x, batch, points.d, p.n);
    y_ = packed_cloud(points.y, batch, points.d, p.m);
  }

  // The sweep over columns for this block's rows, or over rows for its columns.
  OTLOSS_DEVICE RowSums<T> sweep(bool over_rows) const {
    RowSums<T> sweep = sweep_;
    RowTiles<T>& tiles = sweep.tiles;
    tiles.k = k_;
    tiles.rows = over_rows ? y_ : x_, tiles.columns = over_rows ? x_ : y_;
    tiles.first = over_rows ? first_column_ : first_row_;
    tiles.last = tiles.first + (over_rows ? column_count_ : rows_);
    tiles.begin = 0, tiles.end = tiles.columns.count;
    tiles.G = over_rows ? A_ : G_;
    return sweep;
  }

  // F exact for G, s = row sums before; then gt and q = column sums of the plan over b.
  OTLOSS_DEVICE void streamed_pass() {
    softmin(block_, sweep(false), a_, F_, s_, scratch_ + 2 * first_row_);
    if (symmetric_) return;
    for (int i = thread_; i < rows_; i += kThreads)
      team_.store(A_ + first_row_ + i, F_[i] + log2_weight(a_[i]));
    for_columns([&](int j) { U_[j] = k_ * trial_g_[j]; });
    team_.sync();
    softmin(block_, sweep(true), b_ + first_column_, U_ + first_column_, trial_q_ + first_column_,
            scratch_ + 2 * first_column_);
    for_columns([&](int j) { trial_gt_[j] = to_cost_ * U_[j]; });
  }

  // <P, C> over this thread's share, for the published G.
  OTLOSS_DEVICE double streamed_transport() {
    RowSums<T> rows = sweep(false);
    T* const costs = scratch_ + 2 * first_row_;
    rows.what = RowSum::kCost, rows.tiles.F = F_, rows.out = costs;
    reduce_rows(block_, rows);
    double total = 0;
    for (int i = thread_; i < rows_; i += kThreads)
      total += static_cast<double>(a_[i]) * static_cast<double>(costs[i]);
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
    const double reach = sqrt(norms[0]) + sqrt(norms[1]);
    largest[0] = sweep_.tiles.kind == CostKind::kSqEuclidean ? reach * reach
                 : sweep_.tiles.kind == CostKind::kEuclidean ? reach
                                                             : 2;
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

  // For a cloud against itself: sums = marginal error, <a, f>.
  OTLOSS_DEVICE void row_sums(double (&sums)[6]) {
    for (double& sum : sums) sum = 0;
    for (int i = thread_; i < rows_; i += kThreads) {
      const double a = static_cast<double>(a_[i]);
      const double off = static_cast<double>(s_[i]) - 1;
      sums[0] += a * (off < 0 ? -off : off);
      sums[1] += a * static_cast<double>(to_cost_) * static_cast<double>(F_[i]);
    }
    team_.template reduce<Sum>(sums);
  }

  // gt and q of the evaluated point from the column sums of all blocks; sums = marginal error, dual
  // value, its absolute size, <b, gt - g>, columns not to be trusted, 0.
  OTLOSS_DEVICE void update_columns(double (&sums)[6]) {
    team_.sync();  // the parts are there
    join_columns();
#pragma unroll 1
    for (bool guarded = false;; guarded = true) {
      scalars(sums);
      if (guarded || !(sums[4] > 0)) break;
      guard_columns();
    }
  }

  OTLOSS_DEVICE bool untrusted_column(T b, T c) const {
    return b > T(0) && !(trusted(c / b) && static_cast<double>(c) > least_column<T>() * mass_);
  }

  OTLOSS_DEVICE void set_column(int j, T c) {
    const T b = weight(j);
    const T q = b > T(0) ? c / b : T(1);
    trial_q_[j] = untrusted_column(b, c) ? static_cast<T>(-1) : q;
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

  OTLOSS_DEVICE void scalars(double (&sums)[6]) {
    for (double& sum : sums) sum = 0;
    for_columns([&](int j) {
      const double b = static_cast<double>(weight(j)), q = static_cast<double>(trial_q_[j]);
      const double g = static_cast<double>(trial_g_[j]);
      sums[0] += b * (q < 1 ? 1 - q : q - 1);
      sums[1] += b * g;
      sums[2] += b * (g < 0 ? -g : g);
      sums[3] += b * (static_cast<double>(trial_gt_[j]) - g);
      sums[4] += q < 0 ? 1 : 0;
    });
    for (int i = thread_; i < rows_; i += kThreads) {
      const double term = static_cast<double>(a_[i]) * (eps_ / kLog2E) * static_cast<double>(F_[i]);
      sums[1] += term;
      sums[2] += term < 0 ? -term : term;
    }
    team_.template reduce<Sum>(sums);
  }

  // Columns whose sums cannot be trusted (q < 0), again with the maximum subtracted: each block for
  // its rows, then joined.
  OTLOSS_DEVICE void guard_columns() {
    for (int j = thread_; j < m_; j += kThreads) {
      T largest = static_cast<T>(2 * kLog2Zero), sum = T(0);
      for (int i = 0; i < rows_; ++i) {
        const T t = F_[i] + log2_weight(a_[i]) - k_ * cost(i, j);
        largest = t > largest ? t : largest;
      }
      for (int i = 0; i < rows_; ++i)
        sum += fast_exp2(F_[i] + log2_weight(a_[i]) - k_ * cost(i, j) - largest);
      team_.store(part(1) + j, largest);
      team_.store(part(2) + j, sum);
    }
    team_.sync();
    for_columns([&](int j) {
      if (!(trial_q_[j] < T(0))) return;
      OnlineLse<T> lse;
      for (int rank = 0; rank < team_.size(); ++rank) {
        OnlineLse<T> other;
        other.max = team_.load(part_of(1, rank) + j);
        other.sum = team_.load(part_of(2, rank) + j);
        lse.merge(other);
      }
      trial_gt_[j] = -to_cost_ * lse.value();
      const T t = k_ * (trial_g_[j] - trial_gt_[j]);
      trial_q_[j] = fast_exp2(t < static_cast<T>(kExp2Limit) ? t : static_cast<T>(kExp2Limit));
    });
  }

  // ------------------------------------------------------------------------------------ the solver

  OTLOSS_DEVICE bool fixed_turn(const SolveGroup<T>& p, int64_t batch) {
    if (p.trace != nullptr) {
      T* trace = p.trace + (batch * options_.n_iters + iterations_ - 1) * (p.n + p.m);
      for (int i = thread_; i < rows_; i += kThreads) trace[first_row_ + i] = to_cost_ * F_[i];
      for_columns([&](int j) { trace[p.n + j] = trial_gt_[j]; });
    }
    swap_points();  // the result is read from gt_
    for_columns([&](int j) { trial_g_[j] = gt_[j]; });
    if (iterations_ == options_.n_iters) return false;
    evaluated_ = trial_g_;
    return true;
  }

  // f <- f + 2/3 (T(f) - f) from T(0) - <a, T(0)> / 2. f stands in g_.
  OTLOSS_DEVICE bool symmetric_turn(double mean) {
    if (phase_ == Phase::kSymmetricFirst) {
      const T half = static_cast<T>(0.5 * mean / mass_);
      for_rows([&](int i, T& f) { f = a_[i] > T(0) ? to_cost_ * F_[i] - half : T(0); });
      phase_ = Phase::kSymmetric;
    } else {
      if (error_ <= options_.tol || iterations_ >= options_.max_iters) return false;
      for_rows([&](int i, T& f) { f += T(2.0 / 3.0) * (to_cost_ * F_[i] - f); });
    }
    for_rows([&](int i, T& f) { F_[i] = k_ * f; });
    evaluated_ = g_;
    return true;
  }

  // Rows and columns are cut alike when a cloud is against itself.
  template <typename F>
  OTLOSS_DEVICE void for_rows(F&& function) {
    for (int i = thread_; i < rows_; i += kThreads) function(i, g_[first_column_ + i]);
  }

  OTLOSS_DEVICE void swap_points() {
    const auto exchange = [](T*& x, T*& y) {
      T* const z = x;
      x = y, y = z;
    };
    exchange(g_, trial_g_), exchange(gt_, trial_gt_), exchange(q_, trial_q_);
  }

  OTLOSS_DEVICE bool may_stage() const { return iterations_ + 1 < options_.max_iters - 1; }

  // The point in trial_* was evaluated.
  OTLOSS_DEVICE bool pair_turn(const Scalars& trial) {
    if (phase_ == Phase::kTrial) {
      const bool accepted = trial.value >= point_.value + kSufficient * t_ * slope_ - point_.noise;
      if (!accepted) {
        t_ *= kShrink;
        if (++attempt_ < kTries && iterations_ + 1 < max_iters_) return try_step();
        return try_plain();
      }
    }
    const bool keep_pair = phase_ == Phase::kTrial;
    point_ = trial;
    if (phase_ == Phase::kStart && stage_ < 0 && begin_stages()) return true;
    move(keep_pair, trial.mean);
    const bool last = stage_ >= stages_.count;
    const double tol = last || options_.tol > kStageTol ? options_.tol : kStageTol;
    max_iters_ = options_.max_iters - (last ? 0 : 1);
    if (!(point_.error > tol) || iterations_ >= max_iters_) return next_stage();
    attempt_ = 0;
    t_ = 1;
    slope_ = step_.slope;
    if (iterations_ + 1 >= max_iters_) return try_plain();
    for_columns([&](int j) {
      T p = static_cast<T>(step_.on_r) * r_[j];
      for (int slot = 0; slot < kSlots; ++slot) {
        if (step_.on_s[slot] == 0 && step_.on_y[slot] == 0) continue;
        p += static_cast<T>(step_.on_s[slot]) * step_of(slot)[j] +
             static_cast<T>(step_.on_y[slot]) * change_of(slot)[j];
      }
      p_[j] = p;
    });
    return try_step();
  }

  OTLOSS_DEVICE bool try_step() {
    phase_ = Phase::kTrial;
    for_columns([&](int j) { trial_g_[j] = g_[j] + static_cast<T>(t_) * p_[j]; });
    evaluated_ = trial_g_;
    return true;
  }

  // A Sinkhorn iteration, which always ascends.
  OTLOSS_DEVICE bool try_plain() {
    phase_ = Phase::kPlain;
    forget();
    for_columns([&](int j) { trial_g_[j] = gt_[j]; });
    evaluated_ = trial_g_;
    return true;
  }

  OTLOSS_DEVICE void forget() {
    block_.sync();
    if (thread_ == 0) gram_.count = 0;
    block_.sync();
  }

  // After the first evaluation, at eps: whether stages come before it.
  OTLOSS_DEVICE bool begin_stages() {
    double residual[1] = {0};
    for_columns([&](int j) {
      const double r = static_cast<double>(trial_gt_[j] - trial_g_[j]);
      residual[0] = Max::join(residual[0], r < 0 ? -r : r);
    });
    team_.template reduce<Max>(residual);
    if (stages_wanted(point_.error, residual[0], eps_))
      stages_ = make_stages(options_.eps, sigma());
    stage_ = 0;
    if (stages_.count == 0) return false;
    if (!may_stage()) {
      stage_ = stages_.count;
      return false;
    }
    return start_stage();
  }

  // Evaluates trial_g_ at the eps of the stage.
  OTLOSS_DEVICE bool start_stage() {
    const double eps = stages_.at(stage_);
    const T scale = static_cast<T>(eps_ / eps);
    block_.sync();
    for (int i = thread_; i < rows_; i += kThreads) F_[i] *= scale;
    set_eps(eps);
    forget();
    phase_ = Phase::kStart;
    evaluated_ = trial_g_;
    return true;
  }

  // The stage is done: g_ goes on, one half step further. False: it was the last.
  OTLOSS_DEVICE bool next_stage() {
    if (stage_ >= stages_.count) return false;
    ++stage_;
    if (!may_stage()) stage_ = stages_.count;
    for_columns([&](int j) { trial_g_[j] = gt_[j]; });
    return start_stage();
  }

  OTLOSS_DEVICE T* step_of(int slot) const { return pairs_ + 2 * slot * args_.vector_length; }
  OTLOSS_DEVICE T* change_of(int slot) const {
    return pairs_ + (2 * slot + 1) * args_.vector_length;
  }

  // Makes the trial point the point: its residual r, the new pair, all inner products that the
  // step needs in one reduction, and the step.
  OTLOSS_DEVICE void move(bool keep_pair, double mean) {
    constexpr int kNewS = 0, kNewY = kSlots, kYy = 2 * kSlots, kSr = 3 * kSlots, kYr = 4 * kSlots,
                  kDs = 5 * kSlots, kDy = 6 * kSlots, kSs = 7 * kSlots, kDr = kSs + 1;
    double sums[kDr + 1];
#pragma unroll
    for (double& sum : sums) sum = 0;
    const int slot = step_.slot;
    unsigned active = keep_pair ? 1u << slot : 0u;
    if (keep_pair)
      for (int i = 0; i < gram_.count; ++i) active |= 1u << gram_.order[i];
    const T middle = static_cast<T>(mean);
    for_columns([&](int j) {
      const T b = weight(j);
      const T r = b > T(0) ? trial_gt_[j] - trial_g_[j] - middle : T(0);
      T s = T(0), y = T(0);
      if (keep_pair) {
        s = b > T(0) ? trial_g_[j] - g_[j] : T(0);
        y = r_[j] - r;
        step_of(slot)[j] = s;
        change_of(slot)[j] = y;
      }
      r_[j] = r;
      const double w = static_cast<double>(b), wd = w * (1 - static_cast<double>(trial_q_[j]));
      const double ws = w * static_cast<double>(s), wy = w * static_cast<double>(y);
      const double wr = w * static_cast<double>(r);
#pragma unroll
      for (int k = 0; k < kSlots; ++k) {
        if ((active >> k & 1u) == 0) continue;
        const double sk = static_cast<double>(step_of(k)[j]);
        const double yk = static_cast<double>(change_of(k)[j]);
        sums[kNewS + k] += ws * yk;
        sums[kNewY + k] += wy * sk;
        sums[kYy + k] += wy * yk;
        sums[kSr + k] += wr * sk;
        sums[kYr + k] += wr * yk;
        sums[kDs + k] += wd * sk;
        sums[kDy + k] += wd * yk;
      }
      sums[kSs] += ws * static_cast<double>(s);
      sums[kDr] += wd * static_cast<double>(r);
    });
    team_.template reduce<Sum>(sums);
    swap_points();
    if (thread_ == 0) {
      if (keep_pair) {
#pragma unroll
        for (int k = 0; k < kSlots; ++k) {
          gram_.sy[slot][k] = sums[kNewS + k];
          gram_.sy[k][slot] = sums[kNewY + k];
          gram_.yy[slot][k] = gram_.yy[k][slot] = sums[kYy + k];
          gram_.sr[k] = sums[kSr + k];
          gram_.yr[k] = sums[kYr + k];
        }
        gram_.keep(slot, sums[kSs]);
      } else {
        gram_.count = 0;
      }
      step_.on_r = gram_.direction(step_.on_s, step_.on_y);
      double slope = step_.on_r * sums[kDr];
#pragma unroll
      for (int k = 0; k < kSlots; ++k)
        slope += step_.on_s[k] * sums[kDs + k] + step_.on_y[k] * sums[kDy + k];
      if (!(slope > 0)) {
        gram_.count = 0;
        step_.on_r = gram_.direction(step_.on_s, step_.on_y);
        slope = sums[kDr];
      }
      step_.slope = slope;
      step_.slot = gram_.free_slot();
    }
    block_.sync();
  }

  // Standard deviation of C_ij - mean_i - mean_j + mean over at most 256 x 256 points of positive
  // weight. Every block computes it for itself, from global memory.
  OTLOSS_DEVICE double sigma() {
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
  LbfgsGram& gram_;
  Step& step_;
  T* const exchange_;  // (2, kWarps, kRows)
  T* const columns_;   // (row_teams, columns of a row team), or (kThreads,)
  T* F_;               // (rows,) k f
  T* a_;               // (rows,)
  T* s_;               // (rows,) row sums before the update, over a

  int64_t n_, first_row_;
  int64_t row_offset_;  // of the first row, in (B, n)
  int m_, rows_, first_column_, column_count_, column_share_;
  const T* C_;            // (rows, m) of this block, global
  const T* tile_;         // (rows, m) of this block, where passes read it
  const T* b_;            // (m,)
  const T* row_weights_;  // (n,)
  int warps_, row_teams_;
  bool wide_, symmetric_;
  T *g_, *gt_, *q_;                    // (m,) the point
  T *trial_g_, *trial_gt_, *trial_q_;  // (m,) the point under evaluation
  T *r_, *p_;                          // (m,) residual, direction
  const T* evaluated_;                 // (m,) g_ or trial_g_
  T* G_;                               // (m,) k g + log2 b of the point under evaluation
  T* pairs_;                           // (kSlots, 2, m)
  T* parts_;                           // (3, team_size, m)
  // Streamed:
  RowSums<T> sweep_;            // what is the same for all sweeps
  PackedCloud<T> x_, y_;        // the points
  T *all_F_, *all_a_, *all_s_;  // (n,) of all blocks
  T* A_;                        // (n,) F + log2 a, for all blocks to see
  T* U_;                        // (m,) k g, then k gt
  T* scratch_;                  // (2, max(n, m))
  double mass_, ratio_;
  double eps_;
  T k_, to_cost_;
  int exchange_parity_ = 0;

  int64_t iterations_, max_iters_;  // max_iters_: of the stage
  double error_;
  Phase phase_;
  Stages stages_;
  int stage_;
  Scalars point_;
  double slope_, t_;
  int attempt_;
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

template <typename T>
Shape shape_of(const Pack<SolveGroup<T>>& pack) {
  Shape shape;
  shape.element = sizeof(T);
  shape.most_entries = kEntries<T>;
  for (int i = 0; i < pack.count; ++i) {
    const SolveGroup<T>& p = pack.items[i];
    shape.problems += p.batch;
    shape.n = std::max(shape.n, p.n);
    shape.m = std::max(shape.m, p.m);
    shape.entries = std::max(shape.entries, p.n * p.m);
  }
  return shape;
}

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
    arguments.vectors = context.scratch<T>(plan.teams * (kVectors + 1) * length);
  if (plan.regime != Regime::kStreamed)
    arguments.column_parts = context.scratch<T>(plan.teams * 3 * plan.team_size * length);
  arguments.team_parts = context.scratch<double>(plan.teams * 2 * plan.team_size * kTeamValues);
  arguments.counters = context.scratch<unsigned>(plan.teams * kCounterStride);
  if (plan.barrier == Barrier::kGrid)
    clear(context, arguments.counters, plan.teams * kCounterStride * sizeof(unsigned));
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
