// How a solve is laid out on a GPU: which regime, how many blocks per problem, what stands in
// shared memory. Host code; docs/cuda-performance.md explains the model.
#pragma once

#include <cstdint>
#include <string>

#include "core/lbfgs.h"
#include "core/step_control.h"
#include "cuda/device/limits.h"

namespace otloss::cuda {

// Values that a block shows the others of its team at once: all inner products of the solver.
constexpr int kTeamValues = LbfgsGram::kVectors * LbfgsGram::kBasis;
// Values of every thread that are reduced at once, and the doubles of shared memory that takes.
constexpr int kReduced = 8;
constexpr int64_t team_doubles(int threads) { return kReduced * (threads / kWarp + 1); }
static_assert(kReduced <= kTeamValues, "they share the buffers between blocks");

// Threads of a block: so few that each may have 255 registers, which the sums of the tensor cores
// need.
#if !defined(OTLOSS_SOLVE_THREADS)
#define OTLOSS_SOLVE_THREADS 256  // the host emulation uses fewer
#endif
constexpr int kSolveThreads = OTLOSS_SOLVE_THREADS;

// Of the instance for small problems in single precision, of which several run on a multiprocessor
// at once, with the narrowest panel only.
constexpr int kSmallThreads = kSolveThreads / 2, kSmallBlocks = 3;

// Of the block that goes over all vectors of a streamed problem between its sweeps.
constexpr int kControlThreads = 2 * kSolveThreads;

// Entries of a pass that a thread keeps in registers, of so many rows at most, and how many columns
// it has in the narrow and in the wide panel.
template <typename S>
constexpr int kEntries = sizeof(S) == 4 ? 64 : 32;
constexpr int kPanelRows = 8;
constexpr int kLeastColumns = 4;
constexpr int kMostColumns = 8;

// What a block knows of its team and of its share of the rows and columns, in shared memory.
// Written by one thread.
struct TeamState {
  int64_t index;  // of the team
  int64_t first_row;
  int m, rows, first_column, columns;
  int rank;         // of this block in the team
  int size;         // blocks of the team
  int parity;       // of the buffer for the next reduction
  double* partial;  // (2, size, kTeamValues) global
  double* scratch;  // team_doubles(threads), shared
};

// At the start of shared memory.
struct TeamScratch {
  double values[team_doubles(kControlThreads)];
  TeamState state;
};

// Of the solver's state, see state.cuh.
constexpr int64_t kSolverBytes = sizeof(LbfgsGram) + 2048;

// Vectors of the solver, each of one entry per column, see Solver::place.
constexpr int kVectors = 10 + 2 * LbfgsGram::kSlots;

// Where things are in shared memory, in bytes, after the TeamScratch. Made on the host, see
// plan.cpp.
struct SharedLayout {
  int64_t exchange, sums;  // of a pass, see PassWork
  int64_t state;           // kSolverBytes
  int64_t F;               // (rows,)
  int64_t a;               // (rows,)
  int64_t s;               // (rows,)
  int64_t vectors;         // (kVectors, m), or -1: in global memory
  int64_t tile;            // (rows, m)
  int64_t bytes;
};

// Regimes: resident, whose costs stand in the shared memory of one block, or of a cluster, for each
// problem; `dense`, a launch for each sweep over costs in global memory; or `streamed`, the same
// with costs nowhere.
enum class Regime : int { kAuto, kBlock, kCluster, kDense, kStreamed };

// What the plan depends on: the largest problem of a launch.
struct Shape {
  int64_t problems = 0;
  int64_t n = 0, m = 0;
  int64_t element = 4;  // bytes
};

// Where the tiles of a sweep come from: made by multiply-adds, or by tensor cores from points that
// are split into two halves, or from the high halves alone; or stored.
enum class TileKind : int { kFma, kTensor, kTensorHigh, kStored };

// How the blocks of a sweep share a problem: each has `rows`, and one of so many parts of the
// columns.
struct SweepCut {
  int64_t rows;
  int parts;

  int64_t blocks(int64_t count) const { return ceil_div(count, rows) * parts; }
};

struct SolvePlan {
  Regime regime;
  bool small;             // blocks of kSmallThreads
  int team_size;          // blocks per problem, of a launch for all or of a control
  int64_t vector_length;  // at least every m; launched: and every n
  SharedLayout shared;
  // Launched: who makes the tiles, and the sweeps for the rows' update and for the columns'.
  TileKind tiles;
  SweepCut cuts[2];
  int64_t room;   // bytes of shared memory for the makers of tiles
  double cycles;  // of a pass, by the model

  bool is_launched() const { return regime == Regime::kDense || regime == Regime::kStreamed; }
  std::string describe() const;
};

// Rows of a thread, and coordinates at once, of multiply-adds; bytes of two stages of 16 bytes of
// each lane for each coordinate, G and the norms. See fma_tiles.cuh. Of stored costs sums of rows.
constexpr int kTileRows = 8;
constexpr int kFmaChunk = 32;
constexpr int64_t kStoredRoom = kSolveThreads * static_cast<int64_t>(sizeof(double));
constexpr int64_t kFmaRoom = 2 * (kFmaChunk + 2) * kWarp * 16;

// The tile of a block by tensor cores. See tensor_tiles.cuh.
constexpr int kTensorRows = kSolveThreads / kWarp * 16;
constexpr int kTensorColumns = 64;

// Coordinates of a product of the tensor cores; clouds are padded to whole ones.
constexpr int64_t kMmaDepth = 16;
OTLOSS_HOST_DEVICE constexpr int64_t split_depth(int64_t d) {
  return ceil_div(d, kMmaDepth) * kMmaDepth;
}

// How points go through shared memory.
constexpr int kTensorStages = 3;
struct TensorStages {
  int depth;      // coordinates of a stage; 0: there is no room
  bool resident;  // all coordinates of the rows stay, the stages are for columns alone
  int bytes;      // of a stage
  int64_t all;    // bytes of all stages and the rows
};

// planes: 2 with low halves, else 1; room: bytes of shared memory.
OTLOSS_HOST_DEVICE TensorStages tensor_stages(int64_t d, int planes, int64_t room) {
  // A stage is long enough to copy the next one meanwhile, and rows only stay if it still is.
  constexpr int kStep = static_cast<int>(kMmaDepth), kMost = 4 * kStep, kLeast = 2 * kStep;
  constexpr int kExtra = 2 * static_cast<int>(sizeof(float)) * kTensorColumns;
  const int64_t padded = split_depth(d);
  const int most = padded < kMost ? static_cast<int>(padded) : kMost;
  const int least = most < kLeast ? most : kLeast, coordinate = 2 * planes;  // bytes
  for (const bool resident : {true, false})
    for (int depth = most; depth >= (resident ? least : kStep); depth -= kStep) {
      const int points = kTensorColumns + (resident ? 0 : kTensorRows);
      const int bytes = depth * coordinate * points + kExtra;
      const int64_t rows = resident ? padded * coordinate * kTensorRows : 0;
      const int64_t all = rows + kTensorStages * bytes;
      if (all <= room) return {depth, resident, bytes, all};
    }
  return {0, false, 0, 0};
}

// Of what a sweep is told, in shared memory: threads would keep it in local memory.
constexpr int64_t kArgumentBytes = 512;

// Points of a packed cloud are padded to whole tiles of all makers: what is beyond the last is
// read, but is there.
constexpr int64_t kPackedAlign = 128;
static_assert(kPackedAlign % kTensorRows == 0 && kPackedAlign % kTensorColumns == 0);
OTLOSS_HOST_DEVICE constexpr int64_t packed_stride(int64_t count) {
  return ceil_div(count, kPackedAlign) * kPackedAlign;
}

constexpr int kLargestCluster = 8;  // that every device with clusters has

// OTLOSS_CUDA_REGIME: auto, block, cluster, dense or streamed.
Regime forced_regime();

// For costs that are stored. Throws if a forced regime cannot run.
SolvePlan choose_plan(const Shape& shape, const Limits& limits, Regime forced);

// In launches; d: coordinates of the points that costs are made from, if they are.
SolvePlan choose_launched_plan(const Shape& shape, int64_t d, const Limits& limits, TileKind tiles);

// Whether a start between Gaussians (start.cu), of problems of a shape, takes less time than the
// passes it saves.
bool start_pays(const SolvePlan& plan, const Shape& shape, int d, const Limits& limits);

// How costs of points of d coordinates are made: by tensor cores where they serve, which is for
// float32 beyond kDirectDims coordinates, if a stage has room; without low halves if tf32 will do.
// OTLOSS_CUDA_TILES: auto, fma, tensor or high (without low halves).
TileKind choose_tiles(int64_t element, int64_t d, const Limits& limits, bool tf32);

}  // namespace otloss::cuda
