// A solve whose costs stand in shared memory: the one-exponential sweep of csrc/cpu/simd/sweep.cpp
// by pass.cuh. Columns whose sums leave the trusted range are made again by a loop of their own,
// since that is rare once rows are right.
#pragma once

#include "cuda/pass/pass.cuh"
#include "cuda/solve/state.cuh"

namespace otloss::cuda {

// A column sum under this times the mass may owe digits to clamped exponentials and is made again,
// too.
template <typename T>
OTLOSS_HOST_DEVICE double least_column() {
  // kTrustedRow * 2^-kExp2Limit / machine epsilon
  return sizeof(T) == 4 ? 0x1p-83 : 0x1p-54;
}
static_assert(kExp2Limit == 126.0 && kTrustedRow == 0x1p20, "least_column is derived from these");

template <typename T, class Block, int kThreads>
class ResidentCosts {
 public:
  using Team = cuda::Team<Block, kThreads>;

  OTLOSS_DEVICE ResidentCosts(Block& block, const SolveArguments<T>& arguments, Team& team,
                              SolverState<T>& state)
      : block_(block), args_(arguments), team_(team), s_(state) {}

  OTLOSS_DEVICE void place(const SolveGroup<T>& p, int64_t batch) {
    s_.F = team_.template at<T>(args_.shared.F);
    s_.a = team_.template at<T>(args_.shared.a);
    s_.s = team_.template at<T>(args_.shared.s);
    s_.C = p.C + (batch * p.n + team_.first_row()) * p.m;
    s_.tile = team_.template at<T>(args_.shared.tile);
  }

  // The tile to where it is read from, and max |C|, or 1 in the second place.
  OTLOSS_DEVICE void load(double (&largest)[2]) {
    block_.sync();  // the weights are there
    T* const tile = team_.template at<T>(args_.shared.tile);
    const int m = team_.m();
    team_.for_entries([&](int i, int j) {
      const T c = tile[i * m + j] = s_.C[static_cast<int64_t>(i) * m + j];
      if (!(s_.a[i] > T(0) && s_.b[j] > T(0))) return;
      const T magnitude = c < T(0) ? -c : c;
      if (!(magnitude <= std::numeric_limits<T>::max())) largest[1] = 1;
      largest[0] = Max::join(largest[0], static_cast<double>(magnitude));
    });
  }

  OTLOSS_DEVICE void pass() {
    run_pass<Team::kThreads>(
        block_,
        PassWork<T>{s_.tile, s_.G, s_.a, s_.F, s_.s, s_.k, s_.tilt, team_.rows(), team_.m(),
                    team_.size() == 1, !s_.symmetric, team_.template at<T>(args_.shared.exchange),
                    team_.template at<T>(args_.shared.sums), column_part(team_.rank())});
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
    const int size = team_.size();
    team_.for_columns([&](int j) {
      const T c = join_over<Sum>(0, 1, size, T(0),
                                 [&](int rank) { return team_.load(column_part(rank) + j); });
      const T b = s_.w[j], q = b > T(0) ? c / b : T(1);
      const bool good = !(b > T(0)) || (trusted(q) && static_cast<double>(c) > least);
      s_.q[j] = good ? q : static_cast<T>(-1);
      s_.trial_gt[j] = b > T(0) ? s_.trial_g[j] - s_.to_cost * fast_log2(q) : T(0);
    });
  }

  // Those columns again with the maximum subtracted: each block for its rows, then joined.
  OTLOSS_NOINLINE void guard() {
    const T damping = static_cast<T>(s_.damping), k = s_.k;
    const int rows = team_.rows(), m = team_.m();
    for (int j = block_.thread(); j < m; j += Team::kThreads) {
      const auto exponent = [&](int i) {
        return damping * s_.F[i] + log2_weight(s_.a[i]) - k * s_.tile[i * m + j];
      };
      const T none = static_cast<T>(2 * kLog2Zero);
      const T largest = join_over<Max>(0, 1, rows, none, exponent);
      team_.store(part(0, team_.rank()) + j, largest);
      team_.store(part(1, team_.rank()) + j, join_over<Sum>(0, 1, rows, T(0), [&](int i) {
                    return fast_exp2(exponent(i) - largest);
                  }));
    }
    team_.sync();
    team_.for_columns([&](int j) {
      if (!(s_.q[j] < T(0))) return;
      OnlineLse<T> lse;
      for (int rank = 0; rank < team_.size(); ++rank) {
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

  // Joins the components of the plan of the published G.
  static constexpr bool kJoins = true;
  OTLOSS_NOINLINE void join(const LargeEntries<T>& large) {
    T *const G = s_.G, *const sums = part(1, 0);
    team_.for_columns([&](int j) { team_.store(sums + j, s_.w[j] * s_.q[j]); });
    team_.sync();
    const int m = team_.m(), first = static_cast<int>(team_.first_row());
    team_.for_entries([&](int i, int j) {
      if (s_.a[i] > T(0))
        large.see(block_, first + i, j, s_.F[i] + team_.load(G + j) - s_.k * s_.tile[i * m + j],
                  s_.a[i], team_.load(sums + j));
    });
    team_.sync();
  }

  // See FarMass::gap: a warp for each row, whose sums are over what columns have too much, and of
  // costs times what they lack.
  OTLOSS_NOINLINE double sent_and_far(double lacking) {
    T *const G = s_.G, *const lack = part(1, 0);
    team_.for_columns([&](int j) {
      const T w = s_.w[j], q = s_.q[j];
      const T excess = w > T(0) && q > T(1) ? w - w / q : T(0);
      team_.store(G + j, s_.k * s_.g[j] + log2_weight(excess));
      team_.store(lack + j, w > T(0) && q < T(1) ? w * (T(1) - q) : T(0));
    });
    team_.sync();
    const int m = team_.m(), lane = block_.thread() % kWarp;
    double result = 0;
    for (int i = block_.thread() / kWarp; i < team_.rows(); i += Team::kWarps) {
      double sum = 0, far = 0;
      for (int j = lane; j < m; j += kWarp) {
        const T c = s_.tile[i * m + j], t = s_.F[i] + team_.load(G + j) - s_.k * c;
        const T lacks = team_.load(lack + j);
        if (t > static_cast<T>(-kExp2Limit)) sum += static_cast<double>(fast_exp2(t));
        if (lacks > T(0)) far += static_cast<double>(lacks * c);
      }
      sum = warp_join<Sum>(block_, sum), far = warp_join<Sum>(block_, far) / lacking;
      if (lane == 0) result += sent(static_cast<double>(s_.a[i]), sum, far - f_of(s_, i), s_.eps);
    }
    return result;
  }

  OTLOSS_DEVICE double left_out() const { return 0; }
  OTLOSS_DEVICE double rounding() const { return 0; }

  // <P, C> over this thread's share, for the published G.
  OTLOSS_NOINLINE double transport() const {
    const int m = team_.m();
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
    const int64_t row = sample(i, s_.group->n) - team_.first_row(), m = team_.m();
    return s_.C[row * m + sample(j, m)];
  }

 private:
  // (m,) of a block: column sums; largest exponents, and their sums.
  OTLOSS_DEVICE T* column_part(int rank) const { return part(0, rank); }
  OTLOSS_DEVICE T* part(int which, int rank) const {
    return args_.parts + ((team_.index() * 2 + which) * team_.size() + rank) * args_.vector_length;
  }

  Block& block_;
  const SolveArguments<T>& args_;
  Team& team_;
  SolverState<T>& s_;
};

}  // namespace otloss::cuda
