// Products of rows of a plan, or of what is made of one, by points. See rows_product.cpp.
#pragma once

#include <cstdint>

#include "cpu/simd/tile.h"

namespace otloss::cpu {

// Rows of a block of products: enough that what all blocks read of the other side is used often
// once it is in the L2 cache.
constexpr int64_t kProductRows = 8 * kTileRows;

// Inner indices of a chunk, and rows of V of which a chunk leaves room in the L2 cache.
constexpr int64_t kTileChunk = 512;
constexpr int64_t product_rows(int64_t inner) {
  return inner < kTileChunk ? kProductRows * kTileChunk / inner : kProductRows;
}

// The length of the shortest point of a prepared cloud over that of the longest, from their norms
// (m,) as in CloudGroup; points at 0 apart.
template <typename T>
T evenness(bool unit, int64_t m, const T* norm);

// out (+)= V z.
template <typename T>
struct RowsProduct {
  int64_t rows;
  int64_t inner;
  int64_t columns;
  const T* V;       // (rows, inner)
  int64_t V_row;    // distance of its rows
  int64_t V_inner;  // distance of its inner indices: 1, or V_row is
  const T* sum;     // (rows,) V 1
  T evenness;       // of z
  const T* z;       // (inner, columns) where columns are whole blocks, or the strips of z^T:
  bool packed;      // (strips_of(columns), inner, kStrip)
  T* out;           // (rows, columns)
  bool add;         // to what is in `out`
};

template <typename T>
void multiply_rows(const RowsProduct<T>& args);

}  // namespace otloss::cpu
