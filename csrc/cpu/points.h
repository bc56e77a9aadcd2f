// Rows of a cost matrix made from points when they are needed, and the plan applied to points
// without the matrix. See points.cpp.
#pragma once

#include <cstdint>
#include <vector>

#include "costs.h"

namespace otloss::cpu {

// Columns whose sums a kernel keeps in registers.
template <typename T>
constexpr int64_t kStrip = 128 / sizeof(T);

// Rows made at once: few, so that they stay in the cache, or more when the points themselves are
// large and are better read once for several rows.
constexpr int64_t kMostRows = 32;
inline int64_t rows_at_once(int64_t d) { return d <= 32 ? 4 : kMostRows; }

// Up to this dimension the plan is applied with strips of points as lanes.
constexpr int64_t kLaneDims = 8;

// A prepared cloud (see CloudGroup) in the order in which it is read as columns: strips of kStrip
// points, and in a strip one coordinate of all its points after the other.
template <typename T>
struct PackedCloud {
  int64_t m;              // points
  int64_t d;              // coordinates
  const T* z;             // (m, d) prepared points
  const T* norm;          // (m,) |z|^2, or |x| for cosine
  int64_t padded_d;       // d up to a multiple of kStrip
  std::vector<T> rows;    // (m, padded_d) the points again, padded with zeros; for d > kLaneDims
  std::vector<T> strips;  // (ceil(m / kStrip), d, kStrip), padded with zeros
  std::vector<T> h;       // (ceil(m / kStrip) * kStrip,) norms, padded with zeros

  PackedCloud(int64_t m, int64_t d, const T* z, const T* norm);
};

template <typename T>
struct CostRows {
  int64_t rows;   // 1 to kMostRows
  int64_t begin;  // columns [begin, end), begin a multiple of kStrip
  int64_t end;
  int64_t diagonal;          // column that is row 0 itself (its distance is 0), or far negative
  const T* z;                // (rows, d) prepared points
  const T* h;                // (rows,) their norms
  const PackedCloud<T>* to;  // the columns
  T* C;                      // (rows, stride) out; column 0 is column `begin`
  int64_t stride;
};

void cost_rows(CostKind kind, const CostRows<float>& args);
void cost_rows(CostKind kind, const CostRows<double>& args);

template <typename T>
struct ApplyRows {
  int64_t rows;  // 1 to kMostRows
  const T* V;    // (rows, stride)
  int64_t stride;
  const PackedCloud<T>* to;  // m columns
  T* sum;                    // (rows,) out: V 1
  T* product;                // (rows, padded_d) out: V z
};

void apply_rows(const ApplyRows<float>& args);
void apply_rows(const ApplyRows<double>& args);

// V = W * gradient_weight(C) in place.
void weight_rows(CostKind kind, int64_t count, const float* C, float* W);
void weight_rows(CostKind kind, int64_t count, const double* C, double* W);

}  // namespace otloss::cpu
