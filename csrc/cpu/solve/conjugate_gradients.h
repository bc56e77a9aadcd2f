// Conjugate gradients, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace otloss::cpu {

using Vector = std::vector<double>;

inline double inner(const Vector& x, const Vector& y) {
  double sum = 0;
  for (size_t i = 0; i < x.size(); ++i) sum += x[i] * y[i];
  return sum;
}

// When to stop: at a residual relative to the right-hand side, in the norm of the inverse
// preconditioner, at one whose squared norm is below `floor`, which is rounding, or after so many.
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
template <typename Apply, typename Project>
CgReport conjugate_gradients(const CgLimits& limits, const Vector& inverse, Apply&& apply,
                             Project&& project, Vector& right, Vector& x) {
  const size_t count = right.size();
  Vector &r = right, z(count), p(count), q(count);
  const auto precondition = [&] {
    for (size_t i = 0; i < count; ++i) z[i] = inverse[i] * r[i];
    return inner(r, z);
  };
  std::fill(x.begin(), x.end(), 0.0);
  project(r);
  double rz = precondition();
  const double first = rz;
  CgReport report;
  p = z;
  while (rz > limits.tol * limits.tol * first && rz > limits.floor &&
         report.iterations < limits.iterations && !interrupted()) {
    apply(p, q);
    const double curvature = inner(p, q);
    if (!(curvature > 0)) break;
    const double step = rz / curvature;
    for (size_t i = 0; i < count; ++i) x[i] += step * p[i], r[i] -= step * q[i];
    project(r);
    const double next = precondition(), turn = next / rz;
    for (size_t i = 0; i < count; ++i) p[i] = z[i] + turn * p[i];
    rz = next;
    ++report.iterations;
  }
  report.residual = first > limits.floor ? std::sqrt(rz / first) : 0.0;
  return report;
}

}  // namespace otloss::cpu
