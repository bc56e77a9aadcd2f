// How a solve is laid out on a GPU: which regime, how many blocks per problem, what stands in
// shared memory. Host code; docs/gpu.md explains the model.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "lbfgs.h"
#include "limits.h"

namespace otloss::cuda {

// How the blocks of a team wait for each other, see team.cuh.
enum class Barrier : int { kBlock, kCluster, kGrid };

// Values that a block shows the others of its team at once: all inner products of the solver.
constexpr int kTeamValues = LbfgsGram::kVectors * LbfgsGram::kBasis;
// Values of every thread that are reduced at once, and the doubles of shared memory that takes.
constexpr int kReduced = 8;
constexpr int64_t team_doubles(int threads) { return kReduced * (threads / kWarp + 1); }
static_assert(kReduced <= kTeamValues, "they share the buffers between blocks");

#if !defined(OTLOSS_SOLVE_THREADS)
#define OTLOSS_SOLVE_THREADS 512  // the host emulation uses fewer
#endif
constexpr int kSolveThreads = OTLOSS_SOLVE_THREADS;

// Entries that a thread keeps in registers, and columns of them, at most.
template <typename T>
constexpr int kEntries = sizeof(T) == 4 ? 32 : 16;

// Vectors of the solver, each of one entry per column, see Solver::place.
constexpr int kVectors = 10 + 2 * LbfgsGram::kSlots;

// Where things are in shared memory, in bytes. Made on the host, see solve.cu.
struct SharedLayout {
  int64_t team;      // team_doubles doubles
  int64_t gram;      // LbfgsGram and Step
  int64_t exchange;  // (2, warps, kRows) row sums of a step
  int64_t columns;   // column sums on their way
  int64_t F;         // (rows,)
  int64_t a;         // (rows,)
  int64_t s;         // (rows,)
  int64_t vectors;   // (kVectors, m), or -1: in the workspace
  int64_t tile;      // (rows, m), or -1: in global memory; streamed: (2, stage) coordinates
  int64_t sums;      // (kStreamedSums,), streamed
  int64_t stage;     // elements of a stage, streamed
  int64_t bytes;
};

// The quasi-Newton step, made by one warp for all.
struct Step {
  double on[LbfgsGram::kBasis];  // the direction
  double slope, first;           // of the value along it, and the factor to try first
  double residual;               // <r, r>
  StepLength length;
  int slot;  // for the next pair
};

// Regimes: one block per problem, a cluster per problem, or the blocks of a cooperative launch
// divided among the problems; the cost tile in shared memory or, `dense`, in global memory, or,
// `streamed`, nowhere.
enum class Regime : int { kAuto, kBlock, kCluster, kGrid, kDense, kStreamed };

// What the plan depends on: the largest problem of a launch.
struct Shape {
  int64_t problems = 0;
  int64_t n = 0, m = 0;
  int64_t entries = 0;   // of the largest cost matrix
  int64_t element = 4;   // bytes
  int most_entries = 0;  // that a thread keeps in registers
};

struct SolvePlan {
  Regime regime;
  Barrier barrier;
  bool resident;
  int columns_per_thread;
  int team_size;
  int64_t teams;
  int64_t vector_length;
  SharedLayout shared;
  double cycles;  // of a pass, by the model

  std::string describe() const;
};

// Streamed: rows of a thread, rows of each row group whose sums are kept at once, and how many sums
// that is for a block. See streamed.cuh.
constexpr int kTileRows = 8;
constexpr int kStreamedRows = 256;
constexpr int kStreamedSums = kSolveThreads / kWarp * kStreamedRows;

// Points of a packed cloud are padded to whole lines, so that vectors of them are aligned.
constexpr int64_t kPackedAlign = 32;
static_assert(kPackedAlign % kTileRows == 0, "rows beyond the last are read, but are there");
OTLOSS_HOST_DEVICE constexpr int64_t packed_stride(int64_t count) {
  return ceil_div(count, kPackedAlign) * kPackedAlign;
}

constexpr int kManyColumns = 32;  // the same in the other, float32 only
constexpr int kFewColumns = 4;    // per thread, in the instance for few columns
constexpr int kLargestCluster = 16;

// OTLOSS_CUDA_REGIME: auto, block, cluster, grid, dense or streamed.
Regime forced_regime();

// `fits`: whether the device can run the plan's clusters. Throws if a forced regime cannot run.
SolvePlan choose_plan(const Shape& shape, const Limits& limits, Regime forced,
                      const std::function<bool(const SolvePlan&)>& fits);

// Whether a start between Gaussians (start.cu) takes less time than the passes it saves.
bool start_pays(const SolvePlan& plan, int64_t problems, int64_t n, int64_t m, int d,
                const Limits& limits);

// For costs that are made from points of d coordinates.
SolvePlan choose_streamed_plan(const Shape& shape, int64_t d, const Limits& limits, Regime forced);

}  // namespace otloss::cuda
