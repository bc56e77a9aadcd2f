// The best shifts of groups of columns against each other.
//
// Where the plan falls apart into groups that exchange next to nothing, the semidual is nearly flat
// along potentials that are constant on each group, until one is shifted so far that mass moves to
// another. Lumped together, the groups are the points of a small transport problem: group I of the
// rows holds A_I, group K of the columns wants B_K, and M_IK = -eps log of the part of A_I that the
// plan sends to K. The shifts t are its potentials, by Newton's method at a temperature that falls
// from the largest M to eps.
#pragma once

#include <cstdint>
#include <vector>

#include "core/penalty.h"

namespace otloss::cpu {

struct GroupProblem {
  int64_t k;              // groups
  std::vector<double> M;  // (k, k) in units of cost
  std::vector<double> A;  // (k,) of rows; those of an A of 0 are left out
  std::vector<double> B;  // (k,) of columns, positive
  Penalty x, y;
  double eps;
};

// (k,) what to add to the potentials of each group of columns.
std::vector<double> best_shifts(const GroupProblem& problem);

}  // namespace otloss::cpu
