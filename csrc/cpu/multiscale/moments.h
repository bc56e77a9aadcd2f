// Pairs of leaves between which exp(2k ln(2) <u, v>) is a polynomial of low degree in <u, v>: sums
// over one leaf are moments, and at a point of the other the value of a polynomial. O(L) per pair.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/multiscale/partners.h"

namespace otloss::cpu::multiscale {

// Up to this number of coordinates; beyond it monomials are too many.
constexpr int64_t kMomentDims = 3;
// Of |ln(2) 2k <u, v>|: row sums are then right to 5e-5, on average to 1e-5.
constexpr double kMomentReach = 0.8;
// Time for a pair of leaves, over L times that of an entry.
constexpr double kMomentTime = 21;

struct MomentRows {
  int64_t d, L;
  int64_t tiles;
  const Tile* tile;      // (tiles,); those without `moments` are not read
  float *alpha, *beta;   // (tiles, L); sum_rows leaves 2^alpha and 2^beta
  float scale;           // u and v times this have <u, v> = ln(2) 2k <u, v>
  const float* u;        // (d, L) of the row leaf
  const float* v;        // (leaves, d, L) of the columns
  const float* w;        // (L,) weights of rows
  float* row;            // (L,) sums, accumulated
  float* column;         // (tiles, L) likewise
  const double* centre;  // as in TileProducts
  const double* centres;
  float* row_product;     // (d, L) accumulated, or null
  float* column_product;  // (tiles, d, L) likewise
};

void sum_moment_rows(const MomentRows& rows);
// After the rows.
void sum_moment_columns(const MomentRows& rows);
// Rows again, of e times values (tiles, L), into `row`.
void sum_moment_values(const MomentRows& rows, const float* values);

}  // namespace otloss::cpu::multiscale
