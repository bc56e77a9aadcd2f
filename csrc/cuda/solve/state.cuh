// What the blocks of a solve know, once per block in shared memory: threads hold nothing of it
// between passes. One thread writes, between two barriers (Team::one), all read.
#pragma once

#include <limits>

#include "core/group_shifts.h"
#include "core/lbfgs.h"
#include "core/math.h"
#include "core/penalty.h"
#include "core/rounding.h"
#include "core/step_control.h"
#include "cuda/device/components.cuh"
#include "cuda/device/team.cuh"
#include "cuda/pass/pack.cuh"
#include "cuda/solve/plan.h"
#include "kernels.h"

namespace otloss::cuda {

// Sums that are no pass over a point: see FarMass. kProof: what a duality gap takes; kJoin: the
// components of the plan; kGroup: row updates for the columns of a group alone.
enum class FarWork { kNone, kProof, kJoin, kGroup };

constexpr int kGroups = 16;  // at most

// What is known of the groups of a problem; by one thread, but for the shifts, which all read.
struct GroupTable {
  double M[kGroups * kGroups], A[kGroups], B[kGroups];  // see GroupProblem
  double lacking[kGroups];                              // what the plan lacks of B
  double t[kGroups], largest, gain;                     // the best shifts, and what they promise
  double numbers[GroupShifts<>::numbers(kGroups, kGroups)];
  int32_t indices[GroupShifts<>::indices(kGroups, kGroups)];
};

// Memory for groups, or null: they are not looked for.
template <typename T>
struct FarMemory {
  int64_t count;       // of nodes
  int* nodes;          // (problems, count) columns, from vector_length on rows
  T* rows;             // (problems, count) F of the point
  GroupTable* groups;  // (problems,)
};

template <typename T>
struct SolveArguments {
  Pack<SolveGroup<T>> groups;
  TeamArguments team;
  SolveOptions options;
  SharedLayout shared;
  int64_t vector_length;        // at least every m, and a multiple of 32
  const T* starts[kMaxGroups];  // (B, m) to begin at, or null
  T* vectors;                   // (problems, kVectors, vector_length), where not in shared memory
  T* parts;                     // (problems, 2, team_size, vector_length), resident
  FarMemory<T> far;
};

// What is iterated: starts first, then Next says what the evaluated point is.
enum class Phase { kFixed, kSymmetricFirst, kSymmetric, kStart, kSecondStart, kPair };

// The scalars of one evaluated point, <b, gt - g> over the mass, and a bound of the error of the
// value (FarMassRule), where one is known.
struct Scalars : PointScalars {
  double mean = 0, bound = 0;

  Scalars() = default;
  OTLOSS_HOST_DEVICE Scalars(double value, double noise, double error, double mean)
      : PointScalars{value, noise, error}, mean(mean) {}
};

// Points of a side that tell how varied the cost is: all of few, and some evenly of many.
constexpr int kSample = 256;
OTLOSS_HOST_DEVICE int sample_size(int64_t count) {
  return count < kSample ? static_cast<int>(count) : kSample;
}
OTLOSS_HOST_DEVICE int64_t sample(int number, int64_t count) {
  return number * count / sample_size(count);
}

// The quasi-Newton step, made by one warp for all.
struct Step {
  double on[LbfgsGram::kBasis];  // the direction
  double slope, first;           // of the value along it, and the factor to try first
  double residual;               // <r, r>
  StepLength length;
  int slot;  // for the next pair
};

template <typename T>
struct SolverState {
  const SolveGroup<T>* group;
  int64_t batch;
  const T* weights;       // (n,) of all rows
  const T* b;             // (m,)
  const T* start;         // (m,) to begin at, or null
  T* F;                   // (rows,) k f
  T* a;                   // (rows,)
  T* s;                   // (rows,) row sums before the update, over a
  T *g, *gt;              // (m,) the point
  T *trial_g, *trial_gt;  // (m,) the point under evaluation
  T* q;                   // (m,) its column sums over their targets
  T* w;                   // (m,) the weights b that the problem is solved with
  T* target;              // (m,) the target column sums, of the total of w
  T *r, *p;               // (m,) residual, direction
  T* G;                   // (m,) k g + log2 b of the point under evaluation
  T* pairs;               // (2, kSlots, m)
  const T* evaluated;     // (m,) g or trial_g
  Penalty x, y;
  bool soft;      // one of them
  bool balanced;  // every marginal of the call is a constraint
  bool symmetric;
  double max_cost;          // over points of positive weight
  double mass_x, mass_y;    // total weights
  double least_f, least_g;  // of the last find_least
  double eps, damping;      // damping of the rows
  T k, to_cost, tilt;       // tilt: damping - 1
  int64_t max_iters;        // of this solve
  StepControl control;
  Phase phase;
  Next next;      // what the point under evaluation is
  bool doubtful;  // mass that is small but has to go far may be hidden from the error
  FarWork work;   // what is made next, where that is no pass
  double least;   // log2 of the entries that join groups
  int groups, current, roots[kGroups + 1];  // how many, the one that is read, their lowest columns
  FarMassRule far;
  int64_t begun;  // passes before the stage
  Scalars trial;
  Scalars kept;  // of a start put aside, or of the point that a shift is compared with
  Step step;
  LbfgsGram gram;
  const T* C;     // (rows, m) of this block, global, where costs are stored
  const T* tile;  // (rows, m) where passes read it

  OTLOSS_DEVICE bool finite() const { return max_cost <= std::numeric_limits<double>::max(); }
  OTLOSS_DEVICE void set_eps(double value) {
    eps = value;
    k = static_cast<T>(kLog2E / eps);
    to_cost = static_cast<T>(eps / kLog2E);
    damping = x.damping(eps);
    tilt = static_cast<T>(-eps * x.rate * damping);
  }
  OTLOSS_DEVICE void swap_points() { swap(g, trial_g), swap(gt, trial_gt); }
  // The point and the one put aside, in r and p, which are not used yet.
  OTLOSS_DEVICE void swap_starts() {
    swap_points();
    swap(q, r);
    if (soft) swap(target, p);
  }

 private:
  OTLOSS_DEVICE static void swap(T*& u, T*& v) {
    T* const w = u;
    u = v, v = w;
  }
};
static_assert(sizeof(SolverState<double>) <= kSolverBytes, "raise kSolverBytes");

template <typename T>
OTLOSS_DEVICE double f_of(const SolverState<T>& state, int i) {
  return static_cast<double>(state.to_cost * state.F[i]);
}

// x log(x / y), 0 for x = 0.
OTLOSS_DEVICE double x_log_ratio(double x, double y) { return x > 0 ? x * log(x / y) : 0; }

// What a duality gap has of a row that sends a part of its weight, which costs `more` of each.
OTLOSS_DEVICE double sent(double weight, double part, double more, double eps) {
  const double u = weight * part;
  return u > 0 ? u * more + eps * x_log_ratio(u, weight) : 0;
}

template <typename T>
OTLOSS_DEVICE double roundoff() {
  return static_cast<double>(std::numeric_limits<T>::epsilon());
}

// A solve in many launches, see launched.cu; the plan is of the pack's largest problem.
template <typename T>
void solve_launched(const Context& context, const Pack<SolveGroup<T>>& pack,
                    const SolveOptions& options, const SolvePlan& plan, Packer<T>& packer);

// Where a solve may start from in place of 0, see start.cu. starts[i] (B, m): potentials of the
// columns of group i, or null: there is no formula, or it takes longer than it saves.
template <typename T>
void propose_starts(const Context& context, const Pack<SolveGroup<T>>& pack,
                    const SolveOptions& options, const SolvePlan& plan,
                    const T* (&starts)[kMaxGroups]);

// After the solves of a loss, see last_update.cu.
void update_in_double(const Context& context, const std::vector<SolveGroup<float>>& groups,
                      double eps);

// The arguments of a launch but for where costs are: workspace and layout by the plan.
template <typename T>
SolveArguments<T> solve_arguments(const Context& context, const Pack<SolveGroup<T>>& pack,
                                  const SolveOptions& options, const SolvePlan& plan,
                                  int64_t problems) {
  SolveArguments<T> arguments{};
  arguments.groups = pack;
  arguments.options = options;
  arguments.shared = plan.shared;
  arguments.vector_length = plan.vector_length;
  if (plan.shared.vectors < 0)
    arguments.vectors = context.scratch<T>(problems * kVectors * plan.vector_length);
  propose_starts(context, pack, options, plan, arguments.starts);
  if (options.n_iters < 0 && pack.items[0].penalties.balanced) {
    const int64_t count = plan.vector_length + shape_of<T>(pack).n;
    arguments.far = {count, context.scratch<int>(problems * count),
                     context.scratch<T>(problems * count), context.scratch<GroupTable>(problems)};
  }
  const int64_t parts = problems * 2 * plan.team_size;
  arguments.team.size = plan.team_size;
  if (plan.team_size > 1) arguments.team.parts = context.scratch<double>(parts * kTeamValues);
  return arguments;
}

}  // namespace otloss::cuda
