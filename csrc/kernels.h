// What the kernels compute, as plain argument structs and launchers: no torch here or below.
//
// All matrices are row-major, and contiguous but for cost matrices made on a CPU, whose rows start
// on cache lines. A batch of B problems of one shape is a "group"; a call takes several groups (the
// xy, xx and yy of a divergence, say), whose problems run in parallel.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "core/costs.h"

namespace otloss {

// ---------------------------------------------------------------------------------------- solve

enum class Objective : int { kRegularized = 0, kTransport = 1 };

// On the plan's marginals: rho_x KL(P 1 | a) and rho_y KL(P^T 1 | b); infinite: P 1 = a.
struct Penalties {
  double rho_x = std::numeric_limits<double>::infinity();
  double rho_y = std::numeric_limits<double>::infinity();
  // Every marginal of the call is a constraint. Totals are then equal, potentials free up to a
  // constant, and the value is <a, f> + <b, g>, without -eps (sum P - sum a sum b).
  bool balanced = true;
};

// The regularisation of all problems of a batch, or of each: then `all` is NaN.
struct Eps {
  double all = 0;
  const double* each = nullptr;  // (B,) or null

  double of(int64_t p) const { return each ? each[p] : all; }
  operator double() const { return all; }  // for launchers that take one for all
};

struct SolveOptions {
  double eps;
  const double* each_eps;  // (B,) in place of eps, or null; null on a GPU
  double tol;              // on the L1 marginal error over the total mass
  int64_t max_iters;       // upper bound on passes over the cost
  int64_t n_iters;         // >= 0: the exact number of iterations, without a stopping test
  Objective objective;
  bool warm_start;  // g holds the start on entry
};

// One row of the status tensor, (B, kStatusFields) float64 per group.
enum StatusField : int {
  kStatusIterations,
  kStatusError,      // marginal error, an upper bound for the potentials returned
  kStatusConverged,  // 1 or 0
  kStatusMaxCost,    // max |C_ij| over points of positive weight
  kStatusTerm,       // coefficient * value: its part of the loss
  kStatusFields
};

// The points of the two sides, made ready (see CloudGroup): in place of a cost matrix, or beside it
// for a start.
template <typename T>
struct PointPair {
  CostKind kind;
  int64_t d;    // coordinates
  const T* zx;  // (B, n, d)
  const T* zy;  // (B, m, d)
  const T* hx;  // (B, n) norms
  const T* hy;  // (B, m)
  // Inner products may be made from 11 bits of each coordinate, where that is faster.
  bool tf32 = false;
  // Pairs of points that hold nothing of the plan are left out, found by bounds on nodes of a tree
  // (csrc/cpu/multiscale). Up to kMultiscaleDims coordinates.
  bool multiscale = false;
};

template <typename T>
struct SolveGroup {
  int64_t batch;   // B
  int64_t n;       // rows
  int64_t m;       // columns
  bool symmetric;  // a cloud against itself: C symmetric, a == b, one potential
  const T* C;      // (B, n, m), or null: costs are made from the points, row by row
  int64_t stride;  // distance of rows of C; m on a GPU
  bool shared;     // C is (1, n, m), of all problems; on a CPU
  PointPair<T> points;
  const T* a;          // (B, n)
  const T* b;          // (B, m)
  T* f;                // (B, n) in: start (warm_start), out: potential
  T* g;                // (B, m) likewise
  T* trace;            // (B, L, n + m) f and g after each iteration, or null
  double* status;      // (B, kStatusFields)
  double coefficient;  // of this group in the loss
  Penalties penalties = {};
  // (B, n + kStatusFields) f and the status, from an earlier call, or null. Of a symmetric group
  // that has no C, on a CPU.
  const double* known = nullptr;
  // 1: the last row and column are dummy points, which C and the points lack; see csrc/cpu/engines.
  int64_t dummies = 0;

  const T* matrix(int64_t p) const { return C && !shared ? C + p * (n - dummies) * stride : C; }
};

// The most coordinates of a multiscale solve, which takes costs of kMultiscale (core/costs.h).
constexpr int64_t kMultiscaleDims = 8;

// ------------------------------------------------------------------------------- solve_backward

// Weights and potentials of a group, and what its value is multiplied by in the gradient.
template <typename T>
struct SolvedGroup {
  int64_t batch;        // B
  int64_t n;            // rows
  int64_t m;            // columns
  const T* a;           // (B, n)
  const T* b;           // (B, m)
  const T* f;           // (B, n)
  const T* g;           // (B, m)
  const T* grad;        // (B,) of the loss
  T coefficient;        // of this group in the loss
  int64_t dummies = 0;  // as of SolveGroup
};

// Gradient of sum_B grad * coefficient * value at fixed potentials: P scaled, potentials centred.
template <typename T>
struct EnvelopeGroup : SolvedGroup<T> {
  const T* C;  // (B, n, m), without dummies
  T* grad_C;   // (B, n, m) or null; at fixed potentials without dummies, else with them
  T* grad_a;   // (B, n) or null
  T* grad_b;   // (B, m) or null
  Penalties penalties = {};
  bool shared = false;  // C is (1, n, m), of all problems; on a CPU

  const T* matrix(int64_t p) const {
    const int64_t entries = (this->n - this->dummies) * (this->m - this->dummies);
    return C && !shared ? C + p * entries : C;
  }
};

// What the gradient of the points of one side needs, without a matrix: with V = gradient_weight of
// the cost's gradient, that side as rows, V 1 and V y. CostGradientGroup does the rest.
template <typename T>
struct PointSums {
  T* sum;      // (B, n) out, or null: not wanted
  T* product;  // (B, n, d) out
};

// In place of C and its gradient, which are then null: the points that costs are made from.
template <typename T>
struct MadeCost {
  PointPair<T> points;
  bool symmetric;  // a cloud against itself: on a CPU x takes both sides' sums, y is null
  PointSums<T> x;
  PointSums<T> y;  // (B, m) (B, m, d)
};

// Gradient of the iterations that ran: the adjoint of each, from its potentials. f and g of the
// base are not read.
template <typename T>
struct UnrolledGroup : EnvelopeGroup<T> {
  const T* grad_f;  // (B, n) or null: further gradients, of the last potentials
  const T* grad_g;  // (B, m) or null
  int64_t L;        // iterations
  const T* trace;   // (B, L, n + m) f and g after each iteration
  const T* start;   // (B, m) g before the first, or null: 0
  MadeCost<T> made = {};
};

// Gradient of the solution, through the optimality conditions.
template <typename T>
struct ImplicitGroup : EnvelopeGroup<T> {
  const T* grad_f;  // (B, n) or null: further gradients, of the potentials
  const T* grad_g;  // (B, m) or null
  bool symmetric;   // a cloud against itself: one potential
  T* P;             // (B, n, m) scratch; may be grad_C; null where costs are made
  double* status;   // (B, kImplicitStatusFields)
  MadeCost<T> made = {};
  const PointPair<T>* given = nullptr;  // of a multiscale solve, as plan_sums takes them, or null
};

enum ImplicitStatusField : int {
  kImplicitIterations,
  kImplicitResidual,  // of the linear system, relative to its right-hand side
  kImplicitStatusFields
};

// What the gradient of the row points needs at fixed potentials: PointSums of the scaled plan.
template <typename T>
struct PointGradientGroup : SolvedGroup<T> {
  bool symmetric;  // a cloud against itself
  PointPair<T> points;
  T* sum;      // (B, n) out
  T* product;  // (B, n, d) out
};

// What both sides' points need, from one multiscale pass over the plan.
template <typename T>
struct PlanSumsGroup : SolvedGroup<T> {
  MadeCost<T> made;  // multiscale
  Penalties penalties = {};
};

// ------------------------------------------------------------------------------------- the plan

// P v at fixed potentials, by a multiscale pass.
template <typename T>
struct PlanProductGroup : SolvedGroup<T> {
  int64_t columns;  // of v
  PointPair<T> points;
  const double* v;  // (B, m, columns)
  double* out;      // (B, n, columns)
  Penalties penalties = {};
};

// What a duality gap takes of the plan, by two multiscale passes in double.
struct PlanGapGroup : SolvedGroup<double> {
  PointPair<double> points;
  const double* A;  // (B, n) marginals of a plan that is feasible, of one total
  const double* B;  // (B, m)
  double* rows;     // (B, n) out: sums of the plan, of what is kept
  double* columns;  // (B, m) out
  double* numbers;  // (B, 2) out: KL of the feasible plan, and at most the plan's mass not kept
  Penalties penalties = {};
};

// f, not damped, at points x that no solve has seen, by a multiscale pass; f of the base is not
// read.
struct ExtendGroup : SolvedGroup<double> {
  PointPair<double> points;
  double* out;  // (B, n)
};

// ------------------------------------------------------------------------------------ launchers

namespace cpu {

template <typename T>
void solve(const std::vector<SolveGroup<T>>& groups, const SolveOptions& options);
// The loss (B,) of the problems of `count` groups, from their status (count, B, kStatusFields).
template <typename T>
void combine_terms(int64_t count, int64_t batch, const double* status, T* loss);
template <typename T>
void envelope_backward(const std::vector<EnvelopeGroup<T>>& groups, const Eps& eps,
                       Objective objective);
template <typename T>
void unrolled_backward(const std::vector<UnrolledGroup<T>>& groups, const Eps& eps,
                       Objective objective);
template <typename T>
void implicit_backward(const std::vector<ImplicitGroup<T>>& groups, const Eps& eps,
                       Objective objective);
template <typename T>
void point_gradient_sums(const std::vector<PointGradientGroup<T>>& groups, const Eps& eps);
template <typename T>
void plan_sums(const std::vector<PlanSumsGroup<T>>& groups, double eps);
template <typename T>
void plan_products(const std::vector<PlanProductGroup<T>>& groups, double eps);
void plan_gaps(const std::vector<PlanGapGroup>& groups, double eps);
void extend(const std::vector<ExtendGroup>& groups, double eps);

}  // namespace cpu

// On a GPU. Everything is queued on the stream, nothing waits for the device.
namespace cuda {

// Where the kernels of one call run, and device memory for them that lives until the call returns.
struct Context {
  int device;
  void* stream;  // cudaStream_t
  void* (*allocate)(int64_t bytes, void* owner);
  void* owner;

  template <typename T>
  T* scratch(int64_t count) const {
    return static_cast<T*>(allocate(count * static_cast<int64_t>(sizeof(T)), owner));
  }
};

template <typename T>
void combine_terms(const Context& context, int64_t count, int64_t batch, const double* status,
                   T* loss);
template <typename T>
void solve(const Context& context, const std::vector<SolveGroup<T>>& groups,
           const SolveOptions& options);
// How this number of solves would be laid out, in words; d: coordinates of the points that costs
// are made from, or 0: costs are stored.
template <typename T>
std::string describe_plan(const Context& context, int64_t problems, int64_t n, int64_t m,
                          int64_t d);
template <typename T>
void envelope_backward(const Context& context, const std::vector<EnvelopeGroup<T>>& groups,
                       double eps, Objective objective);
template <typename T>
void unrolled_backward(const Context& context, const std::vector<UnrolledGroup<T>>& groups,
                       double eps, Objective objective);
template <typename T>
void implicit_backward(const Context& context, const std::vector<ImplicitGroup<T>>& groups,
                       double eps, Objective objective);
template <typename T>
void point_gradient_sums(const Context& context, const std::vector<PointGradientGroup<T>>& groups,
                         double eps);
template <typename T>
void plan_sums(const Context& context, const std::vector<PlanSumsGroup<T>>& groups, double eps);

}  // namespace cuda
}  // namespace otloss
