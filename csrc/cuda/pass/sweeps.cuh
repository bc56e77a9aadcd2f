// Sweeps as launches: for every problem of a call the sums that it waits for. A block has some rows
// of a problem, and a part of its columns. Between two sweeps a block for each problem, its
// control, takes the sums and asks for the next ones.
#pragma once

#include <cstring>

#include "cuda/device/loop.cuh"
#include "cuda/device/team.cuh"
#include "cuda/pass/pack.cuh"
#include "cuda/pass/row_sums.cuh"

namespace otloss::cuda {

// A side of a problem in a sweep: all of its points.
template <typename T>
struct SweepSide {
  PackedCloud<T> cloud;
  T* exponents;  // (cloud.stride,) padded

  // By all threads of a control.
  template <class Block>
  OTLOSS_DEVICE void pad(Block& block) const {
    for (int64_t i = cloud.count + block.thread(); i < cloud.stride; i += kControlThreads)
      exponents[i] = static_cast<T>(kLog2Zero);
  }
};

// The sums that a problem waits for.
template <typename T, typename S = T>
struct SweepOrder {
  RowSum what;
  int side;            // whose points are the rows; 0: the problem's rows
  const S* x;          // factors of the other side's points, or null
  const T* exponents;  // of the rows in place of the side's, or null
  // What stays.
  SweepSide<T> sides[2];
  RowTiles<T> tiles;  // but for rows and columns
  S* out;             // (parts, length)

  OTLOSS_DEVICE void ask(int of_side, RowSum of_what, const S* factors = nullptr,
                         const T* of_rows = nullptr) {
    side = of_side, what = of_what, x = factors, exponents = of_rows;
  }
};

template <typename T, typename S>
struct SweepArguments {
  const SweepOrder<T, S>* orders;  // (problems,)
  SweepCut cuts[2];                // by side
  int64_t blocks;                  // of a problem
  int64_t length;                  // out: (parts, length)
  int64_t room;                    // see RowTiles
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

template <typename T, typename S, bool kProducts, class Tiles>
struct SweepKernel {
  static constexpr int kThreads = kSolveThreads;

  SweepArguments<T, S> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const SweepOrder<T, S>& order = arguments.orders[block.x() / arguments.blocks];
    if (order.what == RowSum::kNone) return;
    RowSums<T, S>& own = *block.template shared<RowSums<T, S>>();
    static_assert(sizeof(own) <= kArgumentBytes, "raise kArgumentBytes");
    if (block.thread() == 0) place(block.x() % arguments.blocks, order, own);
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
      add_rows<Maker, Terms::kOther>(block, sums);
  }

  OTLOSS_DEVICE void place(int64_t number, const SweepOrder<T, S>& order,
                           RowSums<T, S>& own) const {
    const SweepSide<T>&rows = order.sides[order.side], &columns = order.sides[1 - order.side];
    const SweepCut& cut = arguments.cuts[order.side];
    RowTiles<T>& tiles = own.tiles = order.tiles;
    tiles.rows = rows.cloud, tiles.columns = columns.cloud;
    tiles.last = rows.cloud.count, tiles.end = columns.cloud.count;
    tiles.F = order.exponents != nullptr ? order.exponents : rows.exponents;
    tiles.G = columns.exponents;
    tiles.room = arguments.room;
    tiles.cut(number, cut.rows, cut.parts);
    own.what = order.what, own.x = order.x;
    own.out = order.out + number % cut.parts * arguments.length;
  }
};

// Of costs that are stored, or made by multiply-adds.
template <bool kProducts, typename T, typename S>
void queue_sweep(Queue& queue, const SweepArguments<T, S>& arguments, const PackedPair<T>& points,
                 const Grid& grid) {
  if (points.C != nullptr) return queue(SweepKernel<T, S, kProducts, StoredTiles>{arguments}, grid);
  dispatch_tiles(points.kind, points.d, [&](auto tiles) {
    queue(SweepKernel<T, S, kProducts, decltype(tiles)>{arguments}, grid);
  });
}

// Of a solve, in a file of its own: both together take minutes to compile.
void queue_tensor_sweep(Queue& queue, const SweepArguments<float, float>& arguments, CostKind kind,
                        TileKind made_by, const Grid& grid);

// ------------------------------------------------------------------------------------- control

// What problems ask for, and get.
template <typename T, typename S = T>
struct Orders {
  SweepOrder<T, S>* of;  // (problems,)
  int parts[2];          // of the columns, by side
  int64_t length;        // at least every n and m
  S* out;                // (problems, parts, length)

  // What stays of an order, p: the group of the problem; by one thread.
  template <class Group>
  OTLOSS_DEVICE void place(int64_t problem, const PackedPair<T>& points, const Group& p,
                           int64_t batch, bool symmetric, double k, T* F, T* G) const {
    SweepOrder<T, S>& order = of[problem];
    const int most = parts[0] > parts[1] ? parts[0] : parts[1];
    order.out = out + problem * most * length;
    order.sides[0] = {points.x.cloud(batch, points.d, p.n), F};
    order.sides[1] = {points.y.cloud(batch, points.d, p.m), G};
    RowTiles<T>& tiles = order.tiles;
    tiles.d = points.d, tiles.symmetric = symmetric, tiles.repair = true;
    tiles.k = static_cast<T>(k);
    tiles.C = points.C + batch * p.n * p.m, tiles.width = p.m;
  }

  // Sum i of those that the problem asked for.
  OTLOSS_DEVICE double sum(int64_t problem, int i, RowSum what = RowSum::kPlan) const {
    const SweepOrder<T, S>& order = of[problem];
    double total = static_cast<double>(order.out[i]);
    for (int part = 1; part < parts[order.side]; ++part)
      total = join_sums(what, total, static_cast<double>(order.out[part * length + i]));
    return total;
  }
};

// The sweeps of a plan.
template <typename T, typename S>
Grid plan_sweeps(const Context& context, const Shape& shape, const SolvePlan& plan,
                 Orders<T, S>* orders, SweepArguments<T, S>* sweep) {
  const int64_t blocks = std::max(plan.cuts[0].blocks(shape.n), plan.cuts[1].blocks(shape.m));
  const int parts[2] = {plan.cuts[0].parts, plan.cuts[1].parts};
  const int64_t sums = shape.problems * std::max(parts[0], parts[1]) * plan.vector_length;
  *orders = {context.scratch<SweepOrder<T, S>>(shape.problems),
             {parts[0], parts[1]},
             plan.vector_length,
             context.scratch<S>(sums)};
  *sweep = {orders->of, {plan.cuts[0], plan.cuts[1]}, blocks, plan.vector_length, plan.room};
  return {shape.problems * blocks, static_cast<size_t>(kArgumentBytes + plan.room)};
}

// The plan of products with the groups' plans. They take multiply-adds: with tensor cores P_ij
// would depend on which side is first.
template <typename Group>
SolvePlan products_plan(const Context& context, const Shape& shape, const Group& group) {
  return choose_launched_plan(shape, group.made.points.d, limits(context.device),
                              group.C ? TileKind::kStored : TileKind::kFma);
}

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
    typename Work::template Team<Block> team(block, TeamArguments{1, nullptr});
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
// sweeps at most.
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
  repeat(context, loop, most, [&](const Loop& turn, Queue& queue) {
    sweep(queue);
    control.loop = turn;
    queue(control, grid);
  });
}

}  // namespace otloss::cuda
