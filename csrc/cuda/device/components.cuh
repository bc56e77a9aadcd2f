// Connected components without locks: nodes point to others of lower number, and at last to the
// lowest of their component, whatever the timing.
#pragma once

#include "cuda/device/block.cuh"

namespace otloss::cuda {

// kShorten: nodes on the way are put nearer to the root, while nobody relies on where they are.
template <bool kShorten, class Block>
OTLOSS_DEVICE int find_root(Block& block, int* parent, int node) {
  for (int above = block.load(parent + node); above != node;) {
    const int next = block.load(parent + above);
    if (kShorten && next != above) block.store(parent + node, next);
    node = above, above = next;
  }
  return node;
}

template <class Block>
OTLOSS_NOINLINE void join_nodes(Block block, int* parent, int i, int j) {
  for (;;) {
    i = find_root<true>(block, parent, i), j = find_root<true>(block, parent, j);
    if (i == j) return;
    const int low = i < j ? i : j, high = i < j ? j : i;
    if (block.compare_and_swap(parent + high, high, low) == high) return;
  }
}

// Entries of a plan that join their row and their column: those of more than 2^least of its sum.
// The nodes of columns come first, from `first_row` on those of rows.
template <typename T>
struct LargeEntries {
  T least;
  int* parent;
  int first_row;

  // entry: log2 over the row's sum; row, column: the sums.
  template <class Block>
  OTLOSS_DEVICE void see(Block& block, int i, int j, T entry, T row, T column) const {
    if (entry > least || (column > T(0) && entry + fast_log2(row / column) > least))
      join_nodes(block, parent, j, first_row + i);
  }
};

}  // namespace otloss::cuda
