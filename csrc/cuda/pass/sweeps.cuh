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

// Order: the RowSums that a problem asks for, of its rows and columns whole.
template <class Order>
struct SweepArguments {
  const Order* orders;  // (problems,)
  SweepCut cuts[2];     // by side
  int64_t blocks;       // of a problem
  int64_t length;       // out: (parts, length)
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

// Sums of a solve, or with factors.
struct SolveSums {
  template <class Maker, typename T, class Block>
  static OTLOSS_DEVICE void run(Block& block, const RowSums<T>& order) {
    if (order.what == RowSum::kPlan)
      add_rows<Maker, RowTerms<T, true>>(block, order);
    else
      add_rows<Maker, RowTerms<T, false>>(block, order);
  }
};
struct Products {
  template <class Maker, typename T, typename S, class Block>
  static OTLOSS_DEVICE void run(Block& block, const RowSums<T, S>& order) {
    add_rows<Maker, ProductTerms<T, S, typename Maker::Layout>>(block, order);
  }
};

template <typename T, typename S, class Sums, class Tiles>
struct SweepKernel {
  static constexpr int kThreads = kSolveThreads;

  SweepArguments<RowSums<T, S>> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    const RowSums<T, S>& order = arguments.orders[block.x() / arguments.blocks];
    if (order.what == RowSum::kNone) return;
    static_assert(sizeof(order) <= kArgumentBytes, "raise kArgumentBytes");
    RowSums<T, S>& own = *block.template shared<RowSums<T, S>>();
    copy_words<kThreads>(block, &order, &own);
    if (block.thread() == 0) cut(block.x() % arguments.blocks, own);
    block.sync();
    if constexpr (!std::is_same_v<Tiles, StoredTiles>)
      Sums::template run<typename Tiles::template Maker<T, Block>>(block, own);
    else if (own.side == 0)
      Sums::template run<StoredTileMaker<StoredRows, T, Block>>(block, own);
    else
      Sums::template run<StoredTileMaker<StoredColumns, T, Block>>(block, own);
  }

 private:
  OTLOSS_DEVICE void cut(int64_t number, RowSums<T, S>& own) const {
    const SweepCut& shares = arguments.cuts[own.side];
    RowTiles<T>& tiles = own.tiles;
    const auto least = [](int64_t x, int64_t y) { return x < y ? x : y; };
    const int64_t part = number % shares.parts, end = tiles.end;
    const int64_t columns = ceil_div(end, shares.parts * kPackedAlign) * kPackedAlign;
    tiles.first = least(number / shares.parts * shares.rows, tiles.last);
    tiles.last = least(tiles.first + shares.rows, tiles.last);
    tiles.begin = least(part * columns, end);
    tiles.end = least(tiles.begin + columns, end);
    tiles.F += tiles.first;
    own.out += part * arguments.length + tiles.first;
  }
};

// Of costs that are stored, or made by multiply-adds.
template <class Sums, typename T, typename S>
void queue_sweep(Queue& queue, const SweepArguments<RowSums<T, S>>& arguments,
                 const PackedPair<T>& points, const Grid& grid) {
  if (points.C != nullptr) return queue(SweepKernel<T, S, Sums, StoredTiles>{arguments}, grid);
  dispatch_tiles(points.kind, points.d, [&](auto tiles) {
    queue(SweepKernel<T, S, Sums, decltype(tiles)>{arguments}, grid);
  });
}

// Of a solve, in a file of its own: both together take minutes to compile.
void queue_tensor_sweep(Queue& queue, const SweepArguments<RowSums<float>>& arguments,
                        CostKind kind, TileKind made_by, const Grid& grid);

// ------------------------------------------------------------------------------------- control

// What problems ask for, and get.
template <typename T, typename S = T>
struct Orders {
  RowSums<T, S>* of;  // (problems,)
  StreamedLayout layout;
  int parts[2];    // of the columns, by side
  int64_t length;  // at least every n and m
  S* out;          // (problems, parts, length)

  // What all orders of a problem have in common, p: its group; by one thread.
  template <class Group>
  OTLOSS_DEVICE void place(int64_t problem, const PackedPair<T>& points, const Group& p,
                           int64_t batch, bool symmetric, double k) const {
    const int most = parts[0] > parts[1] ? parts[0] : parts[1];
    of[problem].x = nullptr;
    of[problem].out = out + problem * most * length;
    of[problem].sums = layout.sums;
    RowTiles<T>& tiles = of[problem].tiles;
    tiles.made_by = points.tiles, tiles.kind = points.kind, tiles.d = points.d;
    tiles.symmetric = symmetric, tiles.repair = true;
    tiles.k = static_cast<T>(k);
    tiles.C = points.C + batch * p.n * p.m, tiles.width = p.m;
    tiles.stages = layout.stages, tiles.room = layout.room;
  }

  // Sum i of those that the problem asked for.
  OTLOSS_DEVICE double sum(int64_t problem, int i, RowSum what = RowSum::kPlan) const {
    const RowSums<T, S>& order = of[problem];
    double total = static_cast<double>(order.out[i]);
    for (int part = 1; part < parts[order.side]; ++part)
      total = join_sums(what, total, static_cast<double>(order.out[part * length + i]));
    return total;
  }
};

// The sweeps of a plan.
template <typename T, typename S>
Grid plan_sweeps(const Context& context, const Shape& shape, const SolvePlan& plan,
                 Orders<T, S>* orders, SweepArguments<RowSums<T, S>>* sweep) {
  const int64_t blocks = std::max(plan.cuts[0].blocks(shape.n), plan.cuts[1].blocks(shape.m));
  const int parts[2] = {plan.cuts[0].parts, plan.cuts[1].parts};
  const int64_t sums = shape.problems * std::max(parts[0], parts[1]) * plan.vector_length;
  *orders = {context.scratch<RowSums<T, S>>(shape.problems),
             plan.streamed,
             {parts[0], parts[1]},
             plan.vector_length,
             context.scratch<S>(sums)};
  *sweep = {orders->of, {plan.cuts[0], plan.cuts[1]}, blocks, plan.vector_length};
  Grid grid;
  grid.x = shape.problems * blocks;
  grid.shared = static_cast<size_t>(plan.streamed.stages + plan.streamed.room);
  return grid;
}

// The plan of products with the groups' plans. They take multiply-adds: with tensor cores P_ij
// would depend on which side is first.
template <typename Group>
SolvePlan products_plan(const Context& context, const Shape& shape, const Group& group) {
  return choose_launched_plan(shape, group.made.points.d, limits(context.device),
                              group.C ? TileKind::kStored : TileKind::kFma);
}

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

// The sums that come next; by one thread.
template <typename T, typename S>
OTLOSS_DEVICE void set_order(RowSums<T, S>& order, int side, RowSum what, const S* x,
                             const SweepSide<T>& rows, const SweepSide<T>& columns) {
  const SweepSide<T>& own = side == 0 ? rows : columns;
  const SweepSide<T>& other = side == 0 ? columns : rows;
  order.what = what, order.side = side, order.x = x;
  RowTiles<T>& tiles = order.tiles;
  tiles.rows = own.cloud, tiles.columns = other.cloud;
  tiles.first = tiles.begin = 0;
  tiles.last = own.cloud.count, tiles.end = other.cloud.count;
  tiles.F = own.exponents, tiles.G = other.exponents;
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
  Grid grid;
  grid.x = problems;
  grid.shared = Kernel::kShared;
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
