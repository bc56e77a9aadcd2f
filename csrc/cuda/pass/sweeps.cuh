// Sweeps as launches: for every problem of a call the sums that it waits for. A block has some rows
// of a problem, and a part of its columns. Between two sweeps a block for each problem, its control,
// takes the sums and asks for the next ones.
#pragma once

#include <cstring>

#include "cuda/pass/streamed.cuh"
#include "cuda/pass/team_sweep.cuh"

namespace otloss::cuda {

// Order: the RowSums that a problem asks for, of its rows and columns whole.
template <class Order>
struct SweepArguments {
  const Order* orders;  // (problems,)
  SweepCut cuts[2];     // by side
  int64_t blocks;       // of a problem
  int64_t length;       // out: (parts, length)
};

// Makers of costs, for a kernel of their own each.
template <class Cost, bool kDifference>
struct FmaTiles {
  template <typename T, class Block>
  using Maker = TileMaker<Cost, kDifference, T, Block>;
};
template <class Cost, bool kLow>
struct TensorTiles {
  template <typename T, class Block>
  using Maker = TensorTileMaker<Cost, RowSumShape, kLow, Block>;
};

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
    add_rows<Maker, ProductTerms<T, S>>(block, order);
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
    if (block.thread() == 0) {
      own = order;
      cut(block.x() % arguments.blocks, own);
    }
    block.sync();
    Sums::template run<typename Tiles::template Maker<T, Block>>(block, own);
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

template <class Sums, typename T, typename S>
void queue_sweep(Queue& queue, const SweepArguments<RowSums<T, S>>& arguments, CostKind kind,
                 int64_t d, const Grid& grid) {
  dispatch_tiles(kind, d, [&](auto cost, auto difference) {
    using Tiles = FmaTiles<decltype(cost), decltype(difference)::value>;
    queue(SweepKernel<T, S, Sums, Tiles>{arguments}, grid);
  });
}

// Of a solve, in a file of its own: both together take minutes to compile.
void queue_tensor_sweep(Queue& queue, const SweepArguments<RowSums<float>>& arguments,
                        CostKind kind, TileKind made_by, const Grid& grid);

// The sweeps of a plan.
template <typename T, typename S>
Grid plan_sweeps(const Shape& shape, const SolvePlan& plan, const RowSums<T, S>* orders,
                 SweepArguments<RowSums<T, S>>* sweep) {
  const int64_t blocks = std::max(plan.cuts[0].blocks(shape.n), plan.cuts[1].blocks(shape.m));
  *sweep = {orders, {plan.cuts[0], plan.cuts[1]}, blocks, plan.vector_length};
  Grid grid;
  grid.x = shape.problems * blocks;
  grid.shared = static_cast<size_t>(plan.streamed.stages + plan.streamed.room);
  return grid;
}

// ------------------------------------------------------------------------------------- control

// A side of a problem in a sweep: all of its points.
template <typename T>
struct SweepSide {
  PackedCloud<T> cloud;
  SplitCloud split;
  const T* exponents;  // (cloud.stride,)
};

// Rows and columns of an order.
template <typename T>
OTLOSS_DEVICE void set_sides(RowTiles<T>& tiles, const SweepSide<T>& rows,
                             const SweepSide<T>& columns) {
  tiles.rows = rows.cloud, tiles.columns = columns.cloud;
  tiles.split_rows = rows.split, tiles.split_columns = columns.split;
  tiles.first = tiles.begin = 0;
  tiles.last = rows.cloud.count, tiles.end = columns.cloud.count;
  tiles.F = rows.exponents, tiles.G = columns.exponents;
}

// Sum i of all parts of the columns.
template <typename S>
OTLOSS_DEVICE double joined(RowSum what, const S* out, int parts, int64_t length, int i) {
  double total = static_cast<double>(out[i]);
  for (int part = 1; part < parts; ++part)
    total = join_sums(what, total, static_cast<double>(out[part * length + i]));
  return total;
}

// What a control keeps between its launches; a thread for each word.
template <int kThreads, class State, class Block>
OTLOSS_DEVICE void copy_words(Block& block, const State* from, State* to) {
  constexpr int kWord = 8;
  static_assert(sizeof(State) % kWord == 0, "whole words");
  block.sync();
  for (int w = block.thread(); w < static_cast<int>(sizeof(State)) / kWord; w += kThreads)
    memcpy(reinterpret_cast<char*>(to) + w * kWord, reinterpret_cast<const char*>(from) + w * kWord,
           kWord);
  block.sync();
}

}  // namespace otloss::cuda
