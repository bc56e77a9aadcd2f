// Conjugate gradients, in double.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace otloss::cpu {

using Vector = std::vector<double>;

// Stops when the preconditioned residual falls below `tol` times its initial norm or its square
// below `floor`, which is rounding, or after `iterations`.
struct CgLimits {
  double tol, floor;
  int64_t iterations;
};

struct CgReport {
  int64_t iterations = 0;
  double residual = 0;
};

// Solves A x = right for a positive semidefinite A given by apply(x, y): y = A x. `inverse` is the
// diagonal preconditioner, project(r) removes what is not in the range of A. On return `right` is
// the residual.
CgReport conjugate_gradients(const CgLimits& limits, const Vector& inverse,
                             FunctionRef<void(const Vector& x, Vector& y)> apply,
                             FunctionRef<void(Vector& r)> project, Vector& right, Vector& x);

}  // namespace otloss::cpu
