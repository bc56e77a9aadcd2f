// The best shifts of groups of columns against each other (core/group_shifts.h), from all rows.
//
// Rows that may leave their group are not lumped together: where groups are far apart it is a few
// points of each that send to another one, each alone, and what all of them would send says little
// of how many go next.
#pragma once

#include <cstdint>
#include <vector>

#include "core/group_shifts.h"

namespace otloss::cpu {

struct RowsAndGroups {
  int64_t k;              // groups of columns
  std::vector<double> M;  // (rows, k) in units of cost
  std::vector<double> A;  // (rows,) those of an A of 0 are left out
  std::vector<double> B;  // (k,) positive
  double lacking;         // what the plan lacks of B, in all
  Penalty x, y;
  double eps;
};

// (k,) what to add to the potentials of each group of columns.
std::vector<double> best_shifts(const RowsAndGroups& problem);

}  // namespace otloss::cpu
