// Small mass that has to go far (FarMassRule, csrc/cpu/solve/far_mass.cpp): points within the
// tolerance whose value may be off are proven, or the groups that the plan falls into are shifted
// against each other.
//
// Groups are the connected components of large entries. What each sends to each takes no kernel of
// its own: with the columns of one group alone, a row update tells which part of a row goes there,
// however small it is. The shifts are found by one thread (core/group_shifts.h), of rows that are
// lumped together by their group.
#pragma once

#include "core/group_shifts.h"
#include "cuda/solve/evaluation.cuh"

namespace otloss::cuda {

// The best shifts of k groups, by one thread; none where they are not finite.
template <class Block>
OTLOSS_NOINLINE void find_shifts(Block block, GroupTable& of, int k, double eps) {
  const Penalty hard{0};
  const GroupProblem problem{k, k, of.M, of.A, of.B, hard, hard, eps};
  GroupShifts<> shifts(problem, of.numbers, of.indices);
  const double* const best = shifts.best();
  double largest = 0, gain = 0;
  for (int K = 0; K < k; ++K) {
    block.store(of.t + K, best[K]);
    largest = largest < fabs(best[K]) ? fabs(best[K]) : largest;
    gain += of.lacking[K] * best[K];
  }
  const bool finite = gain - gain == 0;
  block.store(&of.largest, finite ? largest : 0.0);
  block.store(&of.gain, finite ? gain : 0.0);
}

template <typename T, class Block, class Costs>
class FarMass : public Evaluation<T, Block, Costs> {
 public:
  using Base = Evaluation<T, Block, Costs>;
  using Base::Base;

  // Of the plan of the published G, for kJoin.
  OTLOSS_DEVICE LargeEntries<T> large_entries() const {
    return {static_cast<T>(s_.least), nodes(), static_cast<int>(args_.vector_length)};
  }

 protected:
  // Whether the value of the point, which ends the iterations or where these stall, may be off:
  // then they go on until that is no longer so, or as far as they can, and have not converged. What
  // examines it begins here.
  OTLOSS_DEVICE void doubt() {
    team_.one([&] {
      const StopRule& stop = s_.control.stop();
      const int64_t sweeps = s_.control.passes() - s_.begun;
      s_.doubtful = s_.next != Next::kStage && s_.control.at_last_stage() &&
                    s_.far.looks(stop, s_.trial.error, sweeps) &&
                    FarMassRule::suspicious(s_.trial.bound, s_.trial.error, options().tol,
                                            size_of(s_.trial.value));
      if (!s_.doubtful || !s_.far.examines(stop, sweeps)) return;
      if (stop.reached() && s_.control.may_pass(0))
        s_.work = FarWork::kProof;
      else
        look_for_groups(kLeast);
    });
    if (s_.work == FarWork::kJoin) separate();
  }

  // After what was to be made in place of a pass. True: more, or a shifted point, the trial.
  OTLOSS_NOINLINE bool examine() {
    if constexpr (!Costs::kJoins) return conclude(), false;
    if (s_.work == FarWork::kGroup) return take_group();
    s_.work == FarWork::kProof ? conclude() : take_groups();
    if (s_.work == FarWork::kJoin) separate();
    return s_.work != FarWork::kNone;
  }

  // Whether the shifted point, the trial, is better. Else all is as before.
  OTLOSS_DEVICE bool keeps_shift() {
    const double gain = s_.trial.value - s_.control.point().value;
    const bool much = is_much(gain);
    const bool keeps = much || (moves() && gain > -s_.control.point().noise);
    if (!keeps) restore_rows();
    team_.one([&] {
      if (keeps) {
        s_.far.shifted(much, s_.control.passes() - s_.begun);
        s_.control.restart();
      } else {
        s_.trial = s_.kept;
      }
    });
    return keeps;
  }

  // G of the columns of one group.
  OTLOSS_DEVICE void publish_group() {
    team_.for_columns([&](int j) {
      team_.store(s_.G + j, node(j) == s_.current ? s_.k * s_.g[j] + fast_log2(s_.w[j])
                                                  : static_cast<T>(kLog2Zero));
    });
    team_.sync();
  }

  using Base::args_, Base::block_, Base::costs_, Base::s_, Base::team_;
  using Base::options, Base::publish;

 private:
  static constexpr double kLeast = -10, kFewer = 2;  // see FarMass::shift of the CPU

  OTLOSS_DEVICE static double size_of(double value) { return value < 0 ? -value : value; }
  OTLOSS_DEVICE bool is_much(double gain) const {
    return FarMassRule::is_much(gain, options().tol, size_of(s_.control.point().value));
  }
  // Where rounding hides all progress only a gain is one.
  OTLOSS_DEVICE bool moves() const {
    return FarMassRule::is_shift(block_.load(&groups().largest), s_.eps) &&
           !s_.control.stop().stuck();
  }

  // Of the problem. Nodes: parents, later groups.
  OTLOSS_DEVICE int* nodes() const { return args_.far.nodes + team_.index() * args_.far.count; }
  OTLOSS_DEVICE int node(int number) const { return block_.load(nodes() + number); }
  OTLOSS_DEVICE int node_of_row(int i) const {
    return static_cast<int>(args_.vector_length + team_.first_row()) + i;
  }
  OTLOSS_DEVICE GroupTable& groups() const { return args_.far.groups[team_.index()]; }
  // Rows of the block that are put aside.
  OTLOSS_DEVICE T* kept_rows() const {
    return args_.far.rows + team_.index() * args_.far.count + team_.first_row();
  }
  OTLOSS_DEVICE void restore_rows() {
    const T* const kept = kept_rows();
    team_.for_rows([&](int i) { s_.F[i] = kept[i]; });
  }

  // Calls function(node, weight) for the nodes of the block's columns and rows.
  template <typename F>
  OTLOSS_DEVICE void for_nodes(F&& function) const {
    team_.for_columns([&](int j) { function(j, s_.w[j]); });
    team_.for_rows([&](int i) { function(node_of_row(i), s_.a[i]); });
  }

  // By one thread: the components of entries of more than 2^least follow, if passes are left for
  // them, for two groups, and for a shift.
  OTLOSS_DEVICE void look_for_groups(double least) {
    const bool may = Costs::kJoins && args_.far.nodes && s_.balanced && s_.control.may_pass(3);
    s_.work = may ? FarWork::kJoin : FarWork::kNone;
    s_.least = least;
    s_.evaluated = s_.g;
  }
  OTLOSS_DEVICE void separate() {
    for_nodes([&](int node, T) { block_.store(nodes() + node, node); });
  }

  OTLOSS_DEVICE void conclude() {
    const double bound = gap();
    team_.one([&] {
      s_.work = FarWork::kNone;
      s_.doubtful = !FarMassRule::proves(bound, options().tol, size_of(s_.trial.value));
      if (s_.doubtful) look_for_groups(kLeast);
    });
  }

  // The components of the plan are groups, numbered by their lowest columns, if they are not one or
  // too many.
  OTLOSS_DEVICE void take_groups() {
    for_nodes([&](int node, T) {
      block_.store(nodes() + node, find_root<false>(block_, nodes(), node));
    });
    team_.sync();
    int count = 0, last = -1;
    for (; count <= kGroups; ++count) {
      double next[1] = {Max::identity()};  // the lowest root after the last, negative
      team_.for_columns([&](int j) {
        if (j > last && s_.w[j] > T(0) && node(j) == j)
          next[0] = Max::join(next[0], -static_cast<double>(j));
      });
      team_.template reduce<Max>(next);
      if (next[0] == Max::identity()) break;
      last = -static_cast<int>(next[0]);
      team_.one([&] { s_.roots[count] = last; });
    }
    team_.one([&] {
      s_.groups = count, s_.current = 0;
      s_.work = count > 1 && s_.control.may_pass(count) ? FarWork::kGroup : FarWork::kNone;
      if (count > kGroups) look_for_groups(kFewer * s_.least);
    });
    if (s_.work != FarWork::kGroup) return;
    for_nodes([&](int node, T weight) {
      const int root = this->node(node);
      int group = -1;
      for (int K = 0; weight > T(0) && K < count; ++K) group = s_.roots[K] == root ? K : group;
      block_.store(nodes() + node, group);
    });
    weigh_groups();
    T* const kept = kept_rows();
    team_.for_rows([&](int i) { kept[i] = s_.F[i]; });
  }

  // A and B of the groups, of one total, and what the plan lacks of B.
  OTLOSS_DEVICE void weigh_groups() {
    GroupTable& of = groups();
    double of_rows = 0, of_columns = 0;
    for (int K = 0; K < s_.groups; ++K) {
      double sums[3] = {0, 0, 0};
      team_.for_rows([&](int i) {
        if (node(node_of_row(i)) == K) sums[0] += static_cast<double>(s_.a[i]);
      });
      team_.for_columns([&](int j) {
        const double w = static_cast<double>(s_.w[j]);
        if (node(j) == K) sums[1] += w, sums[2] += w * (1 - static_cast<double>(s_.q[j]));
      });
      team_.sum(sums);
      of_rows += sums[0], of_columns += sums[1];
      if (team_.first_thread()) of.A[K] = sums[0], of.B[K] = sums[1], of.lacking[K] = sums[2];
    }
    if (team_.first_thread())
      for (int K = 0; K < s_.groups; ++K) of.A[K] *= of_columns / of_rows;
  }

  // After the row update for the columns of a group: M of that group. After the last one the rows
  // are as before, and the shift follows, if there is one.
  OTLOSS_DEVICE bool take_group() {
    const T* const kept = kept_rows();
    for (int I = 0; I < s_.groups; ++I) {
      // log2 of what a row of group I sends there, and of the sum.
      const auto sent = [&](int i) {
        return node(node_of_row(i)) == I
                   ? static_cast<double>(log2_weight(s_.a[i]) + kept[i] - s_.F[i])
                   : Max::identity();
      };
      double most[1] = {Max::identity()}, sum[1] = {0};
      team_.for_rows([&](int i) { most[0] = Max::join(most[0], sent(i)); });
      team_.template reduce<Max>(most);
      team_.for_rows([&](int i) { sum[0] += exp2(sent(i) - most[0]); });
      team_.sum(sum);
      if (team_.first_thread())
        groups().M[I * s_.groups + s_.current] =
            -s_.eps * kLn2 * (most[0] + log2(sum[0] / groups().A[I]));
    }
    const bool more = s_.current + 1 < s_.groups;
    team_.one([&] { ++s_.current, s_.work = more ? FarWork::kGroup : FarWork::kNone; });
    return more || shift();
  }

  // Whether there is a shift, to the trial.
  OTLOSS_DEVICE bool shift() {
    restore_rows();
    GroupTable& of = groups();
    if (team_.first_thread()) find_shifts(block_, of, s_.groups, s_.eps);
    team_.sync();
    if (!(moves() || is_much(block_.load(&of.gain)))) return false;
    team_.for_columns([&](int j) {
      const int K = node(j);
      s_.trial_g[j] = s_.g[j] + (K < 0 ? T(0) : static_cast<T>(block_.load(of.t + K)));
    });
    team_.one([&] {
      s_.kept = s_.trial;
      s_.next = Next::kShift;
      s_.evaluated = s_.trial_g;
    });
    return true;
  }

  // A bound of the duality gap, as FarMass::gap of the CPU: of the plan with columns that have too
  // much scaled down, and a plan of rank 1 for what rows and columns lack then.
  OTLOSS_NOINLINE double gap() {
    double sums[4] = {0, 0, 0, 0};  // what columns lack, have, keep; the value of what they lack
    team_.for_columns([&](int j) {
      const double w = static_cast<double>(s_.w[j]), c = w * static_cast<double>(s_.q[j]);
      if (!(w > 0)) return;
      sums[1] += c, sums[2] += x_log_ratio(w < c ? w : c, c);
      if (!(w > c)) return;
      sums[0] += w - c;
      sums[3] += s_.eps * x_log_ratio(w - c, w) - (w - c) * static_cast<double>(s_.g[j]);
    });
    team_.sum(sums);
    const double s = sums[0], total = sums[1];
    if (!(s > 0)) return 0;
    double rows[1] = {costs_.sent_and_far(s)};
    team_.sum(rows);
    return sums[3] + rows[0] +
           s_.eps * (sums[2] - x_log_ratio(total - s, total) - x_log_ratio(s, total) - s * log(s));
  }
};

}  // namespace otloss::cuda
