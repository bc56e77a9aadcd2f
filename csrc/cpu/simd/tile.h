// Matrix products in register tiles, and the layout they read. See tile.cpp.
#pragma once

#include <cstdint>

#include "cpu/simd/blocks.h"

namespace otloss::cpu {

// Rows of a matrix (count, inner) in strips of kStrip that are padded with zeros, and in a strip
// one inner index of all its rows after the other: (strips_of(count), inner, kStrip). Both sides of
// a product come in this layout; a tile is kTileRows rows of a strip by all kStrip rows of another.
template <typename T>
constexpr int64_t kStrip = 128 / sizeof(T);
constexpr int64_t kTileRows = 8;
static_assert(kStrip<double> % kTileRows == 0, "a tile's rows lie in one strip");

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

template <typename T>
struct TileProduct {
  int64_t inner;
  const T* x;      // (inner, kStrip), from the tile's first row on
  const T* y;      // (inner, kStrip)
  T* sum;          // (kTileRows, stride) accumulated, kStrip columns of it
  int64_t stride;  // distance of rows of `sum`
};

// sum += x^T y.
template <typename T>
void add_products(const TileProduct<T>& tile);

// |x - y|^2 of a few rows by whole strips of another cloud.
constexpr int64_t kDifferenceRows = 4;

template <typename T>
struct Differences {
  int64_t d;
  int64_t strips;
  const T* x;      // (d, kStrip), from the first row on
  const T* y;      // (strips, d, kStrip)
  T* squares;      // (kDifferenceRows, stride) out
  int64_t stride;  // distance of rows of `squares`
};

template <typename T>
void squared_differences(const Differences<T>& args);

// Rows of a block of products: so many that the strips of the other side, which every block reads,
// are used often once they are in the L2 cache.
constexpr int64_t kProductRows = 96;
static_assert(kProductRows % kStrip<float> == 0 && kProductRows % kStrip<double> == 0,
              "blocks are whole strips");

// The same where `count` rows are spread over threads.
template <typename T>
int64_t product_rows(int64_t count, int64_t threads) {
  const int64_t share = strips_of<T>(groups_of(count, threads)) * kStrip<T>;
  return share < kProductRows ? share : kProductRows;
}

// out = V z, V (rows, inner) or transposed: rows of a matrix that is not packed.
template <typename T>
struct RowsProduct {
  int64_t rows;
  int64_t inner;
  int64_t columns;
  const T* V;
  int64_t stride;   // distance of rows of V
  bool transposed;  // V is (inner, rows)
  const T* z;       // the strips of z^T: (strips_of(columns), inner, kStrip)
  T* out;           // (rows, columns)
};

template <typename T>
void multiply_rows(const RowsProduct<T>& args);

}  // namespace otloss::cpu
