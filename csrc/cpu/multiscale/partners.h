// The leaves of y that a leaf of x may send mass to.
//
// For leaves I, J with centres D apart, x = c_I + u, y = c_J + v, and the planes of both
// potentials,
//     log2 P_ij / (a_i b_j) = shift + alpha_i + beta_j + 2k <u_i, v_j>,  shift = base_I + base_J -
//     k |D|^2, alpha_i = rest_i + <slope_I - 2k D, u_i>,  beta_j = rest_j + <slope_J + 2k D, v_j>
// exactly. It is at most shift + max alpha + max beta + 2k min(sum h h', R R'), h and R half sides
// and radii of the boxes: what is lost is of second order in the leaf's size. Before that, alpha
// and beta are bounded from the boxes too, of a leaf against a super's leaves at once, and of
// supers.
#pragma once

#include <cstdint>

#include "cpu/multiscale/planes.h"

namespace otloss::cpu::multiscale {

// One side of a sweep.
struct View {
  const Cloud* cloud;
  const Planes* planes;
};

// A pair of leaves that is kept.
struct Tile {
  int32_t leaf;    // of y
  bool moments;    // exp(2k <u, v>) is near enough to a polynomial
  bool wide;       // terms of an exponent are so large that they are added up in double
  float exponent;  // entries that are made are 2^-exponent of what they stand for
};

// In numbers of base 2: `reach` is of the mass of a leaf, or a super, of x as columns see it, at
// least that of its weights; a pair is left out where 2^bound times it or the mass of y's is below
// 2^threshold.
struct Search {
  double k;
  View x, y;
  float threshold, slack;  // pairs down to threshold - slack are listed
  float moments;           // largest 2k <u, v> for moments
  float single;            // largest term of exponents in single precision
  bool scaled;             // tiles get exponents, so that none is out of single precision

  int64_t I;  // leaf of x
  float reach;
  int64_t least;          // first leaf of y
  const int32_t* supers;  // of y that are searched
  int64_t supers_count;
  const int32_t* list;  // leaves of y from an earlier search
  int64_t list_count;
  const uint8_t* risen;  // (supers of y,) or null: where the list is of no use
};

struct Found {
  float *alpha, *beta;  // (room, L) of the tiles; beta has shift and log2 of the weights
  Tile* tiles;          // (room,)
  int32_t* listed;      // (room,) for later, or null
  int64_t kept, listed_count;
  // What is left out, of the sums over y at a point of x of the largest density: of pairs that are
  // not listed, and of those that are.
  double left_out, left_out_listed;
  float terms;  // the largest of exponents in single precision
};

void find_partners(const Search& search, Found& found);

// bound (supers of y,) for a super of x: the largest log2 density.
void bound_supers(const Search& search, int64_t S, float* bound);

}  // namespace otloss::cpu::multiscale
