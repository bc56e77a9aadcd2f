// Matrix products in register tiles, and the layout they read. See tile.cpp.
#pragma once

#include <cstdint>

#include "cpu/simd/blocks.h"

namespace otloss::cpu {

// One side of a product is read where it is. The other comes as rows of a matrix (count, inner) in
// strips of kStrip that are padded with zeros, and in a strip one inner index of all its rows after
// the other: (strips_of(count), inner, kStrip). A tile is kTileRows rows by a strip.
template <typename T>
constexpr int64_t kStrip = 128 / sizeof(T);
constexpr int64_t kTileRows = 12;

constexpr int64_t groups_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

template <typename T>
constexpr int64_t strips_of(int64_t count) {
  return groups_of(count, kStrip<T>);
}

template <typename T>
struct Packing {
  int64_t count;
  int64_t inner;
  const T* from;
  int64_t stride;   // distance of rows of `from`
  bool transposed;  // `from` is (inner, count) in place of (count, inner)
  T* strips;        // out
};

template <typename T>
void pack(const Packing<T>& args);

// to (columns, rows) = from (rows, columns) transposed, a cache line of its columns at a time: what
// is written meanwhile stays in the L1 cache where rows are few.
template <typename T>
void transpose(int64_t rows, int64_t columns, const T* from, int64_t stride, T* to,
               int64_t to_stride);

template <typename T>
struct TileProduct {
  int64_t rows;     // at most kTileRows
  int64_t columns;  // at most kStrip, whole vectors of any length that there is
  int64_t inner;
  const T* x;       // (rows, inner)
  int64_t x_row;    // distance of its rows
  int64_t x_inner;  // distance of its inner indices
  const T* y;       // (inner, columns)
  int64_t y_inner;  // distance of its inner indices
  T* sum;           // (rows, columns) out, or accumulated
  int64_t stride;   // distance of rows of `sum`
  bool add;         // to what is in `sum`
};

// sum (+)= x y.
template <typename T>
void add_products(const TileProduct<T>& tile);

// |x - y|^2 of a few rows by whole strips of another cloud.
constexpr int64_t kDifferenceRows = 4;

template <typename T>
struct Differences {
  int64_t rows;  // at most kDifferenceRows
  int64_t d;
  int64_t strips;
  const T* x;      // (rows, d)
  const T* y;      // (strips, d, kStrip)
  T* squares;      // (rows, stride) out
  int64_t stride;  // distance of rows of `squares`
};

template <typename T>
void squared_differences(const Differences<T>& args);

}  // namespace otloss::cpu
