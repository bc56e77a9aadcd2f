// The sweeps of a streamed solve, a launch each: for every problem of a call the sums that it waits
// for. A block has some rows of a problem, and a part of its columns.
#pragma once

#include "cuda/pass/streamed.cuh"

namespace otloss::cuda {

template <typename T>
struct SweepArguments {
  const RowSums<T>* orders;  // (problems,) their rows and columns whole
  SweepCut cuts[2];          // by side
  int64_t blocks;            // of a problem
  int64_t length;            // out: (parts, length)
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

template <typename T, class Tiles>
struct SweepKernel {
  static constexpr int kThreads = kSolveThreads;

  SweepArguments<T> arguments;

  template <class Block>
  OTLOSS_DEVICE void operator()(Block& block) const {
    using Maker = typename Tiles::template Maker<T, Block>;
    const RowSums<T>& order = arguments.orders[block.x() / arguments.blocks];
    if (order.what == RowSum::kNone) return;
    static_assert(sizeof(order) <= kArgumentBytes, "raise kArgumentBytes");
    RowSums<T>& own = *block.template shared<RowSums<T>>();
    if (block.thread() == 0) {
      own = order;
      cut(block.x() % arguments.blocks, own);
    }
    block.sync();
    if (own.what == RowSum::kPlan)
      add_rows<Maker, RowTerms<T, true>>(block, own);
    else
      add_rows<Maker, RowTerms<T, false>>(block, own);
  }

 private:
  OTLOSS_DEVICE void cut(int64_t number, RowSums<T>& own) const {
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

template <typename T>
void queue_sweep(Queue& queue, const SweepArguments<T>& arguments, CostKind kind, int64_t d,
                 const Grid& grid) {
  dispatch_tiles(kind, d, [&](auto cost, auto difference) {
    constexpr bool kDifference = decltype(difference)::value;
    queue(SweepKernel<T, FmaTiles<decltype(cost), kDifference>>{arguments}, grid);
  });
}

template <typename T>
void queue_tensor_sweep(Queue& queue, const SweepArguments<T>& arguments, CostKind kind,
                        TileKind made_by, const Grid& grid) {
  dispatch_tensor_tiles(kind, made_by, [&](auto cost, auto low) {
    constexpr bool kLow = decltype(low)::value;
    queue(SweepKernel<T, TensorTiles<decltype(cost), kLow>>{arguments}, grid);
  });
}
extern template void queue_tensor_sweep(Queue&, const SweepArguments<float>&, CostKind, TileKind,
                                        const Grid&);

}  // namespace otloss::cuda
