// Sums over the kept pairs of leaves, each entry of the plan from one exponential:
//     e_ij = 2^(alpha_i + beta_j + 2k <u_i, v_j>) = b_j times the density.
// Some rows of a leaf at once; column sums are those of w_i e_ij.
#pragma once

#include <cstdint>

#include "cpu/multiscale/partners.h"

namespace otloss::cpu::multiscale {

constexpr int64_t kTileRows = 8;

struct TileRows {
  int64_t d, L;
  int64_t tiles;
  const Tile* tile;           // (tiles,); those of moments are not read
  const float *alpha, *beta;  // (tiles, L)
  const float* U;             // (d, L) 2k u of the row leaf
  const float* v;             // (leaves, d, L) of the columns
  int64_t first;              // row
  const float* w;             // (kTileRows,) or null where not known yet
  float* e;                   // (tiles, L / lanes, kTileRows, lanes); of all but moments
  float* row;                 // (kTileRows,) sums, accumulated
  float* column;              // (tiles, L) likewise
  // Of wide tiles: log2 P_ij / (a_i b_j) = F_i + G_j - k |x_i - y_j|^2, whose e are made from it.
  double k;
  const double *x, *F;  // (kTileRows, d), (kTileRows,)
  const double *y, *G;  // (leaves, L, d), (leaves, L)
  const float* log_w;   // (leaves, L) of the columns
};

// e and the sums of rows.
void sum_rows(const TileRows& rows);
// The sums of columns, of e.
void sum_columns(const TileRows& rows);
// Both at once; e is used.
void sum_both(const TileRows& rows);
// Of rows, of e times values (tiles, L).
void sum_values(const TileRows& rows, const float* values);

// Column sums of runs of `size` columns, where one of a leaf's is at least `least`.
struct TileGroups {
  int64_t L, size;
  int64_t tiles;
  const Tile* tile;   // (tiles,)
  const float* sums;  // (tiles, L)
  float least;
  int32_t* leaf;  // (tiles,) out: of y
  float* value;   // (tiles, L / size) out
};
// How many leaves are out.
int64_t sum_groups(const TileGroups& groups);

// Both with coordinates, relative to the centre c of the row leaf: of rows e and e (y - c), of
// columns w e and w e u.
struct TileProducts : TileRows {
  const float* u;         // (d, L) of the row leaf
  const double* centre;   // (d,) its centre
  const double* centres;  // (leaves, d) of the columns
  float* row_product;     // (kTileRows, d) accumulated
  float* column_product;  // (tiles, d, L) likewise, or null
};
void sum_products(const TileProducts& rows);

}  // namespace otloss::cpu::multiscale
