// The cost model of the solve. Cycles of one pass over the largest problem, the rest (column sums,
// vectors, barriers) included; problems beyond what runs at once multiply it.
#include "cuda/solve/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/costs.h"

namespace otloss::cuda {
namespace {

// Rates per multiprocessor and clock, from data sheets (docs/cuda-performance.md).
constexpr double kExponentials = 16;       // float32; the special function units' rate
constexpr double kDoubleExponentials = 4;  // float64: about 16 operations at 64 per clock
constexpr double kGlobalBytes = 19;        // 4.3 TB/s over 132 multiprocessors at 1.7 GHz
// Cycles of what surrounds the entries in a pass.
constexpr double kVectorCycles = 2500;  // reductions, quasi-Newton step: latency of one block
constexpr double kClusterSync = 850;    // every warp waits for its writes and drops L1
constexpr double kSyncsPerPass = 4;

// Launched: instructions per entry beside those on its coordinates, and how many run per clock;
// launches in a pass.
constexpr double kEntryOperations = 8;
constexpr double kOperations = 128;
constexpr double kLaunches = 4;
// With tensor cores: instructions per entry beside the products; cycles of a product of 16 x 8 x 16
// (1024 multiply-adds per clock: what mma.sync does on all architectures); cycles until the first
// columns of a sweep have arrived; bytes per clock from the L2 cache, for the sums of a sweep.
constexpr double kTensorOperations = 16;
constexpr double kMmaCycles = 2;
constexpr double kMmaEntries = 16 * 8;
constexpr double kFillCycles = 1500;
constexpr double kCacheBytes = 24;

// The start between Gaussians: passes that it saves at least (docs/solver.md), doubles per clock of
// its sums, cycles of a launch, of a rotation with its barriers, and rounds of rotations per
// dimension.
#if !defined(OTLOSS_START_PASSES)
#define OTLOSS_START_PASSES 2  // a test has it made for problems of any size
#endif
constexpr double kStartPasses = OTLOSS_START_PASSES;
constexpr double kDoubles = 32;
constexpr double kLaunch = 2000;
constexpr double kRotation = 900;
constexpr double kSweepsOfRotations = 6;

constexpr int64_t kAlign = 16;

int64_t ceil_to(int64_t value, int64_t multiple) { return ceil_div(value, multiple) * multiple; }

// Lays a block's shared memory out; bytes says whether it fits.
SharedLayout lay_out(const Shape& shape, int64_t rows, bool vectors) {
  SharedLayout layout{};
  layout.bytes = ceil_to(sizeof(TeamScratch), kAlign);
  const auto take = [&](int64_t bytes) {
    const int64_t offset = layout.bytes;
    layout.bytes = ceil_to(layout.bytes + bytes, kAlign);
    return offset;
  };
  layout.exchange = take(2 * (kSolveThreads / kWarp) * kPanelRows * shape.element);
  layout.sums = take(int64_t{kSolveThreads} * kMostColumns * shape.element);
  layout.state = take(kSolverBytes);
  layout.F = take(rows * shape.element);
  layout.a = take(rows * shape.element);
  layout.s = take(rows * shape.element);
  layout.vectors = vectors ? take(kVectors * ceil_to(shape.m, kWarp) * shape.element) : -1;
  layout.tile = take(rows * shape.m * shape.element);
  return layout;
}

// Shared memory for the makers of tiles.
int64_t room_for(int64_t d, const Limits& limits, TileKind tiles) {
  if (tiles == TileKind::kStored) return kStoredRoom;
  if (tiles == TileKind::kFma) return kFmaRoom;
  const int64_t all = static_cast<int64_t>(limits.shared_per_block) / kAlign * kAlign;
  return tensor_stages(d, tiles == TileKind::kTensor ? 2 : 1, all - kArgumentBytes).all;
}

double exponentials(const Shape& shape) {
  return shape.element == 4 ? kExponentials : kDoubleExponentials;
}

// Entries per clock of a multiprocessor.
double sweep_rate(const Shape& shape, int64_t d, TileKind tiles) {
  const double coordinates = static_cast<double>(d);
  if (tiles == TileKind::kStored)
    return std::min(exponentials(shape), kGlobalBytes / static_cast<double>(shape.element));
  if (tiles == TileKind::kFma) {
    const double operations = kEntryOperations + (d <= kDirectDims ? 2 * coordinates : coordinates);
    return kOperations * 4 / static_cast<double>(shape.element) / operations;
  }
  const double products = tiles == TileKind::kTensor ? 3 : 1;
  const double depths = static_cast<double>(split_depth(d) / kMmaDepth);
  return 1 / (products * depths * kMmaCycles / kMmaEntries + kTensorOperations / kOperations);
}

// Rows of a side that a block has.
int64_t block_rows(TileKind tiles, int side) {
  if (tiles == TileKind::kTensor || tiles == TileKind::kTensorHigh) return kTensorRows;
  return tiles == TileKind::kStored && side == 1 ? kWarp : kSolveThreads / kWarp * kTileRows;
}

// The parts with the fewest cycles of a sweep over all problems, which are added to `cycles`; the
// block that adds up the parts is alone with its problem. at_once: blocks, of so many entries per
// clock.
SweepCut choose_cut(const Shape& shape, int side, int64_t at_once, TileKind tiles, double rate,
                    double* cycles) {
  constexpr int kMostParts = 32;
  const char* const text = std::getenv("OTLOSS_CUDA_PARTS");
  const int forced = text == nullptr ? 0 : std::atoi(text), first = std::max(forced, 1);
  const bool tensor = tiles == TileKind::kTensor || tiles == TileKind::kTensorHigh;
  const int64_t rows = side == 0 ? shape.n : shape.m, columns = side == 0 ? shape.m : shape.n;
  SweepCut best{};
  double least = 0;
  for (int parts = first; parts <= (forced > 0 ? forced : kMostParts); ++parts) {
    const SweepCut cut{block_rows(tiles, side), parts};
    const int64_t share = ceil_to(ceil_div(columns, parts), kPackedAlign);
    const double entries = static_cast<double>(cut.rows * share);
    const int64_t turns = ceil_div(shape.problems * cut.blocks(rows), at_once);
    const double time = static_cast<double>(turns) * (entries / rate + (tensor ? kFillCycles : 0)) +
                        static_cast<double>(rows * parts * shape.element) / kCacheBytes;
    if (best.parts > 0 && !(time < least)) continue;
    best = cut, least = time;
  }
  *cycles += least;
  return best;
}

constexpr const char* kRegimes[] = {"auto", "block", "cluster", "dense", "streamed"};  // by number
const char* name_of(Regime regime) { return kRegimes[static_cast<int>(regime)]; }

// Of a problem in shared memory; cycles < 0: it does not fit.
SolvePlan resident_plan(const Shape& shape, const Limits& limits, int team_size, bool small) {
  SolvePlan plan{};
  plan.regime = team_size == 1 ? Regime::kBlock : Regime::kCluster;
  plan.small = small;
  plan.team_size = team_size;
  plan.vector_length = ceil_to(shape.m, kWarp);
  const int64_t rows = ceil_div(shape.n, team_size), blocks = small ? kSmallBlocks : 1;
  const int64_t limit = static_cast<int64_t>(limits.shared_per_block) / blocks;
  const int64_t columns =
      small ? kSmallThreads * kLeastColumns : int64_t{kSolveThreads} * kMostColumns;
  plan.shared = lay_out(shape, rows, team_size == 1);
  if (plan.shared.bytes > limit) plan.shared = lay_out(shape, rows, false);
  const int64_t at_once = std::max<int64_t>(1, limits.multiprocessors * blocks / team_size);
  const double entries = static_cast<double>(blocks * rows) * static_cast<double>(shape.m);
  const double sync = team_size > 1 ? kSyncsPerPass * kClusterSync : 0;
  plan.cycles = static_cast<double>(ceil_div(shape.problems, at_once)) *
                (entries / exponentials(shape) + kVectorCycles + sync);
  const bool clusters = team_size == 1 || limits.compute_capability >= 90;
  const bool compiled = !small || shape.element == 4;
  if (plan.shared.bytes > limit || shape.m > columns || !clusters || !compiled) plan.cycles = -1;
  return plan;
}

}  // namespace

std::string SolvePlan::describe() const {
  const std::string predicted =
      ", " + std::to_string(static_cast<int64_t>(cycles)) + " cycles per pass predicted";
  const auto cut = [this](int side) {
    return std::to_string(cuts[side].rows) + " by 1/" + std::to_string(cuts[side].parts);
  };
  if (is_launched())
    return std::string(name_of(regime)) + ", a launch for each sweep, costs " +
           (tiles == TileKind::kStored ? "read from global memory"
            : tiles == TileKind::kFma  ? "made on the way by multiply-adds"
                                       : "made on the way by tensor cores") +
           ", a block has " + cut(0) + " of the columns, then " + cut(1) + " of the rows" +
           predicted;
  return std::string(name_of(regime)) + ", " + std::to_string(team_size) +
         (team_size == 1 ? " block" : " blocks") + " per problem, cost tile in shared memory, " +
         std::to_string(shared.bytes) + " bytes of it" + predicted;
}

Regime forced_regime() {
  const char* text = std::getenv("OTLOSS_CUDA_REGIME");
  if (text == nullptr || *text == '\0') return Regime::kAuto;
  for (int regime = 0; regime < static_cast<int>(std::size(kRegimes)); ++regime)
    if (std::string(text) == kRegimes[regime]) return static_cast<Regime>(regime);
  throw std::runtime_error(
      std::string("otloss: OTLOSS_CUDA_REGIME must be auto, block, cluster, dense or streamed, ") +
      "got " + text);
}

SolvePlan choose_plan(const Shape& shape, const Limits& limits, Regime forced) {
  std::vector<SolvePlan> plans;
  plans.push_back(choose_launched_plan(shape, 0, limits, TileKind::kStored));
  plans.push_back(resident_plan(shape, limits, 1, true));
  for (int size = 1; size <= kLargestCluster; size *= 2)
    plans.push_back(resident_plan(shape, limits, size, false));
  const SolvePlan* best = nullptr;
  for (const SolvePlan& plan : plans)
    if (plan.cycles >= 0 && (forced == Regime::kAuto || plan.regime == forced) &&
        (best == nullptr || plan.cycles < best->cycles))
      best = &plan;
  if (best == nullptr)
    throw std::runtime_error(
        "otloss: no way to solve problems of " + std::to_string(shape.n) + " x " +
        std::to_string(shape.m) +
        " with costs stored on this GPU with OTLOSS_CUDA_REGIME=" + name_of(forced));
  return *best;
}

bool start_pays(const SolvePlan& plan, const Shape& shape, int d, const Limits& limits) {
  if (shape.problems == 0) return false;
  const double wide = static_cast<double>(d);
  const double points = 0.5 * static_cast<double>(shape.n) + 1.5 * static_cast<double>(shape.m);
  const int64_t turns = ceil_div(shape.problems, limits.multiprocessors);
  // A round touches every entry of two matrices twice.
  const double round = kRotation + 6 * wide * wide / kDoubles;
  const double cycles =
      points * wide * wide / kDoubles + kSweepsOfRotations * (d > 1 ? wide : 0.0) * round;
  return kLaunch + static_cast<double>(turns) * cycles <= kStartPasses * plan.cycles;
}

TileKind choose_tiles(int64_t element, int64_t d, const Limits& limits, bool tf32) {
  const char* text = std::getenv("OTLOSS_CUDA_TILES");
  const std::string name = text == nullptr || *text == '\0' ? "auto" : text;
  if (name != "auto" && name != "fma" && name != "tensor" && name != "high")
    throw std::runtime_error("otloss: OTLOSS_CUDA_TILES must be auto, fma, tensor or high, got " +
                             name);
  if (element != 4 || d <= kDirectDims || name == "fma") return TileKind::kFma;
  const bool high = name == "auto" ? tf32 : name == "high";
  const TileKind wanted = high ? TileKind::kTensorHigh : TileKind::kTensor;
  return room_for(d, limits, wanted) > 0 ? wanted : TileKind::kFma;
}

SolvePlan choose_launched_plan(const Shape& shape, int64_t d, const Limits& limits,
                               TileKind tiles) {
  // Two blocks share a multiprocessor where they only wait for memory.
  const int64_t shared = tiles == TileKind::kStored ? 2 : 1,
                at_once = shared * limits.multiprocessors;
  const double rate = sweep_rate(shape, d, tiles) / static_cast<double>(shared);
  SolvePlan plan{};
  plan.regime = tiles == TileKind::kStored ? Regime::kDense : Regime::kStreamed;
  plan.tiles = tiles;
  plan.team_size = 1;
  plan.vector_length = packed_stride(std::max(shape.n, shape.m));
  plan.shared.vectors = -1;
  plan.room = room_for(d, limits, tiles);
  plan.cycles = 2 * kVectorCycles + kLaunches * kLaunch;
  for (int side = 0; side < 2; ++side)
    plan.cuts[side] = choose_cut(shape, side, at_once, tiles, rate, &plan.cycles);
  return plan;
}

}  // namespace otloss::cuda
