// The solve of a problem by a team of blocks: the solver of csrc/cpu/solve/solver.cpp as a state
// machine. Passes over the cost are made between its turns, by the blocks themselves (run) or by
// other launches (launched.cu). Each turn takes an evaluated point, and StepControl decides
// which is next, by one thread of each block on equal numbers, so that all blocks agree.
#pragma once

#include <limits>

#include "cuda/solve/far_mass.cuh"
#include "cuda/solve/quasi_newton.cuh"

namespace otloss::cuda {

template <typename T, class Block, class Costs>
class Solver : FarMass<T, Block, Costs> {
 public:
  using Base = FarMass<T, Block, Costs>;
  using Team = typename Costs::Team;

  OTLOSS_DEVICE Solver(Block& block, const SolveArguments<T>& arguments, const Costs& costs,
                       Team& team, SolverState<T>& state)
      : Base(block, arguments, costs, team, state),
        quasi_newton_(block, team, state, arguments.vector_length) {}

  OTLOSS_DEVICE void run() {
    team_.with_problem(args_.groups, [&](const SolveGroup<T>& p, int64_t batch) {
      if (open(p, batch)) do {
          if (s_.work == FarWork::kJoin)
            costs_.join(this->large_entries());
          else if (s_.work != FarWork::kProof)
            costs_.pass();
        } while (turn());
      write_potentials();
      write_status();
    });
  }

  // Before the first pass. False: there is none.
  OTLOSS_DEVICE bool open(const SolveGroup<T>& p, int64_t batch) {
    team_.one([&] { this->place(p, batch); });
    const double max_cost = this->load();
    team_.one([&] { s_.max_cost = max_cost; });
    if (s_.finite()) start();
    if (!s_.finite() || options().n_iters == 0) return false;
    publish(s_.evaluated);
    return true;
  }

  // After the pass over the evaluated point: chooses the next. False: done.
  OTLOSS_DEVICE bool turn() {
    if (!judge()) return false;
    s_.work == FarWork::kGroup ? this->publish_group() : publish(s_.evaluated);
    return true;
  }

  OTLOSS_DEVICE void write_potentials() {
    if (s_.finite())
      finish();
    else
      fill_with_nan();
  }

  // Whether the value is <P, C>, of the potentials that were written, which publish_result() makes
  // ready for a pass.
  OTLOSS_DEVICE bool is_transport() const {
    return s_.finite() && options().objective == Objective::kTransport;
  }
  OTLOSS_DEVICE void publish_result() { publish(s_.group->g + s_.batch * s_.group->m); }
  using Base::large_entries;

  OTLOSS_DEVICE void write_status() {
    const SolveGroup<T>& p = *s_.group;
    const double value = s_.finite() ? this->value_of(p.f + row_offset(), p.g + s_.batch * p.m)
                                     : std::numeric_limits<double>::quiet_NaN();
    if (!team_.first_thread()) return;
    double* const status = p.status + s_.batch * kStatusFields;
    status[kStatusIterations] = static_cast<double>(s_.control.passes());
    status[kStatusError] = s_.control.stop().final_error();
    status[kStatusConverged] = s_.control.stop().reached() && !s_.doubtful ? 1.0 : 0.0;
    status[kStatusMaxCost] = s_.max_cost;
    status[kStatusTerm] = p.coefficient * value;
  }

 private:
  // ---------------------------------------------------------------------------------- a problem

  // The first point to evaluate.
  OTLOSS_DEVICE void start() {
    const bool warm = options().warm_start;
    const T* const from = warm ? s_.group->g + s_.batch * s_.group->m : s_.start;
    if (s_.symmetric) {
      const T* const f = s_.group->f + row_offset();
      for_own([&](int i, T& v) { v = warm ? f[i] : T(0); });
    } else {
      team_.for_columns([&](int j) { s_.trial_g[j] = from ? from[j] : T(0); });
    }
    team_.one([&] {
      s_.next = Next::kStage;
      s_.doubtful = false, s_.work = FarWork::kNone;
      begin_stage(0);
      s_.gram.count = 0, s_.step.slot = 0;
      s_.phase = s_.symmetric             ? warm ? Phase::kSymmetric : Phase::kSymmetricFirst
                 : options().n_iters >= 0 ? Phase::kFixed
                                          : Phase::kStart;
      s_.evaluated = s_.symmetric ? s_.g : s_.trial_g;
    });
  }

  // By one thread.
  OTLOSS_DEVICE void begin_stage(int64_t passes) { s_.far = FarMassRule(), s_.begun = passes; }

  OTLOSS_DEVICE bool judge() {
    team_.one([&] { s_.control.count_passes(1); });
    if (s_.work != FarWork::kNone) return this->examine() || settle();
    if (s_.phase == Phase::kSymmetricFirst) {
      centre_start();
      return true;
    }
    if (s_.symmetric) return symmetric_turn();
    this->update_columns();
    return s_.phase == Phase::kFixed ? fixed_turn() : pair_turn();
  }

  // f and g out.
  OTLOSS_NOINLINE void finish() {
    const SolveGroup<T>& p = *s_.group;
    T *const f = p.f + row_offset(), *const g = p.g + s_.batch * p.m;
    team_.one([&] { s_.set_eps(options().eps); });
    const T damping = static_cast<T>(s_.damping), k = s_.k;
    if (s_.symmetric) {  // a further step, which makes the value exact to second order
      const T last = static_cast<T>(SymmetricRule(s_.damping).last);
      for_own([&](int i, T& old) {
        const T start = k * old;
        s_.F[i] = start + last * (damping * s_.F[i] - start);
      });
    } else {
      team_.for_rows([&](int i) { s_.F[i] *= damping; });
    }
    team_.for_rows([&](int i) { f[i] = s_.to_cost * s_.F[i]; });
    const T* last = options().n_iters == 0 ? s_.trial_g : s_.gt;
    team_.for_columns([&](int j) { g[j] = s_.symmetric ? f[j - team_.first_column()] : last[j]; });
  }

  OTLOSS_NOINLINE void fill_with_nan() {
    const SolveGroup<T>& p = *s_.group;
    const T nan = std::numeric_limits<T>::quiet_NaN();
    T *const f = p.f + row_offset(), *const g = p.g + s_.batch * p.m;
    team_.for_rows([&](int i) { f[i] = nan; });
    team_.for_columns([&](int j) { g[j] = nan; });
    for (int64_t l = 0; p.trace != nullptr && l < options().n_iters; ++l) {
      T* const trace = p.trace + (s_.batch * options().n_iters + l) * (p.n + p.m);
      team_.for_rows([&](int i) { trace[team_.first_row() + i] = nan; });
      team_.for_columns([&](int j) { trace[p.n + j] = nan; });
    }
  }

  // ------------------------------------------------------------------------------------ the solver

  OTLOSS_DEVICE bool fixed_turn() {
    const SolveGroup<T>& p = *s_.group;
    const int64_t passes = s_.control.passes();
    if (p.trace != nullptr) {
      T* const trace = p.trace + (s_.batch * options().n_iters + passes - 1) * (p.n + p.m);
      const T to_cost = s_.to_cost * static_cast<T>(s_.damping);
      team_.for_rows([&](int i) { trace[team_.first_row() + i] = to_cost * s_.F[i]; });
      team_.for_columns([&](int j) { trace[p.n + j] = s_.trial_gt[j]; });
    }
    team_.one([&] {
      s_.control.observe(s_.trial);
      s_.swap_points();  // the result is read from gt
      s_.evaluated = s_.trial_g;
    });
    team_.for_columns([&](int j) { s_.trial_g[j] = s_.gt[j]; });
    return passes != options().n_iters;
  }

  OTLOSS_DEVICE void centre_start() {
    double mean[1] = {0};
    team_.for_rows(
        [&](int i) { mean[0] += static_cast<double>(s_.a[i]) * static_cast<double>(s_.F[i]); });
    team_.sum(mean);
    const T part = static_cast<T>(SymmetricRule(s_.damping).centre * mean[0] / s_.mass_x);
    const T to_cost = s_.to_cost * static_cast<T>(s_.damping);
    for_own([&](int i, T& f) { f = s_.a[i] > T(0) ? to_cost * (s_.F[i] - part) : T(0); });
    team_.one([&] { s_.phase = Phase::kSymmetric; });
    for_own([&](int i, T& f) { s_.F[i] = s_.k * f; });
  }

  OTLOSS_NOINLINE bool symmetric_turn() {
    this->observe_symmetric();
    if (s_.control.stop().ends() || s_.control.passes() >= s_.max_iters) return false;
    const T step = static_cast<T>(SymmetricRule(s_.damping).relaxation);
    const T to_cost = s_.to_cost * static_cast<T>(s_.damping);
    for_own([&](int i, T& f) {
      f += step * (to_cost * s_.F[i] - f);
      s_.F[i] = s_.k * f;
    });
    return true;
  }

  // The point in trial_* was evaluated.
  OTLOSS_DEVICE bool pair_turn() {
    if (s_.phase != Phase::kPair) {
      if (!begin()) return true;
    } else if (s_.next == Next::kStep && !s_.control.accepts(s_.trial)) {
      team_.one([&] { s_.next = s_.control.shorten(); });
      return evaluate_next();
    } else if (s_.next == Next::kShift && !this->keeps_shift()) {
      return settle();
    }
    quasi_newton_.move();
    team_.one([&] { s_.next = s_.control.move_to(s_.trial); });
    this->doubt();
    return s_.work != FarWork::kNone || settle();
  }

  // The point is judged, and next says what follows.
  OTLOSS_NOINLINE bool settle() {
    const StopRule& stop = s_.control.stop();
    if (s_.doubtful) team_.one([&] { s_.next = s_.control.go_on(); });
    if (stop.keeps()) keep();
    if (s_.next == Next::kDone && stop.returns_kept()) return_kept();
    if (s_.next != Next::kDone && s_.control.may_begin_stages(false)) stray();
    if (s_.next == Next::kStep) {
      team_.one([&] { s_.control.aim(s_.step.slope, s_.step.first); });
      quasi_newton_.set_direction();
    }
    return evaluate_next();
  }

  // Iterations that began near the solution, as it seemed, go to the first stage after all if they
  // are not near yet.
  OTLOSS_NOINLINE void stray() {
    if (is_near_at(s_.g, s_.gt)) return;
    const double varied = this->sigma();
    team_.one([&] { s_.next = s_.control.begin_stages(false, varied) ? Next::kStage : s_.next; });
  }

  // Of the point that was evaluated last, whose scalars are in trial.
  OTLOSS_DEVICE bool is_near_at(const T* g, const T* gt) {
    double residual[1] = {0};
    team_.for_columns([&](int j) {
      const double r = static_cast<double>(gt[j] - g[j]);
      residual[0] = Max::join(residual[0], r < 0 ? -r : r);
    });
    team_.template reduce<Max>(residual);
    return is_near(s_.trial.error, residual[0], s_.eps);
  }

  // Sets the point that next asks for. False: done.
  OTLOSS_NOINLINE bool evaluate_next() {
    const Next next = s_.next;
    if (next == Next::kDone) return false;
    T* const trial = s_.trial_g;
    if (next == Next::kStep) {
      const T t = static_cast<T>(s_.control.length());
      const T *g = s_.g, *p = s_.p;
      team_.for_columns([&](int j) { trial[j] = g[j] + t * p[j]; });
    } else {
      const T* gt = s_.gt;
      team_.for_columns([&](int j) { trial[j] = gt[j]; });
    }
    if (next == Next::kStage) scale_rows();
    team_.one([&] {
      if (next != Next::kStep) s_.gram.count = 0;
      if (next == Next::kStage) begin_stage(s_.control.passes());
      s_.set_eps(s_.control.eps());
      s_.evaluated = trial;
    });
    return true;
  }

  // Row potentials at the eps of the stage.
  OTLOSS_DEVICE void scale_rows() {
    const T scale = static_cast<T>(s_.eps / s_.control.eps());
    team_.for_rows([&](int i) { s_.F[i] *= scale; });
  }

  // The outputs keep the point; it becomes the one that is returned.
  OTLOSS_NOINLINE void keep() {
    T *const f = s_.group->f + row_offset(), *const g = s_.group->g + s_.batch * s_.group->m;
    team_.for_rows([&](int i) { f[i] = s_.F[i]; });
    team_.for_columns([&](int j) { g[j] = s_.gt[j]; });
  }

  OTLOSS_NOINLINE void return_kept() {
    T *const f = s_.group->f + row_offset(), *const g = s_.group->g + s_.batch * s_.group->m;
    team_.for_rows([&](int i) { s_.F[i] = f[i]; });
    team_.for_columns([&](int j) { s_.gt[j] = g[j]; });
  }

  // After the evaluation of a start. True: the iterations begin at the trial point; false: another
  // point is to be evaluated first. A start that was proposed but is far is put aside for 0.
  OTLOSS_NOINLINE bool begin() {
    bool near = is_near_at(s_.trial_g, s_.trial_gt);
    T* const kept_F = s_.group->f + row_offset();  // (rows,) where f will be
    if (s_.start != nullptr && s_.phase == Phase::kStart && s_.control.wants_other_start(near)) {
      team_.for_rows([&](int i) { kept_F[i] = s_.F[i], s_.F[i] = T(0); });
      team_.one([&] {
        s_.kept = s_.trial;
        s_.swap_starts();
        s_.phase = Phase::kSecondStart;
        s_.evaluated = s_.trial_g;
      });
      team_.for_columns([&](int j) { s_.trial_g[j] = T(0); });
      return false;
    }
    if (s_.phase == Phase::kSecondStart && !(s_.trial.value > s_.kept.value)) {
      near = false;
      team_.for_rows([&](int i) { s_.F[i] = kept_F[i]; });
      team_.one([&] {
        s_.trial = s_.kept;
        s_.swap_starts();
      });
    }
    const double varied = near ? 0.0 : this->sigma();
    team_.one([&] {
      s_.phase = Phase::kPair;
      s_.next = s_.control.begin_stages(near, varied) ? Next::kStage : s_.next;
    });
    if (s_.control.eps() == s_.eps) return true;
    scale_rows();
    team_.one([&] {
      s_.set_eps(s_.control.eps());
      s_.evaluated = s_.trial_g;
    });
    return false;
  }

  using Base::args_, Base::block_, Base::costs_, Base::s_, Base::team_;
  using Base::for_own, Base::options, Base::publish, Base::row_offset;

  QuasiNewton<T, Block, Team> quasi_newton_;
};

}  // namespace otloss::cuda
