// Rows of a cost matrix made from points when they are needed, and the plan applied to points
// without the matrix. See points.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "core/costs.h"
#include "cpu/simd/tile.h"

namespace otloss::cpu {

// Rows made at once: few, so that they stay in the cache, or more when the points themselves are
// large and are better read once for several rows.
inline int64_t rows_at_once(int64_t d) {
  return d <= kDirectDims ? kDifferenceRows : d <= 32 ? kTileRows : 3 * kTileRows;
}

// Up to this dimension the plan is applied with strips of points as lanes.
constexpr int64_t kLaneDims = 8;

// A prepared cloud (see CloudGroup) as the rows of a cost.
template <typename T>
struct CloudRows {
  int64_t m;      // points
  int64_t d;      // coordinates
  const T* z;     // (m, d) prepared points
  const T* norm;  // (m,) |z|^2, or |x| for cosine
};

// As its columns.
template <typename T>
struct PackedCloud : CloudRows<T> {
  BlockBuffer<T> strips;  // (strips_of(m), d, kStrip)
  BlockVector<T> h;       // (strips_of(m) * kStrip,) norms, padded with zeros

  explicit PackedCloud(const CloudRows<T>& cloud);
};

template <typename T>
struct CostRows {
  int64_t first;  // rows [first, first + rows) of `from`
  int64_t rows;
  int64_t begin;  // columns [begin, end) of `to`, begin a multiple of kStrip
  int64_t end;
  bool symmetric;  // the clouds are one: the diagonal is 0
  const CloudRows<T>* from;
  const PackedCloud<T>* to;
  T* C;  // (rows, stride) out; column 0 is column `begin`
  int64_t stride;
  bool half = false;  // all of a symmetric matrix is made in turn: tiles below the diagonal are
                      // mirror images

  T* at(int64_t row, int64_t column) const { return C + (row - first) * stride + (column - begin); }
};

template <typename T>
void cost_rows(CostKind kind, const CostRows<T>& args);

template <typename T>
struct ApplyRows {
  int64_t rows;
  const T* V;  // (rows, stride)
  int64_t stride;
  const PackedCloud<T>* to;  // m columns
  const T* coordinates;      // the strips of z^T, (strips_of(d), m, kStrip); for d > kLaneDims,
  T even;                    // and the evenness of z
  T* sum;                    // (rows,) out: V 1
  T* product;                // (rows, d) out: V z
};

template <typename T>
void apply_rows(const ApplyRows<T>& args);

// V = W * gradient_weight(C) in place.
template <typename T>
void weight_rows(CostKind kind, int64_t count, const T* C, T* W);

}  // namespace otloss::cpu
