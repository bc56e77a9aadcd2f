// The best shifts of groups of columns against each other.
//
// Where the plan falls apart into groups that exchange next to nothing, the semidual is nearly flat
// along potentials that are constant on each group, until one is shifted so far that mass moves to
// another. Of such shifts t it is the dual of a small transport problem: row i holds A_i, group K
// of the columns wants B_K, and M_iK = -eps log of the part of A_i that the plan sends to K. Rows
// that may leave their group are not lumped together: where groups are far apart it is a few points
// of each that send to another one, each alone, and what all of them would send says little of how
// many go next. The shifts are found by Newton's method, and where that leads nowhere, at
// temperatures that fall from the largest M to eps.
#pragma once

#include <cstdint>
#include <vector>

#include "core/penalty.h"

namespace otloss::cpu {

struct GroupProblem {
  int64_t k;              // groups of columns
  std::vector<double> M;  // (rows, k) in units of cost
  std::vector<double> A;  // (rows,) those of an A of 0 are left out
  std::vector<double> B;  // (k,) positive
  double lacking;         // what the plan lacks of B, in all
  Penalty x, y;
  double eps;
};

// (k,) what to add to the potentials of each group of columns.
std::vector<double> best_shifts(const GroupProblem& problem);

}  // namespace otloss::cpu
