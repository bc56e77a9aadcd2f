// A solve whose costs stand in shared memory (resident) or in global memory (dense): the
// one-exponential sweep of csrc/cpu/simd/sweep.cpp by pass.cuh.
//
// No maximum is subtracted: the last potential is the guess that keeps the exponents
//     t_ij = F_i + G_j - k C_ij
// near 0. Rows whose sums leave the trusted range are made again with their largest entry 1;
// columns, by a loop of their own, since that is rare once rows are right.
#pragma once

#include "cuda/solve/state.cuh"

namespace otloss::cuda {

// Row sums outside [1 / kTrustedRow, kTrustedRow] are made again. This is narrower than `trusted`,
// so that a row's share of clamped exponentials has a known bound: a column sum under least_column
// times the mass may owe digits to them and is made again, too.
constexpr double kTrustedRow = 1048576.0;  // 2^20

template <typename T>
OTLOSS_HOST_DEVICE double least_column() {
  // kTrustedRow * 2^-kExp2Limit / machine epsilon
  return sizeof(T) == 4 ? 0x1p-83 : 0x1p-54;
}
static_assert(kExp2Limit == 126.0 && kTrustedRow == 0x1p20, "least_column is derived from these");

// F exact for G, s = row sums before, and column sums of the plan of F, damped where rows are: a
// factor for each row is all that takes.
template <typename T, class Block>
struct SoftminWork {
  static constexpr bool kApart = false, kGuarded = true;
  using Column = T;  // G

  TeamMemory<Block> memory;
  const T* tile;  // (rows, m)
  const T* G;     // (m,)
  const T* a;     // (rows,)
  T* F;           // (rows,)
  T* s;           // (rows,)
  T k, tilt;

  OTLOSS_DEVICE T none() const { return static_cast<T>(kLog2Zero); }
  OTLOSS_DEVICE T no_column() const { return static_cast<T>(kLog2Zero); }
  // A row that does not count must give finite entries.
  OTLOSS_DEVICE T row(int i) const { return a[i] > T(0) ? F[i] : none(); }
  OTLOSS_DEVICE T column(int j) const { return memory.load(G + j); }
  OTLOSS_DEVICE T exponent(T G, T c) const { return G - k * c; }
  // In this order: F and G may share a constant that is large beside the costs.
  OTLOSS_DEVICE T entry(T F, T G, T c) const { return fast_exp2(F + G - k * c); }
  OTLOSS_DEVICE T term(T, T entry) const { return entry; }
  OTLOSS_DEVICE bool bad(int i, T sum) const {
    return a[i] > T(0) &&
           !(sum > static_cast<T>(1.0 / kTrustedRow) && sum < static_cast<T>(kTrustedRow));
  }
  OTLOSS_DEVICE T finish(int i, const Outcome<T>& row, bool leader) const {
    const T weight = a[i];
    const bool counts = weight > T(0);
    const T exact = row.value - fast_log2(row.sum);
    if (leader) {
      F[i] = counts ? exact : T(0);
      const T before =
          row.value == row.first_value ? row.first_sum : fast_exp2(row.first_value - exact);
      s[i] = counts ? before : T(1);
    }
    if (!counts) return T(0);
    const T w = weight / row.sum;
    return tilt == T(0) ? w : w * fast_exp2(tilt * exact);
  }
};

template <typename T, class Block, int kThreads>
class StoredCosts {
 public:
  using Team = TeamSweep<T, Block, kThreads>;
  static constexpr bool kUpdatesColumns = false;  // by pass()

  OTLOSS_DEVICE StoredCosts(Block& block, const SolveArguments<T>& arguments, Team& team,
                            SolverState<T>& state)
      : block_(block), args_(arguments), team_(team), s_(state) {}

  OTLOSS_DEVICE void place(const SolveGroup<T>& p, int64_t batch) {
    s_.F = team_.template at<T>(args_.shared.F);
    s_.a = team_.template at<T>(args_.shared.a);
    s_.s = team_.template at<T>(args_.shared.s);
    s_.C = p.C + (batch * p.n + team_.first_row()) * p.m;
    s_.tile = args_.shared.tile >= 0 ? team_.template at<T>(args_.shared.tile) : s_.C;
  }

  // The tile to where it is read from, and max |C|, or 1 in the second place.
  OTLOSS_DEVICE void load(double (&largest)[2]) {
    const T* const C = s_.C;
    if (args_.shared.tile >= 0) {
      T* const tile = team_.template at<T>(args_.shared.tile);
      const int64_t entries = static_cast<int64_t>(team_.rows()) * team_.share().m;
      for (int64_t e = block_.thread(); e < entries; e += Team::kThreads) tile[e] = C[e];
    }
    block_.sync();
    const int64_t m = team_.share().m;
    team_.for_entries([&](int i, int j) {
      if (!(s_.a[i] > T(0) && s_.b[j] > T(0))) return;
      const T c = C[i * m + j], magnitude = c < T(0) ? -c : c;
      if (!(magnitude <= std::numeric_limits<T>::max())) largest[1] = 1;
      largest[0] = Max::join(largest[0], static_cast<double>(magnitude));
    });
  }

  OTLOSS_DEVICE void pass() {
    const SoftminWork<T, Block> work{team_.memory(), s_.tile, s_.G, s_.a,
                                     s_.F,           s_.s,    s_.k, s_.tilt};
    team_.pass(work, !s_.symmetric);
  }

  // gt and q of the evaluated point from the column sums of all blocks; -1 where they are not to be
  // trusted.
  OTLOSS_NOINLINE void columns() {
    double least = least_column<T>() * s_.mass_x;
    if (s_.soft) {
      // Rows count by their factors; none is large enough if one overflows.
      const double largest = static_cast<double>(s_.tilt) * s_.least_f;
      least *= largest > kExp2Limit ? std::numeric_limits<double>::infinity()
                                    : fast_exp2(largest > 0 ? largest : 0.0);
    }
    team_.join([&](int j, T c) {
      const T b = s_.w[j], q = b > T(0) ? c / b : T(1);
      const bool good = !(b > T(0)) || (trusted(q) && static_cast<double>(c) > least);
      s_.q[j] = good ? q : static_cast<T>(-1);
      s_.trial_gt[j] = b > T(0) ? s_.trial_g[j] - s_.to_cost * fast_log2(q) : T(0);
    });
  }

  // Those columns again with the maximum subtracted: each block for its rows, then joined.
  OTLOSS_NOINLINE void guard() {
    const T damping = static_cast<T>(s_.damping), k = s_.k;
    const int rows = team_.rows(), m = team_.share().m;
    for (int j = block_.thread(); j < m; j += Team::kThreads) {
      const auto exponent = [&](int i) {
        return damping * s_.F[i] + log2_weight(s_.a[i]) -
               k * s_.tile[static_cast<int64_t>(i) * m + j];
      };
      const T none = static_cast<T>(2 * kLog2Zero);
      const T largest = join_over<Max>(0, 1, rows, none, exponent);
      team_.store(part(0, team_.team().rank()) + j, largest);
      team_.store(part(1, team_.team().rank()) + j, join_over<Sum>(0, 1, rows, T(0), [&](int i) {
                    return fast_exp2(exponent(i) - largest);
                  }));
    }
    team_.sync();
    team_.for_columns([&](int j) {
      if (!(s_.q[j] < T(0))) return;
      OnlineLse<T> lse;
      for (int rank = 0; rank < team_.team().size(); ++rank) {
        OnlineLse<T> other;
        other.max = team_.load(part(0, rank) + j);
        other.sum = team_.load(part(1, rank) + j);
        lse.merge(other);
      }
      s_.trial_gt[j] = -s_.to_cost * lse.value();
      const T t = k * (s_.trial_g[j] - s_.trial_gt[j]);
      s_.q[j] = fast_exp2(t < static_cast<T>(kExp2Limit) ? t : static_cast<T>(kExp2Limit));
    });
  }

  // <P, C> over this thread's share, for the published G.
  OTLOSS_NOINLINE double transport() const {
    const int64_t m = team_.share().m;
    const T *a = s_.a, *F = s_.F, *G = s_.G, *tile = s_.tile;
    const T k = s_.k;
    double total = 0;
    team_.for_entries([&](int i, int j) {
      if (!(a[i] > T(0))) return;
      const T c = tile[i * m + j], t = F[i] + team_.load(G + j) - k * c;
      // A clamped exponential stands for 0.
      if (t > static_cast<T>(-kExp2Limit))
        total += static_cast<double>(a[i]) * static_cast<double>(fast_exp2(t) * c);
    });
    return total;
  }

  OTLOSS_DEVICE T entry(int i, int j) const {
    const int64_t row = sample(i, s_.group->n) - team_.first_row(), m = team_.share().m;
    return s_.C[row * m + sample(j, m)];
  }

 private:
  // (m,) of a block: largest exponents, or sums.
  OTLOSS_DEVICE T* part(int which, int rank) const {
    const int size = team_.team().size();
    return args_.guarded + ((team_.index() * 2 + which) * size + rank) * args_.vector_length;
  }

  Block& block_;
  const SolveArguments<T>& args_;
  Team& team_;
  SolverState<T>& s_;
};

}  // namespace otloss::cuda
