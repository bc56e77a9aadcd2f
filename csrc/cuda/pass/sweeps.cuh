// Sweeps as launches: for every problem of a call the sums that it waits for. A block has some rows
// of a problem, and a part of its columns. Between two sweeps a block for each problem, its
// control, takes the sums and asks for the next ones.
#pragma once

#include <cstring>

#include "cuda/device/components.cuh"
#include "cuda/device/loop.cuh"
#include "cuda/device/team.cuh"
#include "cuda/pass/pack.cuh"
#include "cuda/pass/row_sums.cuh"

namespace otloss::cuda {

// The sums that a problem waits for.
template <typename T, typename S = T>
struct SweepOrder {
  RowSum what;
  int side;               // whose points are the rows; 0: the problem's rows
  const S* x;             // factors of the other side's points, or null
  T* exponents;           // of the rows in place of the side's, or null
  RowTiles<T> tiles;      // with the problem's rows as rows
  S* out;                 // (parts, length)
  LargeEntries<T> large;  // for kJoin; x has the column sums then, and the row sums are
  const T* weights;

  OTLOSS_DEVICE void ask(int of_side, RowSum of_what, const S* factors = nullptr,
                         T* of_rows = nullptr) {
    side = of_side, what = of_what, x = factors, exponents = of_rows;
  }
  // Exponents past the ends, by all threads of a control.
  template <class Block>
  OTLOSS_DEVICE void pad(Block& block) const {
    const auto fill = [&](T* F, const PackedCloud<T>& cloud) {
      for (int64_t i = cloud.count + block.thread(); i < cloud.stride; i += kControlThreads)
        F[i] = static_cast<T>(kLog2Zero);
    };
    fill(tiles.F, tiles.rows), fill(tiles.G, tiles.columns);
  }
};

// What the problems of a call ask for, and get.
template <typename T, typename S = T>
struct Sweeps {
  SweepOrder<T, S>* of;  // (problems,)
  SweepCut cuts[2];      // by side
  int64_t problems;
  int64_t blocks;  // of a problem
  int64_t length;  // at least every n and m
  int64_t room;    // see RowTiles
  S* out;          // (problems, parts, length)

  static Sweeps of_plan(const Context& context, const Shape& shape, const SolvePlan& plan) {
    const SweepCut &x = plan.cuts[0], &y = plan.cuts[1];
    const int64_t sums = shape.problems * std::max(x.parts, y.parts) * plan.vector_length;
    return {context.scratch<SweepOrder<T, S>>(shape.problems),
            {x, y},
            shape.problems,
            std::max(x.blocks(shape.n), y.blocks(shape.m)),
            plan.vector_length,
            plan.room,
            context.scratch<S>(sums)};
  }
  Grid grid() const { return {problems * blocks, static_cast<size_t>(kArgumentBytes + room)}; }

  // What stays of an order; by one thread.
  OTLOSS_DEVICE void place(int64_t problem, const RowTiles<T>& tiles, T* F, T* G) const {
    SweepOrder<T, S>& order = of[problem];
    const int most = cuts[0].parts > cuts[1].parts ? cuts[0].parts : cuts[1].parts;
    order.out = out + problem * most * length;
    order.tiles = tiles, order.tiles.F = F, order.tiles.G = G;
  }

  // Sum i of those that the problem asked for.
  OTLOSS_DEVICE double sum(int64_t problem, int i, RowSum what = RowSum::kPlan) const {
    const SweepOrder<T, S>& order = of[problem];
    double total = static_cast<double>(order.out[i]);
    for (int part = 1; part < cuts[order.side].parts; ++part)
      total = join_sums(what, total, static_cast<double>(order.out[part * length + i]));
    return total;
  }
};

// By all threads of a block, a word each.
template <int kThreads, class Object, class Block>
OTLOSS_DEVICE void copy_words(Block& block, const Object* from, Object* to) {
  constexpr int kWord = 8;
  static_assert(sizeof(Object) % kWord == 0 && alignof(Object) % kWord == 0, "whole words");
  const char* const source = reinterpret_cast<const char*>(from);
  char* const target = reinterpret_cast<char*>(to);
  block.sync();
  for (int w = block.thread(); w < static_cast<int>(sizeof(Object)) / kWord; w += kThreads)
    memcpy(__builtin_assume_aligned(target + w * kWord, kWord),
           __builtin_assume_aligned(source + w * kWord, kWord), kWord);
  block.sync();
}

// For kJoin: a block has every so many rows from `first` on, a thread a column at a time. Not
// inlined: costs can be made in many ways, but not here.
template <class Cost, int kThreads, typename T, class Block>
OTLOSS_NOINLINE void join_entries(Block block, const SweepOrder<T>& order, int64_t first,
                                  int64_t blocks) {
  const RowTiles<T>& p = order.tiles;
  for (int64_t i = first; i < p.last; i += blocks) {
    const T F = order.exponents[i], weight = order.weights[i];
    if (!(weight > T(0))) continue;
#pragma unroll 1
    for (int64_t j = block.thread(); j < p.end; j += kThreads) {
      T cost;
      if constexpr (std::is_void_v<Cost>)
        cost = p.C[i * p.width + j];
      else
        cost = pair_cost<Cost>(p.d, p.rows.z + i, p.rows.stride, p.columns.z + j, p.columns.stride);
      order.large.see(block, static_cast<int>(i), static_cast<int>(j), F + p.G[j] - p.k * cost,
                      weight, order.x[j]);
    }
  }
}

template <typename T, typename S, bool kProducts, class Tiles>
struct SweepKernel {
  static constexpr int kThreads = kSolveThreads;

  Sweeps<T, S> sweeps;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const SweepOrder<T, S>& order = sweeps.of[block.x() / sweeps.blocks];
    if (order.what == RowSum::kNone) return;
    if constexpr (!kProducts)
      if (order.what == RowSum::kJoin)
        return join_entries<typename Tiles::Cost, kThreads>(block, order, block.x() % sweeps.blocks,
                                                            sweeps.blocks);
    RowSums<T, S>& own = *block.template shared<RowSums<T, S>>();
    static_assert(sizeof(own) <= kArgumentBytes, "raise kArgumentBytes");
    if (block.thread() == 0) place(block.x() % sweeps.blocks, order, own);
    block.sync();
    if (own.tiles.first == own.tiles.last) return;
    if constexpr (!std::is_same_v<Tiles, StoredTiles>)
      add<typename Tiles::template Maker<T, Block>>(block, own);
    else if (order.side == 0)
      add<StoredTileMaker<StoredRows<T>, T, Block>>(block, own);
    else
      add<StoredTileMaker<StoredColumns, T, Block>>(block, own);
  }

 private:
  template <class Maker, class Block>
  OTLOSS_DEVICE static void add(Block& block, const RowSums<T, S>& sums) {
    if constexpr (kProducts)
      add_rows<Maker, Terms::kProducts>(block, sums);
    else if (sums.what == RowSum::kPlan)
      add_rows<Maker, Terms::kPass>(block, sums);
    else
      add_rows<Maker, Terms::kAny>(block, sums);
  }

  OTLOSS_DEVICE void place(int64_t number, const SweepOrder<T, S>& order,
                           RowSums<T, S>& own) const {
    const SweepCut& cut = sweeps.cuts[order.side];
    const RowTiles<T>& whole = order.tiles;
    RowTiles<T>& tiles = own.tiles = whole;
    if (order.side == 1) {
      tiles.rows = whole.columns, tiles.columns = whole.rows;
      tiles.F = whole.G, tiles.G = whole.F;
      tiles.last = whole.end, tiles.end = whole.last;
    }
    if (order.exponents != nullptr) tiles.F = order.exponents;
    tiles.room = sweeps.room;
    tiles.cut(number, cut.rows, cut.parts);
    own.what = order.what, own.x = order.x;
    own.out = order.out + number % cut.parts * sweeps.length;
  }
};

// Of costs that are stored, or made by multiply-adds.
template <bool kProducts, typename T, typename S>
void queue_sweep(Queue& queue, const Sweeps<T, S>& sweeps, const PackedPair<T>& points) {
  if (points.C != nullptr)
    return queue(SweepKernel<T, S, kProducts, StoredTiles>{sweeps}, sweeps.grid());
  dispatch_tiles(points.kind, points.d, [&](auto tiles) {
    queue(SweepKernel<T, S, kProducts, decltype(tiles)>{sweeps}, sweeps.grid());
  });
}

// ------------------------------------------------------------------------------------- control

// The plan of products with the groups' plans. They take multiply-adds: with tensor cores P_ij
// would depend on which side is first.
inline SolvePlan products_plan(const Context& context, const Shape& shape, int64_t d, bool stored) {
  return choose_launched_plan(shape, d, limits(context.device),
                              stored ? TileKind::kStored : TileKind::kFma);
}

template <class Block>
using ControlTeam = Team<Block, kControlThreads>;

// Work is what all problems of a call share: groups(), orders; State what is kept of one.
// work.advance(block, team, state, group, batch, first) asks for a sweep, or returns true: the
// problem is done.
template <class Work>
struct ControlKernel {
  using State = typename Work::State;
  static constexpr int kThreads = kControlThreads;
  static constexpr int64_t kState = (sizeof(TeamScratch) + 15) / 16 * 16;
  static constexpr size_t kShared = kState + sizeof(State);

  Work work;
  State* saved;  // (problems,)
  bool first;    // there is nothing saved yet
  Loop loop;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    ControlTeam<Block> team(block, TeamArguments{1, nullptr});
    auto& order = work.orders.of[team.index()];
    bool done = false;
    if (first || order.what != RowSum::kNone) {
      State& state = *reinterpret_cast<State*>(block.template shared<unsigned char>() + kState);
      if (!first) copy_words<kThreads>(block, saved + team.index(), &state);
      team.with_problem(work.groups(), [&](const auto& group, int64_t batch) {
        done = work.advance(block, team, state, group, batch, first);
      });
      copy_words<kThreads>(block, &state, saved + team.index());
    }
    if (block.thread() != 0) return;
    if (done) order.what = RowSum::kNone;
    block.count_off(loop, done);
  }
};

// Runs controls and sweeps, sweep(queue), in turn until all problems are done, which takes `most`
// sweeps at most; 0: a control alone.
template <class Work, class Sweep>
void run_controls(const Context& context, const Work& work, int64_t problems, int64_t most,
                  Sweep&& sweep) {
  using Kernel = ControlKernel<Work>;
  Loop loop{context.scratch<unsigned>(1), static_cast<unsigned>(problems)};
  clear(context, loop.done, sizeof(unsigned));
  const Grid grid{problems, Kernel::kShared};
  Kernel control{work, context.scratch<typename Work::State>(problems), true, loop};
  launch(context, control, grid);
  control.first = false;
  if (most == 0) return;
  repeat(context, loop, most, [&](const Loop& turn, Queue& queue) {
    sweep(queue);
    control.loop = turn;
    queue(control, grid);
  });
}

}  // namespace otloss::cuda
